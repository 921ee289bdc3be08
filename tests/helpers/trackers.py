"""Readers of what trackers have stored, each its package's own where it has one for files, and what they find."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefarena.config.tracking import MLflow, TensorBoard, Tracking, Trackio, WandB
from prefarena.trackers.interface import Row, metrics_of

#: Metric, step and value of everything that a run holds.
Stored = list[tuple[str, int, float]]

KINDS = ("mlflow", "tensorboard", "trackio", "wandb")
# Trackio reads it when it is imported, once for a process.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))


def settings_of(kind: str, folder: Path) -> Tracking:
    """A tracker that keeps its files under `folder`, or, in Trackio, in a project named after it."""
    every: dict[str, Tracking] = {
        "tensorboard": TensorBoard(),
        "wandb": WandB(mode="offline"),
        "mlflow": MLflow(),
        "trackio": Trackio(project=folder.name),
    }
    return every[kind]


def installed() -> list[str]:
    return [kind for kind in KINDS if importlib.util.find_spec(kind) is not None]


def read(kind: str, folder: Path) -> Stored:
    """All that the one run of a tracker holds, as the tracker's `settings_of` the same folder have stored it."""
    found = _READERS[kind](folder)
    return [(name.replace(".", "/"), step, value) for name, step, value in found]


def _tensorboard(folder: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "tracking" / "tensorboard").rglob("events.out.tfevents.*")
    loaded = EventAccumulator(str(events.parent), size_guidance={"scalars": 0}).Reload()
    return [(tag, point.step, point.value) for tag in loaded.Tags()["scalars"] for point in loaded.Scalars(tag)]


def _mlflow(folder: Path) -> Stored:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(folder / "tracking" / "mlflow"))
    (experiment,) = [one for one in client.search_experiments() if one.name == "prefarena"]
    (run,) = client.search_runs([experiment.experiment_id])
    return [
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    ]


def _wandb(folder: Path) -> Stored:
    record_of = importlib.import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    found: Stored = []
    (log,) = (folder / "tracking" / "wandb").rglob("*.wandb")
    summary: dict[str, float] = {}
    deadline = time.monotonic() + 60
    records: list[Any] = []
    while not any(record.HasField("exit") for record in records):  # the package's own process writes the file
        assert time.monotonic() < deadline, f"{log} has no end"
        time.sleep(0.1)
        records = [record_of(data) for data in _records(log.read_bytes())]
    for record in records:
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found += [(key, row["_step"], value) for key, value in row.items() if not key.startswith("_")]
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    last = max((step for _, step, _ in found), default=0)
    return found + [(key, last, value) for key, value in summary.items() if key.startswith("final/")]


def _records(content: bytes) -> Iterator[bytes]:
    """Of a .wandb file, which the package reads in Go alone: LevelDB's log format behind a header of 7 bytes."""
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def _trackio(folder: Path) -> Stored:
    """By the package's command, in a process that finds the database where the writer had it."""
    there = folder / "tracking" / "trackio"
    environment = os.environ | ({"TRACKIO_DIR": str(there)} if there.is_dir() else {})
    command = [str(Path(sys.executable).parent / "trackio"), "query", "project", "--project", folder.name, "--json"]
    command += ["--sql", "select run_id, step, metrics from metrics"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    rows = json.loads(asked.stdout[asked.stdout.index("{") :])["rows"]
    assert len({row["run_id"] for row in rows}) == 1
    return [(name, row["step"], value) for row in rows for name, value in json.loads(row["metrics"]).items()]


_READERS: dict[str, Callable[[Path], Stored]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def needs(kind: str) -> None:
    pytest.importorskip(kind, reason=f"the package of {kind} is not installed")


def points(rows: Sequence[Row]) -> Stored:
    """What a tracker is to hold of rows."""
    return [(name, int(row["step"]), value) for row in rows for name, value in metrics_of(row).items()]


def check_same(found: Stored, expected: Stored) -> None:
    """Every point once, and its value as far as single precision holds it, which TensorBoard stores."""
    assert sorted((name, step) for name, step, _ in found) == sorted((name, step) for name, step, _ in expected)
    values = {(name, step): value for name, step, value in expected}
    for name, step, value in found:
        assert value == pytest.approx(values[name, step], rel=1e-6, abs=1e-12), (name, step)
