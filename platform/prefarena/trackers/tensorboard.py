"""TensorBoard: one folder of event files for each run, written anew by every process that opens it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from prefarena.trackers.interface import Row, Run, described, metrics_of


class TensorBoardTracker:
    """FOLDER/COMPARISON/ENTRY/seed-0; event files can only grow, so those of an earlier process are replaced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, run: Run, rows: Sequence[Row]) -> Events:
        folder = self._folder.joinpath(run.comparison, *run.path)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        events = Events(folder, run)
        events.log(rows)
        return events


class Events:
    """The event file of one run."""

    def __init__(self, folder: Path, run: Run) -> None:
        self._writer = SummaryWriter(str(folder))
        self._last_step = 0
        settings = json.dumps({**described(run), "settings": run.settings}, indent=2, default=str)
        self._writer.add_text("settings", f"```json\n{settings}\n```")

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._last_step = int(row["step"])
            for name, value in metrics_of(row).items():
                self._writer.add_scalar(name, value, self._last_step)
        self._writer.flush()

    def summarise(self, numbers: Mapping[str, float]) -> None:
        """TensorBoard has no summaries: the numbers stand as curves of one point, at the last step."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"final/{name}", value, self._last_step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
