"""A training that trackers follow, in a process of its own.

    python tests/helpers/tracked_training.py INPUTS FOLDER [DIES_AT]

It kills its process at a step, when the trackers have what the checkpoint before it holds; without DIES_AT it ends.
FOLDER gets `stage/`, and `tracking/` with a folder for each tracker.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from off_policy import off_policy_job
from rich.console import Console

from pipelines.tracking import Follower, Trackers
from prefarena.config import DPO, Optimisation
from prefarena.report.results import EntryResult, Results
from prefarena.trackers.interface import Run
from prefarena.trackers.make import make_tracker
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker
from tests.helpers.trackers import installed, settings_of

FINAL = {"reward": 1.5, "kl": 0.25}
TRAINING = Optimisation(num_steps=12, batch_size=8, log_every=1, warmup_steps=2, checkpoint_every=3)


class DyingWorker(Worker):
    """Is killed right after it has logged a step."""

    def __init__(self, stage_dir: str, dies_at: int | None, trackers: Trackers) -> None:
        super().__init__(stage_dir)
        self._dies_at, self._trackers = dies_at, trackers

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if row["step"] == self._dies_at:
            self.flush()
            self._trackers.catch_up()
            time.sleep(0.5)  # what a tracker writes by itself may be written by now, or not
            os.kill(os.getpid(), signal.SIGKILL)


def main(inputs: Path, folder: Path, dies_at: int | None) -> None:
    job = off_policy_job(inputs, folder / "stage", DPO(training=TRAINING))
    run = Run("comparison-1a2b3c4d", "dpo", 3, "dpo", "dpo-dpo-s3-0123456789ab", {"beta": 0.1})
    console = Console()
    runs = {run: folder / "stage"}
    trackers = Trackers(
        [
            Follower(kind, partial(make_tracker, settings_of(kind, folder), folder), runs, console, poll_s=0.2)
            for kind in installed()
        ]
    )
    run_job(job, DyingWorker(job.stage_dir, dies_at, trackers))
    notes = trackers.catch_up()
    entry = EntryResult(name="dpo", kind="dpo", seeds={"3": FINAL})
    trackers.summarise(Results(name="c", task={}, seeds=[3], exact=True, entries=[entry]))
    trackers.close()
    if notes:
        sys.exit("\n".join(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
