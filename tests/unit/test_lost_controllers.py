"""Ray Train's controller, or an actor that it needs, dies: training is started again. A bug keeps its traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from off_policy import example, off_policy_job, write_inputs
from ray.train.v2.api.exceptions import ControllerError

from prefarena.config import DPO, Resources
from prefarena.stages import write_manifest
from prefarena.training import launch

KILLED = "7 worker(s) were killed due to the node running low on memory"
LOST: list[Exception] = [
    ray.exceptions.ActorDiedError(),
    ControllerError(ray.exceptions.OutOfMemoryError(KILLED)),
    ControllerError(ray.exceptions.ActorDiedError()),
    ControllerError(ray.exceptions.WorkerCrashedError()),
]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], freed: list[int]) -> int:
    """How often it was started, where these ended the first attempts; the job is finished by the one after them.

    freed: gets the number of the attempt after which reservations were freed.
    """
    job: Any = off_policy_job(write_inputs(tmp_path), tmp_path / "stage", example(DPO))
    started = 0

    def attempt(jobs: Any, resources: Any, storage: Any) -> None:
        nonlocal started
        started += 1
        if errors:
            raise errors.pop(0)
        write_manifest(job.stage_dir, {})

    monkeypatch.setattr(launch, "_fit", attempt)
    monkeypatch.setattr(launch, "free_reservations_of_the_dead", lambda: freed.append(started))
    launch.run_jobs([job], Resources(max_failures=2), str(tmp_path))
    return started


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_training_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    freed: list[int] = []
    assert run(tmp_path, monkeypatch, [error], freed) == 2 and freed == [1]


def test_it_is_given_up_after_as_many_failures_as_the_settings_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    with pytest.raises(ControllerError, match="low on memory"):
        run(tmp_path, monkeypatch, LOST[1:2] * 3, freed)
    assert freed == [1, 2, 3]  # the last time for whatever runs after it


@pytest.mark.parametrize("cause", [ValueError("a bug"), KeyError("jobs")])
def test_a_bug_in_the_controller_is_raised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    errors: list[Exception] = [ControllerError(cause), ControllerError(cause)]
    with pytest.raises(ControllerError):
        run(tmp_path, monkeypatch, errors, [])
    assert len(errors) == 1
