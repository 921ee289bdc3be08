"""Waiting for Ray tasks: always with a limit, and the error says what was waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefarena.errors import WaitTimeoutError
from prefarena.failures import cluster_answers, in_one_line, is_death, reason_of


@dataclass(frozen=True)
class Failed:
    """A task that failed for a reason that concerns only this task (`failure_of_task`)."""

    reason: str


def failure_of_task(error: Exception) -> str | None:
    """Why a Ray task or actor failed, in one sentence, where that is no bug: `reason_of`, or a process that died."""
    import ray.exceptions

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return f"its process was killed because the node ran out of memory ({in_one_line(error)})"
    if is_death(error):
        return f"its process died ({in_one_line(error)}), as happens when it takes more memory than there is"
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        return reason_of(error.cause)
    return reason_of(error)


def get_within(refs: Sequence[Any], seconds: float, what: str) -> list[Any]:
    """Return the results of Ray tasks, in order. `seconds` is the longest wait for the next of them to end.

    So a long list of tasks needs no longer limit than one task. Raises WaitTimeoutError, or what a task raised; either
    way the tasks that have not ended are cancelled.
    """
    return _collected(refs, seconds, what, keep_failures=False)


def outcomes_within(refs: Sequence[Any], seconds: float, what: str) -> list[Any]:
    """`get_within` with a `Failed` in place of the result of a task that failed; only bugs and time-outs are raised."""
    return _collected(refs, seconds, what, keep_failures=True)


def _collected(refs: Sequence[Any], seconds: float, what: str, keep_failures: bool) -> list[Any]:
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
            try:
                results[ended[0]] = ray.get(ended[0], timeout=seconds)  # it is here: `wait` fetches
            except Exception as error:
                reason = failure_of_task(error) if keep_failures else None
                if reason is None or (is_death(error) and not cluster_answers()):
                    raise
                results[ended[0]] = Failed(reason)
    except BaseException:
        for ref in waiting:
            ray.cancel(ref, force=True)
        raise
    return [results[ref] for ref in refs]
