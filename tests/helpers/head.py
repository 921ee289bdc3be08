"""A Ray head node of its own for a test: ports that nobody else has, a token, a temporary folder, one child process."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "a-token-of-the-tests-own"
_LIMIT_S = 120.0


@dataclass(frozen=True)
class Head:
    """Where the head answers."""

    address: str


def free_ports(number: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running_head(num_cpus: int) -> Iterator[Head]:
    """A head on 127.0.0.1 that asks for TOKEN; it is killed with all that it started."""
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["runtime-env-agent-port", "metrics-export-port", "ray-client-server-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds unix sockets
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"
    }
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = bin_folder + os.pathsep + environment["PATH"]  # `python` of jobs
    command = [f"{bin_folder}/ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--num-cpus={num_cpus}", "--object-store-memory=200000000", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_line(process, "Ray runtime started")
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}")
    finally:
        # With SIGTERM the head would wait half a minute for processes that have nothing left to do.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=_LIMIT_S)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read what `process` prints until `text`; fails with all of it where the process ends without."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("the head did not start:\n" + "".join(seen))
