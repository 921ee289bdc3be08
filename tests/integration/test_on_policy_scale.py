"""PPO and GRPO on several workers, whole or sharded, with adapters and recomputation: what they compute stays."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_policy import SharedGenerator, make_job, metric_rows
from peft import PeftModel
from workers import DyingWorker, KilledError, OneOfMany, Sharding

from prefarena.config import GRPOTraining, LoRA, PPOTraining
from prefarena.modeling.load import load_policy
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import train_on_policy
from prefarena.training.worker import Worker

NUM_ITERATIONS = 20
#: 25 rollouts in minibatches of 12 and 13: no number of workers gets equal parts, nor equal numbers of micro-batches.
COMMON: dict[str, Any] = {
    "num_iterations": NUM_ITERATIONS, "num_epochs": 1, "num_minibatches": 2, "micro_batch_size": 3,
    "checkpoint_every": 4, "warmup_iterations": 0,
}  # fmt: skip
METHODS = {
    "ppo": PPOTraining(**COMMON, rollouts_per_iteration=25, kl_coef=0.05, learning_rate=3e-4),
    "grpo": GRPOTraining(**COMMON, rollouts_per_iteration=25, group_size=5, learning_rate=3e-4),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": LoRA(rank=4), "learning_rate": 1e-3},
    "recomputed": {"activation_checkpointing": True},
    "lora recomputed": {"lora": LoRA(rank=4), "learning_rate": 1e-3, "activation_checkpointing": True},
}
LAYOUTS: tuple[tuple[int, Sharding], ...] = ((2, "none"), (2, "fsdp"), (4, "none"), (4, "fsdp"))
#: What four workers do as well: each kind of body, trained whole and by adapters, with a critic and without.
BY_FOUR = (("ppo", "plain"), ("ppo", "lora recomputed"), ("grpo", "lora"))
CASES = [
    pytest.param(
        method,
        variant,
        f"{number} {sharding}",
        marks=[pytest.mark.long] if number > 2 or variant.endswith("recomputed") else [],
    )
    for number, sharding in LAYOUTS
    for method in METHODS
    for variant in VARIANTS
    if number < 4 or (method, variant) in BY_FOUR
]
ALONE = [pytest.param(method, "lora", "1 none") for method in METHODS]


Jobs = dict[tuple[str, str], OnPolicyJob]


def make_jobs(root: Path, policy: str) -> Jobs:
    """By method and variant, each in a folder of its own."""
    return {
        (method, variant): make_job(root / method / variant, policy, training.model_copy(update=changes))
        for method, training in METHODS.items()
        for variant, changes in VARIANTS.items()
    }


def run_as_one_of(rank: int, jobs: Jobs, root: Path, world_size: int, sharding: Sharding) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        rendezvous = f"file://{root}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    for job in jobs.values():
        worker = OneOfMany(job.stage_dir, rank, world_size, sharding)
        train_on_policy(job, worker, SharedGenerator(job.policy, Path(job.stage_dir).parent, worker))
    if world_size > 1:
        torch.distributed.destroy_process_group()


class Runs:
    """All methods, done by each layout of workers when it is first asked for: with recomputation, or without."""

    def __init__(self, folders: pytest.TempPathFactory, policy: str) -> None:
        self._folders, self._policy = folders, policy
        self._done: dict[tuple[str, bool], Jobs] = {}

    def job(self, method: str, variant: str, layout: str) -> OnPolicyJob:
        """One that has ended, with others of its layout."""
        recomputes = variant.endswith("recomputed")
        if (layout, recomputes) not in self._done:
            number, sharding = int(layout.split()[0]), layout.split()[1]
            root = self._folders.mktemp(f"{layout} {recomputes}".replace(" ", "-"))
            jobs = {
                which: job
                for which, job in make_jobs(root, self._policy).items()
                if which[1].endswith("recomputed") == recomputes and (number < 4 or which in BY_FOUR)
            }
            self._done[layout, recomputes] = jobs
            if number == 1:
                run_as_one_of(0, jobs, root, 1, "none")
            else:
                torch.multiprocessing.spawn(run_as_one_of, (jobs, root, number, sharding), nprocs=number)
        return self._done[layout, recomputes][method, variant]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_policy: str) -> Runs:
    return Runs(tmp_path_factory, tiny_policy)


@pytest.mark.parametrize(("method", "variant", "layout"), CASES)
def test_many_workers_have_the_losses_of_one(runs: Runs, method: str, variant: str, layout: str) -> None:
    one, many = (metric_rows(runs.job(method, variant, name)) for name in ("1 none", layout))
    assert len(one) == len(many) == NUM_ITERATIONS
    for name in ("policy/loss", "kl/k3", "reward/mean", *(["value/loss"] if method == "ppo" else [])):
        np.testing.assert_allclose(column(many, name), column(one, name), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("method", "variant", "layout"), [*CASES, *ALONE])
def test_the_generator_has_the_weights_that_the_trainer_has(runs: Runs, method: str, variant: str, layout: str) -> None:
    """Gathered, and with adapters merged: the rollouts' own log-probs are those that the trainer computes."""
    rows = metric_rows(runs.job(method, variant, layout))
    assert max(column(rows, "logp_gap/max")) < 1e-5
    assert rows[-1]["kl/k3"] > 1e-3  # so that the reference's weights would not do


@pytest.mark.parametrize(("method", "variant", "layout"), CASES)
def test_the_saved_policy_is_that_of_one_worker(runs: Runs, method: str, variant: str, layout: str) -> None:
    job = runs.job(method, variant, layout)
    one, many = (load_policy(runs.job(method, variant, name).model_dir).state_dict() for name in ("1 none", layout))
    start = load_policy(job.policy).state_dict()
    assert one.keys() == many.keys() == start.keys()  # no trace of adapters
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0, atol=1e-4)
    moved = {name for name, value in many.items() if not torch.equal(value, start[name])}
    assert moved == ({name for name in start if "_proj" in name} if "lora" in variant else set(start))
    if "lora" in variant:
        adapted = PeftModel.from_pretrained(load_policy(job.policy), str(Path(job.stage_dir) / "adapter"))
        for name, value in adapted.merge_and_unload().state_dict().items():
            torch.testing.assert_close(many[name], value, rtol=0, atol=1e-6)


class DiesLate(DyingWorker):
    dies_at = 10


#: How many sharded workers a run begins with that is killed, and how many go on.
MOVES = ((2, 1), (2, 4), (4, 2))


def run_killed_or_resumed(rank: int, jobs: dict[str, OnPolicyJob], root: Path, number: int, dies: bool) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{root}/rendezvous-{number}-{dies}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=number)
    for job in jobs.values():
        kind = DiesLate if dies else OneOfMany
        worker = kind(job.stage_dir, rank, number, "fsdp")
        source = SharedGenerator(job.policy, Path(job.stage_dir).parent, worker)
        with pytest.raises(KilledError) if dies else nullcontext():
            train_on_policy(job, worker, source)
    torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_sharded_run_that_was_killed_goes_on_with_other_workers(
    runs: Runs, tmp_path: Path, tiny_policy: str, before: int, after: int
) -> None:
    """Weights and moments of policy and critic are cut anew: the losses stay those of one worker."""
    all_jobs = make_jobs(tmp_path, tiny_policy)
    jobs = {variant: all_jobs["ppo", variant] for variant in ("plain", "lora recomputed")}
    for number, dies in ((before, True), (after, False)):
        torch.multiprocessing.spawn(run_killed_or_resumed, (jobs, tmp_path, number, dies), nprocs=number)
    for variant, job in jobs.items():
        (fault,) = Worker(job.stage_dir).stage_log.faults()
        assert fault["kind"] == "resumed" and fault["step"] == 8
        one, many = metric_rows(runs.job("ppo", variant, "1 none")), metric_rows(job)
        assert len(one) == len(many) == NUM_ITERATIONS
        for name in ("policy/loss", "value/loss", "kl/k3"):
            np.testing.assert_allclose(column(many, name), column(one, name), rtol=0, atol=1e-5, err_msg=name)


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]
