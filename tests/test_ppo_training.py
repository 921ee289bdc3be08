"""PPO end to end on a tiny model, with a generator of the same interface that runs in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_policy import LikedCount, LocalGenerator, make_job, metric_rows, timeless
from torch import Tensor

from prefarena.config import PPOTraining
from prefarena.errors import UserError
from prefarena.generation.interface import Sampling
from prefarena.modeling.load import load_policy
from prefarena.records import Rollout
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import train_on_policy
from prefarena.training.rollouts import minibatches, prompt_indices, share
from prefarena.training.worker import Worker


@pytest.fixture
def job(tmp_path: Path, tiny_policy: str) -> OnPolicyJob:
    settings = PPOTraining(
        num_iterations=8, rollouts_per_iteration=48, num_minibatches=3, micro_batch_size=10, kl_coef=0.05,
        target_kl=0.5, kl_horizon=200, checkpoint_every=2,
    )  # fmt: skip
    return make_job(tmp_path, tiny_policy, settings)


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
    with pytest.raises(ConnectionError):
        train_on_policy(again, Worker(again.stage_dir), Dying(job.policy))
    train_on_policy(again, Worker(again.stage_dir), LocalGenerator(job.policy))
    whole, resumed = load_policy(job.model_dir).state_dict(), load_policy(again.model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert timeless(job) == timeless(again)


class GlooWorker(Worker):
    """One of several workers in processes that the test started."""

    world_size = 2

    def __init__(self, stage_dir: str, rank: int) -> None:
        self.rank = rank
        super().__init__(stage_dir)


def run_as_one_of_two(rank: int, job: OnPolicyJob, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    train_on_policy(job, GlooWorker(job.stage_dir, rank), LocalGenerator(job.policy), reward=LikedCount())
    torch.distributed.destroy_process_group()


def test_two_workers_do_what_one_does(job: OnPolicyJob, tmp_path: Path) -> None:
    job = replace(job, training=job.training.model_copy(update={"num_iterations": 2, "rollouts_per_iteration": 51}))
    train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    shared = replace(job, stage_dir=str(tmp_path / "shared"))
    torch.multiprocessing.spawn(run_as_one_of_two, args=(shared, str(tmp_path / "rendezvous")), nprocs=2)
    for alone, together in zip(timeless(job), timeless(shared), strict=True):
        assert alone.keys() == together.keys()
        for name in alone:
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_a_generator_that_lost_its_weights_is_given_them_again(job: OnPolicyJob) -> None:
    class Forgetful(LocalGenerator):
        def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
            if version == "rlhf@1" and self.num_syncs == 2:
                self.version = None
            return super()._sample(prompts, sampling, version)

    job = replace(job, training=job.training.model_copy(update={"num_iterations": 2}))
    source = Forgetful(job.policy)
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
