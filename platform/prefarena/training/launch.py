"""Ray Train runs: a group of jobs on one group of workers, one after another.

Starting a worker group costs tens of seconds on a laptop, more than many of our jobs; so jobs that ask for the
same resources share one. The group restarts from its last checkpoint after a failure, skips the jobs whose stage
is finished, and goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from prefarena.config import Resources
from prefarena.errors import WaitTimeoutError
from prefarena.stages import is_finished
from prefarena.training.jobs import Job

#: A group that could not be placed, or lost a worker while it started, is tried once more.
_START_ATTEMPTS = 2


def run_jobs(jobs: Sequence[Job], resources: Resources, storage: str) -> None:
    """Run every unfinished job on Ray Train workers; returns when all their stages are finished.

    The same jobs in the same storage are the same Ray Train run, so calling this again after an interruption
    resumes from the last checkpoint. Raises what a worker raised, and WaitTimeoutError where the workers could not be
    placed within `resources.start_timeout_s`.
    """
    if all(is_finished(job.stage_dir) for job in jobs):
        return
    # ray.train re-exports these; named where they live, so that they can be type-checked.
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    trainer = _trainer(jobs, resources, storage)
    # Ray Train hands its variables from here to its controller, which reads this one for each attempt.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(resources.start_timeout_s / _START_ATTEMPTS)
    try:
        trainer.fit()
    except ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        each = ", ".join(f"{amount:g} {kind}" for kind, amount in _per_worker(resources).items()) + " each"
        each += "".join(f", {label}: {wanted}" for label, wanted in resources.labels)
        raise WaitTimeoutError(
            f"waited {resources.start_timeout_s:g} s for a group of {resources.num_workers} training workers "
            f"({each}) to be placed; resources.start_timeout_s sets the limit"
        ) from error


def _trainer(jobs: Sequence[Job], resources: Resources, storage: str) -> Any:
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    digest = hashlib.sha256("\n".join(job.stage_dir for job in jobs).encode()).hexdigest()[:12]
    return TorchTrainer(
        _worker_loop,
        train_loop_config={"jobs": list(jobs), "num_threads": int(resources.cpus_per_worker)},
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=_per_worker(resources),
            label_selector=dict(resources.labels) or None,
        ),
        run_config=RunConfig(
            name=f"jobs-{digest}",
            storage_path=storage,
            failure_config=FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=_START_ATTEMPTS - 1
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _per_worker(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if resources.use_gpu else {})


def _worker_loop(config: dict[str, Any]) -> None:
    """Runs on every worker."""
    from prefarena.training.run_job import run_job
    from prefarena.training.worker import RayTrainWorker

    torch.set_num_threads(max(1, config["num_threads"]))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for job in config["jobs"]:
        if not is_finished(job.stage_dir):
            run_job(job, RayTrainWorker(job.stage_dir))
