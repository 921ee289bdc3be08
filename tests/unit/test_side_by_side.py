"""Trainings whose policies respond, side by side: each with generation actors of its own, which it may lose."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines import runner, train
from pipelines.jobs import generator_names
from pipelines.plan import make_plan
from prefarena.cluster.capacity import Node
from prefarena.config import Comparison, parse_config
from prefarena.generation.interface import GeneratorLostError
from prefarena.stages import failure_of, is_finished, write_manifest
from prefarena.training.jobs import OffPolicyJob

Names = tuple[str, ...]
#: Two on-policy entries and one that is online.
METHODS: list[dict[str, Any]] = [
    {"kind": "rlhf"},
    {"kind": "grpo"},
    {"kind": "dpo", "online": {"every": 8, "reward": {"kind": "gold"}}},
]
_LIMIT_S = 30


class Engine:
    def __init__(self, started: list[Names], stopped: list[Names], names: Names) -> None:
        self._stopped, self._names = stopped, names
        started.append(names)

    def stop(self) -> None:
        self._stopped.append(self._names)


def names_of(job: Any) -> Names:
    asks: Any = job.drawing if isinstance(job, OffPolicyJob) else job
    return tuple(asks.generators)


class Cluster:
    """Stands for Ray: engines that are there at once, and workers that finish what they are given.

    at_once: trainings that wait for each other before any of them goes on. losses: how often a job loses its engine.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_once: int, num_cpus: float, **losses: int) -> None:
        self.started: list[Names] = []
        self.stopped: list[Names] = []
        self.asked: dict[str, list[Names]] = {}
        self.numbers: set[int] = set()
        self._together = threading.Barrier(at_once, timeout=_LIMIT_S)
        self._seen: set[Names] = set()
        self._left = Counter(losses)
        monkeypatch.setattr(train, "cluster_nodes", lambda: [Node("a", {"CPU": num_cpus})])
        monkeypatch.setattr(train, "cluster_answers", lambda: True)
        monkeypatch.setattr(train, "start_generator", self._start)
        monkeypatch.setattr(runner, "run_jobs", self._run)

    def _start(self, config: Comparison, plan: Any, console: Console, *, place: int) -> Engine:
        return Engine(self.started, self.stopped, generator_names(config, place))

    def _run(self, jobs: Sequence[Any], resources: Any, storage: str) -> None:
        self.numbers.add(resources.concurrent_runs)
        if (names := names_of(jobs[0])) not in self._seen:
            self._seen.add(names)
            self._together.wait()
        for job in jobs:
            self.asked.setdefault(job.name, []).append(names_of(job))
            if self._left[job.name[:2]]:
                self._left[job.name[:2]] -= 1
                raise GeneratorLostError("the engine is gone")
            write_manifest(job.stage_dir, {})


def run(tmp_path: Path, methods: list[dict[str, Any]], **resources: Any) -> tuple[dict[str, str | None], list[bool]]:
    """Train them. Returns why each failed, and whether each is finished."""
    entries = [{"name": f"e{place}", "method": one} for place, one in enumerate(methods)]
    config = parse_config({"entries": entries, "output": str(tmp_path), "resources": resources})
    [plan] = make_plan(config)
    train._train_with_generators(config, Console(quiet=True), [(plan, one) for one in plan.trained])
    folders = {one.entry.name: one.training.folder for one in plan.trained if one.training}
    failures = {name: failure_of(folder) for name, folder in folders.items()}
    return failures, [is_finished(folder) for folder in folders.values()]


def test_trainings_are_side_by_side_where_there_is_room_each_with_its_own_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, at_once=2, num_cpus=5)
    _, finished = run(tmp_path, METHODS, concurrent_runs=0)
    assert finished == [True] * 3 and cluster.numbers == {2}
    first, second, third = (cluster.asked[f"e{place}-s0"] for place in range(3))
    assert first == third != second and sorted(cluster.started) == sorted(cluster.stopped) == [*first, *second]


def test_they_take_turns_where_there_is_no_room_or_none_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, (num_cpus, wanted) in enumerate([(2, 0), (64, 1)]):
        cluster = Cluster(monkeypatch, at_once=1, num_cpus=num_cpus)
        _, finished = run(tmp_path / str(place), METHODS, concurrent_runs=wanted)
        assert finished == [True] * 3 and cluster.numbers == {1} and len(cluster.started) == 1


def test_an_engine_that_is_lost_again_and_again_fails_its_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, at_once=2, num_cpus=4, e0=9, e1=1)
    failures, finished = run(tmp_path, METHODS, concurrent_runs=2, max_failures=1)
    assert failures == {"e0": "the engine is gone", "e1": None, "e2": None} and finished == [False, True, True]
    assert [len(cluster.asked[name]) for name in ("e0-s0", "e1-s0", "e2-s0")] == [2, 2, 1]
    assert Counter(cluster.started) == Counter(cluster.stopped)
