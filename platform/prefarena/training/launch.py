"""Ray Train runs: a group of jobs on one group of workers, one after another.

Starting a worker group costs tens of seconds on a laptop, more than many of our jobs; so jobs that ask for the
same resources share one. The group restarts after a failure, skips the jobs whose stage is finished or has failed,
and goes on from the last checkpoint of the one that it was at.

Ray Train places, starts, watches and restarts the workers. It does not keep their checkpoints (checkpoints.py does): it
forgets one that was reported but not yet noticed when a worker dies, and everything with its controller.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefarena import stores
from prefarena.config import Resources
from prefarena.errors import WaitTimeoutError
from prefarena.failures import is_death
from prefarena.mirror import mirror_of
from prefarena.stages import is_settled
from prefarena.training.group_failures import failed_jobs, settle
from prefarena.training.jobs import Job
from prefarena.training.reservations import free_reservations_of_the_dead

#: A group that could not be placed, or lost a worker while it started, is tried once more.
_START_ATTEMPTS = 2

_logger = logging.getLogger(__name__)


def run_jobs(jobs: Sequence[Job], resources: Resources, storage: str) -> None:
    """Run every job that is not settled on Ray Train workers; returns when all their stages are finished or failed.

    Called again after an interruption it goes on from the last checkpoint. When Ray Train's controller dies, or one of
    the actors without which it gives up, it is started again, at most `resources.max_failures` times, as it does itself
    with workers, and what the dead one has reserved is free. A job that cannot go on ends in a failed stage, and the
    others are run by a new group (`group_failures.settle`). Raises what a worker raised where that was a bug, UserError
    or GeneratorLostError where it was one, and WaitTimeoutError where the workers could not be placed within
    `resources.start_timeout_s`.
    """
    import ray.exceptions
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    num_failures = 0
    while any(not is_settled(job.stage_dir) for job in jobs):
        failed = failed_jobs(jobs)
        try:
            return _fit(jobs, resources, storage)
        except WorkerGroupError as error:
            settle(error, jobs, failed, num_attempts=resources.max_failures + 1)
        except (ray.exceptions.RayActorError, ControllerError) as error:
            if isinstance(error, ControllerError) and not is_death(error.controller_failure):
                raise
            free_reservations_of_the_dead()  # other trainings and engines may follow, even where this one is given up
            num_failures += 1
            if num_failures > resources.max_failures:
                raise
            _logger.warning("Ray Train's controller died and is being restarted: %s", error)


def _fit(jobs: Sequence[Job], resources: Resources, storage: str) -> None:
    """One Ray Train run, with a name of its own; its folder, which holds nothing that is needed, goes with it."""
    # ray.train re-exports these; named where they live, so that they can be type-checked.
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    name = f"jobs-{secrets.token_hex(6)}"
    trainer = _trainer(jobs, resources, storage, name)
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
    finally:
        shutil.rmtree(Path(storage) / name, ignore_errors=True)
        if (mirror := mirror_of(storage)) is not None:
            mirror.remove(Path(storage) / name)


def _trainer(jobs: Sequence[Job], resources: Resources, storage: str, name: str) -> Any:
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    mirror = mirror_of(storage)
    return TorchTrainer(
        _worker_loop,
        train_loop_config={
            "jobs": list(jobs),
            "num_threads": int(resources.cpus_per_worker),
            "storage_retry_s": resources.storage_retry_s,
            "sharding": resources.sharding,
            "num_groups": resources.num_groups,
            "share_of_device": resources.gpus_per_worker,
            "offloads": resources.cpu_offload,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=_per_worker(resources),
            label_selector=dict(resources.labels) or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage if mirror is None else stores.file_system(mirror.url_of(storage))[1],
            storage_filesystem=None if mirror is None else stores.arrow_file_system(mirror.url),
            failure_config=FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=_START_ATTEMPTS - 1
            ),
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
    # Garbage is collected after every job (Worker.drop_garbage). What was imported is none: left out, that takes
    # milliseconds and not a third of a second.
    gc.collect()
    gc.freeze()
    for job in config["jobs"]:
        worker = RayTrainWorker(
            job.stage_dir,
            config["storage_retry_s"],
            config["sharding"],
            config["num_groups"],
            config["share_of_device"],
            config["offloads"],
        )
        if not worker.share(is_settled(job.stage_dir)):  # rank 0 sees for all: shared storage may lag
            run_job(job, worker)
