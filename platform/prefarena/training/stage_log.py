"""What a training reports while it runs: rows of metrics, and faults from which it recovered.

Both are JSON lines in the stage's folder. Rank 0 alone writes, and only while its attempt is the current one: a worker
that is left over from a run whose node or driver died must not write between the lines of its successor.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefarena.mirror import push, read_text
from prefarena.stage_files import ATTEMPT, FAULTS, METRICS, read_log
from prefarena.stages import write_json, write_text
from prefarena.training.storage import full_disk_named, retried

_logger = logging.getLogger(__name__)


class SupersededError(RuntimeError):
    """Another attempt at the job has begun: this worker is left over from a run whose node or driver died."""


class StageLog:
    """The log of one stage, as the worker of a rank sees it.

    attempt: gives the word that this attempt's workers share, and no other attempt's.
    """

    def __init__(self, stage_dir: Path, rank: int, attempt: Callable[[], str], retry_s: float) -> None:
        self._stage_dir, self._rank, self._attempt, self._retry_s = stage_dir, rank, attempt, retry_s
        self._begun = False

    def begin_attempt(self) -> None:
        """Make this attempt the current one; every earlier one is refused from now on. For rank 0."""
        write_json(self._stage_dir / ATTEMPT, {"attempt": self._attempt()})
        push(self._stage_dir / ATTEMPT)
        self._begun = True

    def check_current(self) -> None:
        """Raise SupersededError where another attempt began after this one did. For rank 0."""
        path = self._stage_dir / ATTEMPT
        if self._begun and json.loads(read_text(path))["attempt"] != self._attempt():
            raise SupersededError(f"{self._stage_dir.name}: another attempt at this job has begun")

    def row(self, row: dict[str, Any]) -> None:
        """Append a row of metrics, without what is not finite, which JSON cannot hold."""
        self._append(METRICS, {name: value for name, value in row.items() if _can_be_written(value)})

    def fault(self, kind: str, message: str, **details: Any) -> None:
        """Keep a record of a fault from which the run recovered, for the report."""
        if self._rank == 0:
            _logger.warning("%s: %s", self._stage_dir.name, message)
            self._append(FAULTS, {"kind": kind, "message": message, "time": time.time(), **details})

    def faults(self) -> list[dict[str, Any]]:
        """The records of all attempts at this job."""
        return read_log(self._stage_dir / FAULTS, under_way=True)

    def forget_rows_after(self, step: int) -> None:
        """Drop metric rows that an interrupted attempt logged beyond the checkpoint, and one that it half wrote."""
        path = self._stage_dir / METRICS
        if self._rank != 0 or not path.exists():
            return
        rows = read_log(path, under_way=True)
        kept = [row for row in rows if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        last = max((row["step"] for row in rows), default=0)
        self.fault(
            "resumed",
            f"an earlier attempt was interrupted after step {last} or later; training resumed from step {step}",
            step=step,
            steps_lost=max(0, last - step),
        )

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self._rank != 0:
            return
        self.check_current()
        path, line = self._stage_dir / name, json.dumps(row) + "\n"

        def append() -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)

        with full_disk_named(f"{self._stage_dir.name}: {name}", self._stage_dir):
            retried(append, self._retry_s, str(path))


def _can_be_written(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
