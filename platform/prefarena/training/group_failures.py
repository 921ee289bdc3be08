"""Deciding whether a group of training workers that failed for good means one job's failure or the end of the run.

Ray Train has by then restarted the group as often as `resources.max_failures` allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefarena.errors import UserError
from prefarena.failures import cluster_answers, in_one_line
from prefarena.generation.interface import GeneratorLostError
from prefarena.stages import failure_of, is_settled, write_failure
from prefarena.training.jobs import Job

if TYPE_CHECKING:
    from ray.train.v2.api.exceptions import WorkerGroupError


def failed_jobs(jobs: Sequence[Job]) -> set[str]:
    """The folders of the jobs whose stage has failed."""
    return {job.stage_dir for job in jobs if failure_of(job.stage_dir) is not None}


def settle(error: WorkerGroupError, jobs: Sequence[Job], failed_before: set[str], num_attempts: int) -> None:
    """Return where the group's other jobs can go on: a job has failed, here or on a worker.

    Where workers died without a word (the kernel's or Ray's memory monitor kills them like that), the job that they
    were at is marked as failed: it has been given `num_attempts` groups. Raises UserError and GeneratorLostError where
    a worker raised one, and `error` where a worker raised anything else (a bug) or the whole cluster is gone.
    """
    causes = [_cause(failure) for failure in error.worker_failures.values()]
    for cause in causes:
        if isinstance(cause, UserError):
            raise cause from error
    if failed_jobs(jobs) - failed_before:
        return
    for cause in causes:
        if isinstance(cause, GeneratorLostError):
            raise cause from error
    deaths = [words for failure in error.worker_failures.values() if (words := _death(failure)) is not None]
    waiting = [job for job in jobs if not is_settled(job.stage_dir)]
    # Survivors of a death raise, too: a collective lost its partner. So one death among the causes explains them all.
    if not deaths or not waiting or not cluster_answers():
        raise error
    job = waiting[0]
    write_failure(job.stage_dir, _reason(deaths, num_attempts), label=job.name, seed=job.seed)


def _reason(deaths: list[str], num_attempts: int) -> str:
    if any("memory" in words.lower() for words in deaths):
        return (
            f"its training workers were killed {num_attempts} times because their node ran out of memory "
            f"({deaths[0]}); lower training.micro_batch_tokens (training.micro_batch_size of on-policy methods), set "
            "training.lora, training.activation_checkpointing or resources.sharding: fsdp, or use larger nodes"
        )
    return (
        f"its training workers died {num_attempts} times, more often than resources.max_failures allows "
        f"({deaths[0]}); see the workers' logs in Ray's dashboard"
    )


def _cause(failure: Exception) -> BaseException:
    """Return the error that a worker raised, without Ray Train's wrapping."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    return failure._base_exc if isinstance(failure, UserExceptionWithTraceback) else failure


def _death(failure: Exception) -> str | None:
    """Ray's words for a worker's death; None where the worker did not die but raised."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    if isinstance(failure, WorkerHealthCheckTimeoutError):
        return in_one_line(failure)
    if isinstance(failure, WorkerHealthCheckFailedError):
        return in_one_line(failure.health_check_failure)
    return in_one_line(failure) if isinstance(failure, RayError) else None
