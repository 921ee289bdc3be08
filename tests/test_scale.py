"""Several workers, whole or sharded, adapters and recomputation: what a run computes stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from off_policy import metric_rows, off_policy_job, write_inputs

from prefarena.config import MPO, LoRA, Optimisation, RewardModel
from prefarena.training.jobs import Job, RewardModelJob
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

NUM_STEPS = 50
#: Micro-batches small enough that every step has several.
TRAINING = Optimisation(num_steps=NUM_STEPS, batch_size=16, micro_batch_tokens=48, log_every=1, checkpoint_every=20)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": LoRA(rank=4), "learning_rate": 1e-2},
    "recomputed": {"activation_checkpointing": True},
    "lora recomputed": {"lora": LoRA(rank=4), "learning_rate": 1e-2, "activation_checkpointing": True},
}
Sharding = Literal["none", "fsdp"]


class OneOfMany(Worker):
    """A worker beside others, without Ray."""

    def __init__(self, stage_dir: str, rank: int, world_size: int, sharding: Sharding) -> None:
        self.rank, self.world_size, self.sharding = rank, world_size, sharding
        super().__init__(stage_dir)


class KilledError(RuntimeError):
    pass


class DyingWorker(OneOfMany):
    """Dies at a step, when its last checkpoint is written."""

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if row["step"] == 30:
            self.flush()
            raise KilledError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def variant_job(inputs: Path, folder: Path, variant: str) -> Job:
    training = TRAINING.model_copy(update=VARIANTS[variant])
    return off_policy_job(inputs, folder / variant, MPO(demonstration_weight=0.1, training=training))


def reward_model_job(inputs: Path, folder: Path) -> RewardModelJob:
    training = TRAINING.model_copy(update={"lora": LoRA(rank=4), "num_steps": 8})
    return RewardModelJob(
        stage_dir=str(folder), name="rm", policy=str(inputs / "model"), seed=0, settings=RewardModel(training=training),
        pairs=str(inputs / "pairs"), test_pairs=str(inputs / "pairs"), samples=str(inputs / "demonstrations"),
    )  # fmt: skip


def run_everything(inputs: Path, root: Path, worker: Callable[[str], Worker]) -> None:
    for variant in VARIANTS:
        job = variant_job(inputs, root, variant)
        run_job(job, worker(job.stage_dir))
    job = reward_model_job(inputs, root / "rm")
    run_job(job, worker(job.stage_dir))


def run_as_one_of_two(rank: int, inputs: Path, root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    shardings: tuple[Sharding, ...] = ("none", "fsdp")
    for sharding in shardings:
        run_everything(inputs, root / sharding, partial(OneOfMany, rank=rank, world_size=2, sharding=sharding))
    for variant in ("plain", "lora"):
        broken = variant_job(inputs, root / "broken", variant)
        with pytest.raises(KilledError):
            run_job(broken, DyingWorker(broken.stage_dir, rank, 2, "fsdp"))
        run_job(broken, OneOfMany(broken.stage_dir, rank, 2, "fsdp"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/, none/ (two workers with whole copies), fsdp/ and broken/, each with all variants."""
    root = tmp_path_factory.mktemp("runs")
    torch.multiprocessing.spawn(run_as_one_of_two, args=(inputs, root), nprocs=2)
    run_everything(inputs, root / "one", Worker)
    return root


def column(folder: Path, name: str) -> list[float]:
    return [row[name] for row in metric_rows(folder)]


@pytest.mark.parametrize("workers", ["none", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_workers_have_the_losses_of_one(runs: Path, variant: str, workers: str) -> None:
    for name in ("loss", "grad_norm"):
        one, two = (column(runs / where / variant, name) for where in ("one", workers))
        assert (len(one) == NUM_STEPS and one[-1] < one[0] - 0.05) or name == "grad_norm"
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("workers", ["one", "none", "fsdp"])
@pytest.mark.parametrize("variant", ["plain", "lora"])
def test_recomputed_layers_change_nothing(runs: Path, variant: str, workers: str) -> None:
    kept, recomputed = (
        column(runs / workers / name, "grad_norm") for name in (variant, f"{variant} recomputed".removeprefix("plain "))
    )
    np.testing.assert_allclose(recomputed, kept, rtol=1e-6)
