"""The sides of a comparison: warm processes that take turns, in environments of their own.

Standard library alone, because TRL's side imports it too, in an environment without Prefarena.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
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


class SideEndedError(RuntimeError):
    """A side's process ended before it answered. reason: its last error, in one line."""

    def __init__(self, log: str, status: int) -> None:
        super().__init__(f"a side ended early, with status {status}:\n{log[-3000:]}")
        self.reason = last_error(log) or f"it ended with status {status} and no error"
        self.out_of_memory = re.search(r"^(torch\.|torch\.cuda\.)?OutOfMemoryError\b", log, re.MULTILINE) is not None


def last_error(log: str) -> str | None:
    """The last line of a log that names an exception, as the end of a traceback does."""
    found = re.findall(r"^[\w.]+(?:Error|Exception|Interrupt|Exit)\b.*$", log, re.MULTILINE)
    return found[-1].strip() if found else None


class Side:
    """A process that runs a block of work for each line that it is given, and waits in between.

    apart: in a session of its own, so that `kill` ends what it has started, too. environment: variables in addition to
    this process's.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        threads: int,
        *,
        apart: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._log, self._apart = log, apart
        common = {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **common, **environment},
                start_new_session=apart,
            )

    def block(self, line: str = "") -> Any:
        """The answer to one line; raises SideEndedError with the end of the process's log where it died."""
        self.ask(line)
        return self.result()

    def ask(self, line: str = "") -> None:
        """Give it one line, and go on; `result` waits for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `result` says of what
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def result(self) -> Any:
        assert self._process.stdout is not None
        for printed in self._process.stdout:
            if printed.startswith(ANSWER):
                return json.loads(printed.removeprefix(ANSWER))
        raise SideEndedError(self._log.read_text(encoding="utf-8", errors="replace"), self._process.wait())

    def end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have died with a line unread
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """At once, with all that it has started where it is apart."""
        if not self._apart:
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


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


def write_result(path: Path, value: Any) -> None:
    """As JSON; whoever reads it meanwhile sees the file as it was before or as it is then, and no part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


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
