"""Whether all of this works on a machine with a GPU, in about twenty minutes.

    python benchmarks/gpu_acceptance.py [--part kernels|platform|all] [--out benchmarks/results/gpu_acceptance.json]
    python benchmarks/gpu_acceptance.py --only "IPC sync"   only checks with this in their name, beside earlier results
    python benchmarks/gpu_acceptance.py --tiny               what a CPU can do of it, with tiny models

Part "kernels" needs torch 2.11 or later and transformers, part "platform" all that a comparison on GPUs needs (Ray and
vLLM). The result is written after every check: its seconds, its numbers beside what is allowed, or its error's last
line. Checks run one after another in a process of their own, which is started anew after one that failed, so that what
it left behind on a GPU touches no other. One that takes too long is ended, and has failed. What cannot be checked here
is listed with the reason, as left out. The status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acceptance import PARTS, Setting
from sides import HERE, Side, SideEndedError, machine, write_result

#: Seconds until a part's process says which checks it has.
_START_LIMIT_S = 180.0


class Worker:
    """The process that does the checks of one part; started when it is needed."""

    def __init__(self, part: str, setting: Setting) -> None:
        self._command = [sys.executable, str(HERE / "acceptance.py"), part, json.dumps(asdict(setting))]
        self._log = Path(setting.scratch) / f"{part}.log"
        self._threads = 1 if setting.tiny else os.cpu_count() or 1  # the CPU computes what a GPU is held against
        self._side: Side | None = None

    def ask(self, line: str, limit_s: float) -> Any:
        """The answer to a line. Raises SideEndedError where the process ends without, or takes longer."""
        if self._side is None:
            self._side = Side(self._command, self._log, self._threads, apart=True)
        timer = threading.Timer(limit_s, self._side.kill)
        timer.start()
        try:
            return self._side.block(line)
        finally:
            timer.cancel()

    def end(self) -> None:
        """At once, with all that it has started."""
        if self._side is not None:
            self._side.kill()
            self._side = None


def run_part(
    part: str, setting: Setting, result: dict[str, Any], save: Callable[[], None], only: Sequence[str] = ("",)
) -> None:
    """All checks of a part with one of `only` in their names into `result`, which is saved after each."""
    worker = Worker(part, setting)
    try:
        try:
            told = worker.ask("", _START_LIMIT_S)
        except SideEndedError as error:
            add(result, {"name": f"{part}: its process starts", "passed": False, "error": error.reason}, save)
            return
        result["here"] |= told["here"]
        for check in told["checks"]:
            if not any(text in check["name"] for text in only):
                continue
            for kept in (result["checks"], result["left_out"]):
                kept[:] = [one for one in kept if one["name"] != check["name"]]
            if check["left_out"] is not None:
                result["left_out"].append({"part": part, "name": check["name"], "why": check["left_out"]})
                print(f"left out           {check['name']}: {check['left_out']}", flush=True)
                save()
                continue
            found = done(worker, check)
            add(result, {"part": part, **found}, save)
            if not found["passed"]:
                worker.end()
    finally:
        worker.end()


def done(worker: Worker, check: dict[str, Any]) -> dict[str, Any]:
    """A check's record, also where its process ended."""
    began = time.perf_counter()
    try:
        found: dict[str, Any] = worker.ask(check["name"], check["limit_s"])
        return found
    except SideEndedError as error:
        seconds = time.perf_counter() - began
        late = seconds >= check["limit_s"]
        reason = f"it took longer than {check['limit_s']:g} s and was ended" if late else error.reason
        return {"name": check["name"], "passed": False, "seconds": round(seconds, 2), "numbers": {}, "error": reason}


def add(result: dict[str, Any], found: dict[str, Any], save: Callable[[], None]) -> None:
    result["checks"].append(found)
    save()
    verdict = "ok    " if found["passed"] else "FAILED"
    error = f": {found['error']}" if "error" in found else ""
    print(f"{verdict} {found.get('seconds', 0.0):8.1f} s  {found['name']}{error}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only checks with one of these in a name"
    )
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--multi-gpu", action="store_true", help="also what takes two GPUs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_acceptance.json, or with _tiny")
    arguments = parser.parse_args()
    out = arguments.out or HERE / "results" / f"gpu_acceptance{'_tiny' if arguments.tiny else ''}.json"
    result: dict[str, Any] = {"machine": machine(), "tiny": arguments.tiny, "here": {}, "checks": [], "left_out": []}
    if arguments.only != [""] and out.exists():
        result |= json.loads(out.read_text(encoding="utf-8"))

    def save() -> None:
        write_result(out, result | {"failed": [each["name"] for each in result["checks"] if not each["passed"]]})

    with tempfile.TemporaryDirectory(prefix="accept-") as scratch:
        setting = Setting(arguments.tiny, scratch, 2 if arguments.multi_gpu else 1)
        for part in PARTS if arguments.part == "all" else [arguments.part]:
            run_part(part, setting, result, save, arguments.only)
    failed = sum(not each["passed"] for each in result["checks"])
    print(f"{len(result['checks'])} checks, {failed} failed, {len(result['left_out'])} left out; {out} has the numbers")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
