"""Trackers from their settings, and the check that their packages are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from prefarena.config.tracking import MLflow, TensorBoard, Tracking, Trackio, WandB
from prefarena.errors import UserError
from prefarena.trackers.interface import Tracker

#: Kind to the module that its package is imported by, and to what pip calls that.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio", "trackio"),
}


def check_packages(trackers: Sequence[Tracking]) -> None:
    """Raise UserError for a tracker whose package is not installed where the comparison is run."""
    for settings in trackers:
        module, package = _PACKAGES[settings.kind]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"tracking: kind {settings.kind} needs a package that is not installed; pip install {package}"
            )


def default_folder(root: Path) -> Path:
    """Where trackers have their files, below the folder of all stages and runs."""
    return root / "tracking"


def make_tracker(settings: Tracking, root: Path) -> Tracker:
    """Make the tracker. root: of the comparison's output, for files that the settings give no place for."""
    folder = default_folder(root) / settings.kind
    match settings:
        case TensorBoard():
            from prefarena.trackers.tensorboard import TensorBoardTracker

            return TensorBoardTracker(_place(settings.folder, folder))
        case WandB():
            from prefarena.trackers.wandb import WandBTracker

            return WandBTracker(settings, _place(settings.folder, folder))
        case MLflow():
            from prefarena.trackers.mlflow import MLflowTracker

            given = settings.uri
            uri = given if given is not None and urlparse(given).scheme else str(_place(given, folder))
            return MLflowTracker(uri, settings.experiment)
        case Trackio():
            from prefarena.trackers.trackio import TrackioTracker

            return TrackioTracker(settings.project)


def _place(given: str | None, default: Path) -> Path:
    return default if given is None else Path(given).expanduser().absolute()
