"""MLflow: one run for each training run; the store is asked which rows it has."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from prefarena.trackers.interface import Row, Run, described, metrics_of

_TAG = "prefarena.id"
_FINAL = "final."
#: Most that MLflow takes of a batch of metrics, and most characters of a parameter.
_BATCH, _LONGEST = 1000, 500

#: Metric and step to its value.
Points = dict[tuple[str, int], float]


class MLflowTracker:
    """Shows runs in an MLflow store. uri: of a server, or a folder."""

    def __init__(self, uri: str, experiment: str) -> None:
        # A folder needs no database, and this is how MLflow, which has both, is told that it is wanted.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = experiment

    def open(self, run: Run, rows: Sequence[Row]) -> MLflowRun:
        """The run that has this id, as long as all that it has is among the rows; else a new one in its place."""
        wanted, experiment = _points(rows), self._experiment_id()
        for found in self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'"):
            has = self._points_of(found.info.run_id, list(found.data.metrics))
            if has is not None and all(wanted.get(point) == value for point, value in has.items()):
                opened = MLflowRun(self._client, found.info.run_id, rows)
                opened.add({point: value for point, value in wanted.items() if point not in has})
                return opened
            self._client.delete_run(found.info.run_id)
        tags = {_TAG: run.id, **{f"prefarena.{name}": str(value) for name, value in described(run).items()}}
        created = self._client.create_run(experiment, tags=tags, run_name=run.name)
        settings = [Param(name, str(value)[:_LONGEST]) for name, value in _flat(run.settings).items()]
        self._client.log_batch(created.info.run_id, params=settings[:100])
        opened = MLflowRun(self._client, created.info.run_id, rows)
        opened.add(wanted)
        return opened

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        return self._client.create_experiment(self._experiment) if found is None else found.experiment_id

    def _points_of(self, run_id: str, names: Sequence[str]) -> Points | None:
        """The points of a run's rows that the store has; None where it has a step twice."""
        found: Points = {}
        for name in names:
            if name.startswith(_FINAL):
                continue
            for point in self._client.get_metric_history(run_id, name):
                if (name, point.step) in found:
                    return None
                found[name, point.step] = point.value
        return found


class MLflowRun:
    """A run of the store."""

    def __init__(self, client: MlflowClient, run_id: str, rows: Sequence[Row]) -> None:
        self._client, self._id = client, run_id
        self._last_step = int(rows[-1]["step"]) if rows else 0

    def add(self, points: Points) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for (name, step), value in points.items()]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + _BATCH])

    def log(self, rows: Sequence[Row]) -> None:
        self.add(_points(rows))
        self._last_step = int(rows[-1]["step"])

    def summarise(self, numbers: Mapping[str, float]) -> None:
        """Log the numbers as metrics of one point; those that the run has already stay."""
        has = self._client.get_run(self._id).data.metrics
        named = {f"{_FINAL}{_named(name)}": value for name, value in numbers.items()}
        self.add({(name, self._last_step): value for name, value in named.items() if has.get(name) != value})

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _points(rows: Sequence[Row]) -> Points:
    return {(_named(name), int(row["step"])): value for row in rows for name, value in metrics_of(row).items()}


def _named(name: str) -> str:
    """Join names by dots, since a folder of MLflow's cannot hold both `loss` and `loss/preference`."""
    return name.replace("/", ".")


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten settings to their dotted names."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
