"""Waiting for Ray tasks: never without a limit, and the error says what was waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefarena.errors import WaitTimeoutError


def get_within(refs: Sequence[Any], seconds: float, what: str) -> list[Any]:
    """The results of Ray tasks, in order. `seconds` is the longest wait for the next of them to end.

    So a long list of tasks needs no longer limit than one task. Raises WaitTimeoutError, or what a task raised; either
    way the tasks that have not ended are cancelled.
    """
    import ray

    results: dict[Any, Any] = {}
    waiting = list(refs)
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1, timeout=seconds)
            if not ended:
                raise WaitTimeoutError(
                    f"waited {seconds:g} s for {what} ({len(waiting)} of {len(refs)} tasks not done); "
                    "resources.task_timeout_s sets the limit"
                )
            results[ended[0]] = ray.get(ended[0], timeout=seconds)  # it is here: `wait` fetches
    except BaseException:
        for ref in waiting:
            ray.cancel(ref, force=True)
        raise
    return [results[ref] for ref in refs]
