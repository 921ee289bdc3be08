"""When a job has ended nothing of its model is in memory, although nothing collects garbage by chance."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from off_policy import off_policy_job, write_inputs
from on_policy import LocalGenerator, make_job
from torch import Tensor, nn

from prefarena.config import MPO, LoRA, Optimisation, PPOTraining, RewardModel
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.stages import failure_of
from prefarena.training import on_policy
from prefarena.training.jobs import Job, RewardModelJob
from prefarena.training.run_job import run_job
from prefarena.training.sharding import is_sharded
from prefarena.training.worker import Worker

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"activation_checkpointing": True},
    "lora recomputed": {"lora": LoRA(rank=4), "activation_checkpointing": True},
}
PPO = PPOTraining(num_iterations=2, rollouts_per_iteration=6, num_minibatches=1, micro_batch_size=6)


def tensors() -> dict[int, Tensor]:
    """All that Python holds in this process, by identity."""
    return {id(each): each for each in gc.get_objects() if issubclass(type(each), Tensor)}


class Watching(Worker):
    """Keeps, at the first row that a job logs, weak references to its parameters and all other tensors made for it."""

    def __init__(self, stage_dir: str, one_part: bool = False) -> None:
        super().__init__(stage_dir)
        self.one_part, self.sharded, self.num_parameters = one_part, False, 0
        self.before = set(tensors())
        self.seen: list[weakref.ref[Tensor]] = []

    @property
    def shards(self) -> bool:
        """Also where it is alone, and its part is all of a model."""
        return self.one_part

    def distribute(self, module: nn.Module, precision: Arithmetic) -> nn.Module:
        trained = super().distribute(module, precision)
        self.sharded = is_sharded(trained)
        return self.watch(trained)

    def wrap(self, module: nn.Module) -> nn.Module:
        return self.watch(super().wrap(module))

    def watch(self, module: nn.Module) -> nn.Module:
        self.num_parameters += len(list(module.parameters()))
        return module

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if not self.seen:
            self.seen = [weakref.ref(tensor) for key, tensor in tensors().items() if key not in self.before]

    def left(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that are still alive, but for whole numbers: torch keeps the ranks of a mesh."""
        alive = [tensor for reference in self.seen if (tensor := reference()) is not None]
        return [tuple(tensor.shape) for tensor in alive if tensor.is_floating_point()]


class Exhausted(Watching):
    """Has no memory left after its first row."""

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        raise MemoryError


@pytest.fixture(autouse=True)
def no_collection_by_chance() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def one_gloo_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def training(variant: str) -> Optimisation:
    common = Optimisation(num_steps=3, batch_size=16, micro_batch_tokens=64, log_every=1, checkpoint_every=2)
    return common.model_copy(update=VARIANTS[variant])


def preference_job(inputs: Path, folder: Path, variant: str) -> Job:
    return off_policy_job(inputs, folder / "mpo", MPO(demonstration_weight=0.1, training=training(variant)))


def reward_model_job(inputs: Path, folder: Path, variant: str) -> Job:
    return RewardModelJob(
        stage_dir=str(folder / "rm"), name="rm", policy=str(inputs / "model"), seed=0,
        settings=RewardModel(training=training(variant)), pairs=str(inputs / "pairs"),
        test_pairs=str(inputs / "pairs"), samples=str(inputs / "demonstrations"),
    )  # fmt: skip


def check_nothing_left(worker: Watching) -> None:
    assert len(worker.seen) > worker.num_parameters > 20  # gradients or moments beside the weights
    assert worker.left() == []


@pytest.mark.parametrize("make", [preference_job, reward_model_job])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_job_leaves_nothing_of_its_model(inputs: Path, tmp_path: Path, variant: str, make: Any) -> None:
    job = make(inputs, tmp_path, variant)
    worker = Watching(job.stage_dir)
    run_job(job, worker)
    check_nothing_left(worker)


@pytest.mark.parametrize("make", [preference_job, reward_model_job])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sharded_job_leaves_nothing_of_its_model(
    inputs: Path, tmp_path: Path, one_gloo_rank: None, variant: str, make: Any
) -> None:
    job = make(inputs, tmp_path, variant)
    worker = Watching(job.stage_dir, one_part=True)
    run_job(job, worker)
    assert worker.sharded
    check_nothing_left(worker)


def test_a_job_that_had_too_little_memory_leaves_nothing_of_its_model(inputs: Path, tmp_path: Path) -> None:
    job = preference_job(inputs, tmp_path, "recomputed")
    worker = Exhausted(job.stage_dir)
    run_job(job, worker)
    assert "ran out of memory" in str(failure_of(job.stage_dir))
    check_nothing_left(worker)


def test_an_on_policy_job_leaves_nothing_of_its_models(
    tmp_path: Path, tiny_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, tiny_policy, PPO)
    source = LocalGenerator(job.policy)  # before the worker, which counts what is made after it
    monkeypatch.setattr(on_policy, "_connect", lambda job: source)
    worker = Watching(job.stage_dir)
    run_job(job, worker)
    check_nothing_left(worker)
