"""Waits for Ray tasks end: with the results in order, or with an error that names what was waited for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.exact import collect_scores
from prefarena.cluster.waiting import get_within
from prefarena.errors import WaitTimeoutError
from prefarena.stages import Stage

_FOREVER = 600.0


@ray.remote(num_cpus=0)
def sleep(seconds: float, *after: Any) -> float:
    time.sleep(seconds)
    return seconds


@ray.remote(num_cpus=0)
def fail() -> None:
    raise ValueError("the task's own words")


def is_cancelled(ref: Any) -> bool:
    try:
        ray.get(ref, timeout=30)
    except (ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError):
        return True
    return False


def test_results_come_in_order_and_the_limit_is_of_each_task(ray_session: None) -> None:
    ray.get(sleep.remote(0))  # the first task pays for a process
    first = sleep.remote(3)
    second = sleep.remote(2.5, first)
    assert get_within([second, first], 5, "two tasks") == [2.5, 3]  # 5.5 s in all
    assert get_within([], 1, "no tasks") == []


def test_a_timeout_names_what_was_waited_for_and_cancels_it(ray_session: None) -> None:
    running = [sleep.remote(_FOREVER), sleep.remote(_FOREVER)]
    with pytest.raises(WaitTimeoutError) as caught:
        get_within(running, 1, "evaluating dpo-s0")
    assert "waited 1 s for evaluating dpo-s0 (2 of 2 tasks not done)" in str(caught.value)
    assert "resources.task_timeout_s sets the limit" in str(caught.value)
    assert all(is_cancelled(ref) for ref in running)


def test_what_a_task_raises_ends_the_wait_and_the_other_tasks(ray_session: None) -> None:
    other = sleep.remote(_FOREVER)
    with pytest.raises(ValueError, match="the task's own words"):
        get_within([other, fail.remote()], 60, "two tasks")
    assert is_cancelled(other)


def test_a_table_of_scores_that_takes_too_long_leaves_its_stage_unfinished(ray_session: None, tmp_path: Path) -> None:
    stage = Stage.at(tmp_path, "scores", "function-s0", [])
    with pytest.raises(WaitTimeoutError, match=r"waited 1 s for the scores of every response \(function-s0\)"):
        collect_scores([sleep.remote(_FOREVER)], stage, 1)
    assert not stage.finished
