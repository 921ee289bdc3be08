"""PPO end to end on a tiny model, with a generator of the same interface that runs in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_policy import (
    LikedCount,
    LocalGenerator,
    SharedGenerator,
    make_job,
    metric_rows,
    syncs,
    timeless,
    train_until_killed,
)
from torch import Tensor
from workers import OneOfMany

from prefarena.config import PPOTraining
from prefarena.errors import UserError
from prefarena.generation.interface import Sampling, StaleWeightsError
from prefarena.modeling.load import load_policy
from prefarena.records import Rollout
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import train_on_policy
from prefarena.training.rollouts import minibatches, prompt_indices, share
from prefarena.training.worker import Worker

SETTINGS = PPOTraining(
    num_iterations=8, rollouts_per_iteration=48, num_minibatches=3, micro_batch_size=10, kl_coef=0.05,
    target_kl=0.5, kl_horizon=200, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, tiny_policy: str) -> OnPolicyJob:
    return make_job(tmp_path, tiny_policy, SETTINGS)


def test_the_reward_rises_and_every_metric_is_there(job: OnPolicyJob) -> None:
    source = LocalGenerator(job.policy)
    judges = {"reward": LikedCount(), "monitor": LikedCount()}
    costs = train_on_policy(job, Worker(job.stage_dir), source, **judges)["costs"]
    rows = metric_rows(job)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.5
    assert rows[0]["kl/k1"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl/k3"] > 0.05
    assert max(row["logp_gap/max"] for row in rows) < 1e-4
    assert min(row["importance/ess"] for row in rows) > 0.999
    assert rows[-1]["kl/coef"] != rows[0]["kl/coef"]
    assert costs["num_tokens_trained"] == rows[-1]["num_tokens_trained"] > 2 * costs["num_tokens_generated"]
    expected = {
        "reward/mean", "reward/judge", "reward/penalised", "kl/k1", "kl/k3", "kl/k1_stderr", "kl/k3_stderr", "kl/coef",
        "entropy", "policy/loss", "policy/clip_fraction", "policy/update_kl", "value/loss", "value/clip_fraction",
        "value/explained_variance", "importance/ess", "importance/capped", "logp_gap/mean", "logp_gap/max",
        "response_length", "truncation_rate", "staleness", "learning_rate", "grad_norm", "critic_grad_norm",
        "time/generate", "time/score", "time/logprobs", "time/values", "time/update", "time/sync",
        "tokens_per_second", "steps_skipped", "num_tokens_generated", "num_tokens_trained", "step", "num_steps",
        "num_rewards", "num_flops",
    }  # fmt: skip
    assert rows[0].keys() == expected
    trained = load_policy(job.model_dir)
    assert source.version == "rlhf@7" and source.num_syncs == 8
    initial = load_policy(job.policy).state_dict()
    assert all(not torch.equal(tensor, initial[name]) for name, tensor in trained.state_dict().items())


def test_an_interrupted_run_ends_in_the_same_weights_bit_for_bit(job: OnPolicyJob, tmp_path: Path) -> None:
    job = replace(job, training=job.training.model_copy(update={"num_iterations": 5}))
    train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy))

    class Dying(LocalGenerator):
        def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
            if version == "rlhf@3":
                raise ConnectionError("killed")
            super().sync(named_tensors, version)

    again = replace(job, stage_dir=str(tmp_path / "interrupted"))
    train_until_killed(again, Dying(job.policy))
    train_on_policy(again, Worker(again.stage_dir), LocalGenerator(job.policy))
    whole, resumed = load_policy(job.model_dir).state_dict(), load_policy(again.model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert timeless(job) == timeless(again)


class Forgetful(SharedGenerator):
    """Has lost its weights when `forgets` of the workers first ask for rollouts of a version."""

    def __init__(self, policy: str, folder: Path, worker: Worker, version: str, forgets: tuple[int, ...]) -> None:
        super().__init__(policy, folder, worker)
        self.forgotten = version if worker.rank in forgets else None

    def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        if version == self.forgotten:
            self.forgotten = None
            raise StaleWeightsError("it was restarted")
        return super()._sample(prompts, sampling, version)


#: Jobs that two workers do: the mode, and which of them find that the generator has lost the weights of iteration 1.
TOGETHER: dict[str, tuple[str, tuple[int, ...]]] = {
    "undisturbed": ("synchronous", ()),
    "one": ("synchronous", (1,)),
    "both": ("synchronous", (0, 1)),
    "one ahead": ("asynchronous", (1,)),
    "both ahead": ("asynchronous", (0, 1)),
}


def job_in(folder: Path, policy: str, mode: str = "synchronous") -> OnPolicyJob:
    num_iterations = 2 if mode == "synchronous" else 3  # after two, rounding shows in the fourth digit
    changes = {"num_iterations": num_iterations, "rollouts_per_iteration": 51, "mode": mode}
    return make_job(folder, policy, SETTINGS.model_copy(update=changes))


def run_as_one_of_two(rank: int, jobs: dict[str, OnPolicyJob], root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    for name, job in jobs.items():
        worker = OneOfMany(job.stage_dir, rank, 2)
        source = Forgetful(job.policy, root / name, worker, "rlhf@1", TOGETHER[name][1])
        train_on_policy(job, worker, source, reward=LikedCount())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_policy: str) -> dict[str, OnPolicyJob]:
    """The jobs of `TOGETHER`, done by two workers that share a generator."""
    root = tmp_path_factory.mktemp("together")
    jobs = {name: job_in(root / name, tiny_policy, mode) for name, (mode, _) in TOGETHER.items()}
    torch.multiprocessing.spawn(run_as_one_of_two, args=(jobs, root), nprocs=2)
    return jobs


def test_two_workers_do_what_one_does(together: dict[str, OnPolicyJob], tiny_policy: str, tmp_path: Path) -> None:
    job = job_in(tmp_path, tiny_policy)
    train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    for alone, shared in zip(timeless(job), timeless(together["undisturbed"]), strict=True):
        assert alone.keys() == shared.keys()
        for name in alone:
            assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("name", TOGETHER)
def test_one_worker_alone_gives_restarted_generators_their_weights(together: dict[str, OnPolicyJob], name: str) -> None:
    # Ahead, the rollouts of weights 1 are missed when the policy is that of iteration 2 already.
    given = [(0, f"rlhf@{iteration}") for iteration in range(together[name].training.num_iterations)]
    given += given[-1:] if name != "undisturbed" else []
    assert syncs(Path(together[name].stage_dir).parent) == given
    if "ahead" not in name:
        assert timeless(together[name]) == timeless(together["undisturbed"])


def test_generators_that_lose_their_weights_again_and_again_end_the_job(job: OnPolicyJob) -> None:
    class Hopeless(LocalGenerator):
        def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
            raise StaleWeightsError("it was restarted")

    source = Hopeless(job.policy)
    with pytest.raises(StaleWeightsError, match="lost the weights 'rlhf@0' 4 times"):
        train_on_policy(job, Worker(job.stage_dir), source, reward=LikedCount())
    assert source.num_syncs == 4


def test_a_generator_that_lost_its_weights_is_given_them_again(job: OnPolicyJob) -> None:
    class Restarted(LocalGenerator):
        def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
            if version == "rlhf@1" and self.num_syncs == 2:
                self.version = None
            return super()._sample(prompts, sampling, version)

    job = replace(job, training=job.training.model_copy(update={"num_iterations": 2}))
    source = Restarted(job.policy)
    train_on_policy(job, Worker(job.stage_dir), source, reward=LikedCount())
    assert source.num_syncs == 3 and source.version == "rlhf@1"


def test_too_few_rollouts_to_share_is_one_clear_sentence(job: OnPolicyJob) -> None:
    job = replace(job, training=job.training.model_copy(update={"rollouts_per_iteration": 2}))
    with pytest.raises(UserError, match="rollouts_per_iteration 2 is fewer than one rollout for each of 3"):
        train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy))


def test_prompts_are_used_equally_often_and_shared_without_overlap() -> None:
    stretch = [index for iteration in range(6) for index in prompt_indices(10, 5, iteration, seed=3)]
    assert sorted(stretch) == sorted(list(range(10)) * 3)
    assert stretch[:10] != stretch[10:20]
    assert prompt_indices(3, 7, 4, seed=3) == prompt_indices(3, 7, 4, seed=3)
    for world_size in (1, 2, 3):
        rows = [row for rank in range(world_size) for row in range(50)[share(50, rank, world_size)]]
        assert rows == list(range(50))
    parts = minibatches(50, 4, seed=0, iteration=2, epoch=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(50)) and {len(part) for part in parts} == {12, 13}
