"""What a check of benchmarks/gpu_acceptance.py is, and the process that runs those of one part.

    python acceptance.py PART SETTING

waits for lines. The first is answered by what is here and which checks there are, each one after it, the name of a
check, by that check's record. Needs the standard library alone; the parts need more.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sides import HERE, answer, last_error

#: The checks of each are in a module named after it, as CHECKS.
PARTS = ("kernels", "platform")


@dataclass(frozen=True)
class Setting:
    """tiny: on the CPU, with tiny models. scratch: a folder for files. gpus: how many GPUs the checks may use."""

    tiny: bool
    scratch: str
    gpus: int

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"


@dataclass
class Outcome:
    """What a check found: numbers, and what of them is wrong."""

    numbers: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def note(self, name: str, value: Any) -> None:
        self.numbers[name] = value

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Note a number, which is wrong above its limit, or where it is none."""
        self.numbers[name] = {"value": value, "at_most": limit}
        if not value <= limit:
            self.wrong.append(f"{name} is {value:.3g}, and at most {limit:.3g} is allowed")

    def must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


def always(_: Setting) -> str | None:
    return None


@dataclass(frozen=True)
class Check:
    """work: None where it can never be done. left_out: why it cannot be done in a setting; None where it can. limit_s:
    seconds after which it is ended.
    """

    name: str
    work: Callable[[Setting, Outcome], None] | None
    left_out: Callable[[Setting], str | None] = always
    limit_s: float = 180.0


def record(check: Check, setting: Setting) -> dict[str, Any]:
    """Do a check; what came of it."""
    began, outcome, error = time.perf_counter(), Outcome(), None
    assert check.work is not None
    try:
        check.work(setting, outcome)
    except Exception as raised:  # whatever a driver, a compiler, Ray or vLLM raises is the check's result
        traceback.print_exc()
        error = last_error(traceback.format_exc()) or type(raised).__name__
    wrong = [*outcome.wrong, *([error] if error else [])]
    found = {
        "name": check.name,
        "passed": not wrong,
        "seconds": round(time.perf_counter() - began, 2),
        "numbers": outcome.numbers,
    }
    return found | ({"error": "; ".join(wrong)} if wrong else {})


def main() -> None:
    # This checkout is tested, whatever is installed, here and in the processes that this one starts.
    paths = [str(HERE.parent / "platform"), str(HERE.parent), str(HERE)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.stdout = sys.stderr  # stdout carries answers alone
    setting = Setting(**json.loads(sys.argv[2]))
    if sys.argv[1] == "platform":  # Ray is told this before it is imported
        importlib.import_module("prefarena.cluster.session").listen_on_loopback()
    part: Any = importlib.import_module(f"acceptance_{sys.argv[1]}")
    checks: dict[str, Check] = {check.name: check for check in part.CHECKS}
    for line in sys.stdin:
        if name := line.strip():
            answer(record(checks[name], setting))
            part.tidy()
            continue
        listed = [
            {"name": check.name, "left_out": check.left_out(setting), "limit_s": check.limit_s}
            for check in checks.values()
        ]
        answer({"here": part.here(setting), "setting": asdict(setting), "checks": listed})


if __name__ == "__main__":
    main()
