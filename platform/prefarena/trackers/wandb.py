"""Weights & Biases: a run for each training, on its server, or in files that `wandb sync` sends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

from prefarena.config.tracking import WandB
from prefarena.trackers.interface import Row, Run, described, metrics_of

_WEAVE = "WANDB_DISABLE_WEAVE"


class WandBTracker:
    """Shows runs in Weights & Biases. folder: where the package keeps its files."""

    def __init__(self, settings: WandB, folder: Path) -> None:
        self._settings, self._folder = settings, folder

    def open(self, run: Run, rows: Sequence[Row]) -> WandBRun:
        """Open the run of this id. On a server it continues after its last step; offline files are rewritten."""
        self._folder.mkdir(parents=True, exist_ok=True)
        offline = self._settings.mode == "offline"
        for old in self._folder.glob(f"wandb/offline-run-*-{run.id}") if offline else ():
            shutil.rmtree(old)
        with _no_weave():
            opened = wandb.init(
                project=self._settings.project,
                entity=self._settings.entity,
                id=run.id,
                name=run.name,
                group=run.comparison,
                job_type=run.kind,
                config={**described(run), "settings": dict(run.settings)},
                dir=str(self._folder),
                mode=self._settings.mode,
                resume=None if offline else "allow",
                reinit="create_new",  # one process shows several runs
                settings=_quiet(),
            )
        ours = WandBRun(opened, first_step=opened.step)
        ours.log(rows)
        return ours


@contextmanager
def _no_weave() -> Iterator[None]:
    """W&B offers Weave, by a line on the terminal for every run, where a client of language models is imported: judges
    behind endpoints have one. Whoever set the variable themselves keeps it.
    """
    before = os.environ.get(_WEAVE)
    os.environ.setdefault(_WEAVE, "true")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_WEAVE, None)


def _quiet() -> wandb.Settings:
    """Settings that keep only numbers: nothing of the terminal, the machine, its environment or the code."""
    return wandb.Settings(
        silent=True, console="off", save_code=False, disable_code=True, disable_git=True, disable_job_creation=True,
        x_disable_stats=True, x_disable_meta=True,
    )  # fmt: skip


class WandBRun:
    """A W&B run. first_step: the first step that the server does not have yet."""

    def __init__(self, run: Any, first_step: int) -> None:
        self._run, self._first_step = run, first_step

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row["step"] >= self._first_step:
                self._run.log(metrics_of(row), step=int(row["step"]))

    def summarise(self, numbers: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        self._run.finish()
