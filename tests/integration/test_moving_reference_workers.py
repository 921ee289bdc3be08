"""A reference that moves, and REINFORCE++: two workers, with whole copies or sharded, compute what one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_policy import SharedGenerator, make_job, metric_rows
from workers import DyingWorker, KilledError, OneOfMany, Sharding

from prefarena.config import GRPOTraining, LoRA, OnPolicyTraining, PPOTraining
from prefarena.methods.on_policy.reinforce_pp import ReinforcePPTraining
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import train_on_policy

NUM_ITERATIONS = 4
#: 15 rollouts in minibatches of 7 and 8: workers get parts of different sizes.
COMMON: dict[str, Any] = {
    "num_iterations": NUM_ITERATIONS, "num_epochs": 1, "num_minibatches": 2, "micro_batch_size": 3,
    "rollouts_per_iteration": 15, "checkpoint_every": 2, "warmup_iterations": 0, "kl_coef": 0.3,
}  # fmt: skip
AVERAGE: dict[str, Any] = {"reference_every": 1, "reference_mix": 0.2}
TRAININGS: dict[str, OnPolicyTraining] = {
    "average": GRPOTraining(**COMMON, group_size=5, **AVERAGE),
    "average in halves": GRPOTraining(**COMMON, group_size=5, precision="bfloat16", learning_rate=1e-4, **AVERAGE),
    "adapters": PPOTraining(**COMMON, lora=LoRA(rank=4), learning_rate=3e-3, reference_every=2),
    "reinforce_pp": ReinforcePPTraining(**COMMON),
    "reinforce_pp groups": ReinforcePPTraining(**COMMON, group_size=5, kl_in="loss"),
}
Case = tuple[Sharding, str]
EVERY: list[Case] = [(sharding, name) for sharding in ("none", "fsdp") for name in TRAININGS]  # type: ignore[misc]
SOME: list[Case] = [("fsdp", "average")]
#: Sharded trainings that are killed, too.
KILLED = ("average", "adapters")


class DiesSoon(DyingWorker):
    dies_at = 3


def job_of(root: Path, policy: str, name: str) -> OnPolicyJob:
    return make_job(root / name, policy, TRAININGS[name])


def run(job: OnPolicyJob, worker: OneOfMany) -> None:
    train_on_policy(job, worker, SharedGenerator(job.policy, Path(job.stage_dir).parent, worker))


def killed(job: OnPolicyJob) -> OnPolicyJob:
    return replace(job, stage_dir=f"{job.stage_dir}-killed")


def run_as_one_of_two(rank: int, jobs: dict[Case, OnPolicyJob], root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    for (sharding, name), job in jobs.items():
        run(job, OneOfMany(job.stage_dir, rank, 2, sharding))
        if sharding == "fsdp" and name in KILLED:
            with pytest.raises(KilledError):
                run(killed(job), DiesSoon(killed(job).stage_dir, rank, 2, sharding))
            run(killed(job), OneOfMany(killed(job).stage_dir, rank, 2, sharding))
    torch.distributed.destroy_process_group()


def column(job: OnPolicyJob, name: str) -> list[float]:
    return [row[name] for row in metric_rows(job)]


@pytest.mark.parametrize("cases", [SOME, pytest.param(EVERY, marks=pytest.mark.long)], ids=["some", "every"])
def test_two_workers_have_the_losses_of_one(tmp_path: Path, tiny_policy: str, cases: list[Case]) -> None:
    jobs = {(sharding, name): job_of(tmp_path / sharding, tiny_policy, name) for sharding, name in cases}
    torch.multiprocessing.spawn(run_as_one_of_two, (jobs, tmp_path), nprocs=2)
    alone = {name: job_of(tmp_path / "alone", tiny_policy, name) for _, name in cases}
    for job in alone.values():
        run(job, OneOfMany(job.stage_dir))
    for (sharding, name), job in jobs.items():
        kl = "kl" if job.training.reference_every is None else "kl_moving"
        close = 1e-3 if job.training.precision == "bfloat16" else 1e-5
        for key in ("policy/loss", f"{kl}/k3", "reward/mean"):
            found, expected = column(job, key), column(alone[name], key)
            assert len(found) == NUM_ITERATIONS
            np.testing.assert_allclose(found, expected, rtol=0, atol=close, err_msg=f"{name} {sharding} {key}")
            if sharding == "fsdp" and name in KILLED:
                assert column(killed(job), key) == found
        assert max(column(alone[name], f"{kl}/k3")) > 1e-4
