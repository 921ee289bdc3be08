"""The sides of a comparison: warm processes that take turns, in environments of their own.

Standard library alone, because TRL's side imports it too, in an environment without Prefarena.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: Before a side's answer among the lines that it prints.
ANSWER = "RESULT "


def environment_python(environment: Path, requirements: Path) -> str:
    """The interpreter of an environment, made where it is missing or its requirements have changed. torch comes first.

    TORCH_INDEX in the environment: where pip finds a CPU build of torch.
    """
    stamp, wanted = environment / ".installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
    python = environment / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {environment} (once)", flush=True)
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        index = os.environ.get("TORCH_INDEX")
        subprocess.run([*pip, *(["--index-url", index] if index else []), "torch==2.13.0"], check=True)
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    return str(python)


class Side:
    """A process that runs a block of work for each line that it is given, and waits in between."""

    def __init__(self, command: list[str], log: Path, threads: int) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )

    def block(self, line: str = "") -> Any:
        """The answer to one line; raises RuntimeError with the end of the process's log where it died."""
        self.ask(line)
        return self.result()

    def ask(self, line: str = "") -> None:
        """Give it one line, and go on; `result` waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        assert self._process.stdout is not None
        for printed in self._process.stdout:
            if printed.startswith(ANSWER):
                return json.loads(printed.removeprefix(ANSWER))
        raise RuntimeError(f"a side ended early:\n{self._log.read_text()[-3000:]}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def serve(work: Callable[[], Any]) -> None:
    """In a side's process: do `work` for each line on stdin and print its answer, until stdin ends."""
    for _ in sys.stdin:
        answer(work())


def answer(value: Any) -> None:
    print(ANSWER + json.dumps(value), file=sys.__stdout__, flush=True)


def memory_mib(field: str) -> float:
    """This process's memory in MiB: `VmRSS` is what it holds now, `VmHWM` the most that it ever held."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def versions_in(python: str, *names: str) -> str:
    """Names and versions of packages in another environment."""
    script = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names!r}))"
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def versions(*names: str) -> str:
    """Names and versions of packages in this environment."""
    return " ".join(f"{name} {version(name)}" for name in names)


def machine() -> str:
    """Processor, load and date, for the head of a result."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    load = f"load when it began: {os.getloadavg()[0]:.1f}"
    return f"{os.cpu_count()} x {models[0]}; {load}; Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"


class Report:
    """Lines that are printed as they come; `save` writes them to `out`, where that is given."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._lines: list[str] = []

    def say(self, lines: list[str]) -> None:
        self._lines += lines
        print("\n".join(lines), flush=True)

    def save(self) -> None:
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text("\n".join(self._lines).rstrip() + "\n", encoding="utf-8")
