"""GRPO, RLOO and PPO through the loop that they share: groups, critics, asynchrony, snapshots, interruptions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy import Done, LikedCount, LocalGenerator, make_job, metric_rows, timeless, train_until_killed
from torch import Tensor

from prefarena.config import GRPOTraining, LoRA, PPOTraining, RLOOTraining
from prefarena.generation.interface import Sampling, StaleWeightsError
from prefarena.methods.on_policy.reinforce_pp import ReinforcePPTraining
from prefarena.modeling.load import load_policy
from prefarena.records import Rollout
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import OnPolicyTrainer, train_on_policy
from prefarena.training.rollouts import StalenessError
from prefarena.training.saving import snapshot_steps
from prefarena.training.worker import Worker

SIZES: dict[str, Any] = {
    "num_iterations": 4, "rollouts_per_iteration": 48, "num_minibatches": 3, "kl_coef": 0.05, "checkpoint_every": 2
}  # fmt: skip
PPO = PPOTraining(**SIZES, target_kl=0.1, kl_horizon=200)
GRPO = GRPOTraining(**SIZES, group_size=6)
RLOO = RLOOTraining(**SIZES, group_size=6)
REINFORCE_PP = ReinforcePPTraining(**SIZES, group_size=6, kl_in="loss")


def final_weights(job: OnPolicyJob) -> dict[str, Tensor]:
    return dict(load_policy(job.model_dir).state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Dying:
    """A source that is lost when it is given the weights of an iteration."""

    source: Any
    last: str

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        if version == self.last:
            raise ConnectionError("killed")
        self.source.sync(named_tensors, version)

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Any:
        return self.source.submit(prompts, sampling, version)

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return self.submit(prompts, sampling, version).result()


@pytest.mark.parametrize(
    "training",
    [
        GRPO,
        GRPO.model_copy(update={"kl_in": "reward", "normalise_std": False, "loss_mean": "sequences"}),
        GRPO.model_copy(update={"kl_estimator": "k3"}),
        RLOO,
        REINFORCE_PP,
    ],
    ids=["grpo", "grpo-kl-in-reward", "grpo-k3", "rloo", "reinforce_pp"],
)
def test_group_methods_learn_without_a_critic(tmp_path: Path, tiny_policy: str, training: Any) -> None:
    job = make_job(tmp_path, tiny_policy, training.model_copy(update={"num_iterations": 6}))
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir), LocalGenerator(job.policy), LikedCount())
    assert trainer.learners.keys() == {"policy"} and trainer.scorers.critic is None
    assert not any(name.startswith("critic") for name in trainer.tensors())
    train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    rows = metric_rows(job)
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.3
    assert not any(name.startswith("value/") or name in ("critic_grad_norm", "time/values") for name in rows[0])
    assert {row["staleness"] for row in rows} == {0.0}


def test_the_rows_of_a_group_are_consecutive_samples_of_one_prompt(tmp_path: Path, tiny_policy: str) -> None:
    asked: list[list[list[int]]] = []

    class Watched(LocalGenerator):
        def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
            asked.append(prompts)
            return super().submit(prompts, sampling, version)

    job = make_job(tmp_path, tiny_policy, GRPO.model_copy(update={"num_iterations": 1}))
    train_on_policy(job, Worker(job.stage_dir), Watched(job.policy), reward=LikedCount())
    groups = [asked[0][start : start + 6] for start in range(0, 48, 6)]
    assert len(groups) == 8 and all(prompt == group[0] for group in groups for prompt in group)
    assert len({tuple(group[0]) for group in groups}) == 6  # all covered prompts


def test_the_critic_warms_up_while_the_policy_stands_still(tmp_path: Path, tiny_policy: str) -> None:
    training = PPO.model_copy(update={"critic_warmup_iterations": 2, "schedule": "linear", "warmup_iterations": 0})
    job = make_job(tmp_path, tiny_policy, training)
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir), LocalGenerator(job.policy), LikedCount())
    policy, critic = load_policy(job.policy).state_dict(), trainer.learners["critic"].module
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    rows = [trainer.run(iteration) for iteration in range(2)]
    assert equal(dict(trainer.models.policy.model.state_dict()), dict(policy))
    assert all(not torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert [row["learning_rate"] for row in rows] == [0.0, 0.0] and rows[1]["kl/coef"] == training.kl_coef
    third = trainer.run(2)
    assert not equal(dict(trainer.models.policy.model.state_dict()), dict(policy))
    assert third["learning_rate"] == training.learning_rate  # the policy's schedule begins here
    assert trainer.run(3)["learning_rate"] == training.learning_rate / 2


def test_without_a_reward_model_the_critic_starts_at_zero(tmp_path: Path, tiny_policy: str) -> None:
    job = replace(make_job(tmp_path, tiny_policy, PPO), critic=None)
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir), LocalGenerator(job.policy), LikedCount())
    row = trainer.run(0)
    assert row["value/explained_variance"] == 0 and row["critic_grad_norm"] > 0


def test_asynchronous_rollouts_are_one_update_old_and_weighted(tmp_path: Path, tiny_policy: str) -> None:
    training = PPO.model_copy(update={"mode": "asynchronous", "num_iterations": 6})
    job = make_job(tmp_path, tiny_policy, training)
    train_until_killed(job, Dying(LocalGenerator(job.policy), "rlhf@3"), reward=LikedCount())
    train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    rows = metric_rows(job)
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1, 1, 1]  # it was killed after the checkpoint at 2
    for row in rows:
        assert (row["importance/ess"] < 0.999) == (row["staleness"] == 1)
        assert (row["logp_gap/max"] < 1e-4) == (row["staleness"] == 0)
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"]


def test_asynchronous_generation_survives_the_loss_of_weights(tmp_path: Path, tiny_policy: str) -> None:
    class Forgetful(LocalGenerator):
        def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
            if version == "rlhf@1" and self.num_syncs == 2:
                return Done(StaleWeightsError("no weights yet"))
            return super().submit(prompts, sampling, version)

    job = make_job(tmp_path, tiny_policy, GRPO.model_copy(update={"mode": "asynchronous"}))
    train_on_policy(job, Worker(job.stage_dir), Forgetful(job.policy), reward=LikedCount())
    assert [row["staleness"] for row in metric_rows(job)] == [0, 1, 0, 1]  # what was lost was made again, fresh


class TakesSomeLayers(LocalGenerator):
    """Takes parts of a state dict, as generation actors do; `sent` is of what each was, and since when."""

    version: str | None

    def __init__(self, policy: str, lost_at: str = "") -> None:
        super().__init__(policy)
        self.sent: list[tuple[str | None, frozenset[str]]] = []
        self.lost_at = lost_at

    def layers_of(self, names: Collection[str], version: str) -> frozenset[str] | None:
        """Query, key and value go together."""
        if version != self.version:
            return None
        parts = {name.replace("q_proj", f"{part}_proj") for name in names for part in "qkv"}
        return frozenset(parts)

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str, since: str | None = None) -> None:
        tensors = {name: tensor.clone() for name, tensor in named_tensors}
        assert since is None or since == self.version
        self.model.load_state_dict(tensors, strict=since is None)
        self.version = version
        self.sent.append((since, frozenset(tensors)))

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
        if version == self.lost_at:
            self.version, self.lost_at = None, ""
        return super().submit(prompts, sampling, version)


def test_adapters_are_sent_as_the_layers_that_they_change(tmp_path: Path, tiny_policy: str) -> None:
    training = GRPO.model_copy(update={"lora": LoRA(rank=2, targets=("q_proj",)), "num_iterations": 4})
    jobs = [make_job(tmp_path / name, tiny_policy, training) for name in ("whole", "layers")]
    whole, layers = LocalGenerator(tiny_policy), TakesSomeLayers(tiny_policy, lost_at="rlhf@2")
    for job, source in zip(jobs, (whole, layers), strict=True):
        train_on_policy(job, Worker(job.stage_dir), source, reward=LikedCount())
    assert equal(final_weights(jobs[0]), final_weights(jobs[1]))
    everything = frozenset(load_policy(tiny_policy).state_dict())
    changed = frozenset(name for name in everything if any(f"{part}_proj" in name for part in "qkv"))
    part = [(f"rlhf@{iteration}", changed) for iteration in (0, 1)]
    assert layers.sent == [(None, everything), *part, (None, everything), ("rlhf@2", changed)]


@pytest.mark.parametrize(("mode", "allowed"), [("synchronous", 0), ("asynchronous", 1)])
def test_rollouts_older_than_the_mode_allows_are_refused(
    tmp_path: Path, tiny_policy: str, mode: str, allowed: int
) -> None:
    class Stuck(LocalGenerator):
        def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
            rollouts = super().submit(prompts, sampling, version).result()
            return Done([replace(rollout, weight_version="rlhf@0") for rollout in rollouts])

    job = make_job(tmp_path, tiny_policy, GRPO.model_copy(update={"mode": mode}))
    with pytest.raises(StalenessError, match=f"made by weights 'rlhf@0'.* at most {allowed} updates old"):
        train_on_policy(job, Worker(job.stage_dir), Stuck(job.policy), reward=LikedCount())


@pytest.mark.parametrize("how", [{}, {"lora": LoRA(rank=2)}], ids=["whole", "adapters"])
def test_snapshots_are_the_policy_after_that_many_updates(
    tmp_path: Path, tiny_policy: str, how: dict[str, Any]
) -> None:
    assert snapshot_steps(80, 3) == [20, 40, 60] and snapshot_steps(5, 0) == []
    assert snapshot_steps(3, 5) == [1, 2]
    job = make_job(tmp_path, tiny_policy, GRPO.model_copy(update={"num_snapshots": 3, **how}))
    train_until_killed(job, Dying(LocalGenerator(job.policy), "rlhf@3"), reward=LikedCount())
    train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    folders = sorted((Path(job.stage_dir) / "snapshots").iterdir())
    assert [folder.name for folder in folders] == ["00001", "00002", "00003"]
    short = make_job(tmp_path / "short", tiny_policy, GRPO.model_copy(update={"num_iterations": 3, **how}))
    train_on_policy(short, Worker(short.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    assert equal(dict(load_policy(str(folders[2])).state_dict()), final_weights(short))
    assert (folders[2] / "model.safetensors").exists() != ("lora" in how)  # adapters alone, without their base


@pytest.mark.parametrize("training", [GRPO, RLOO], ids=["grpo", "rloo"])
def test_an_interrupted_run_of_a_group_method_is_bit_equal(tmp_path: Path, tiny_policy: str, training: Any) -> None:
    assert_interruption_changes_nothing(
        make_job(tmp_path, tiny_policy, training), tmp_path, LocalGenerator(tiny_policy), LocalGenerator(tiny_policy)
    )


def test_an_interrupted_run_is_bit_equal_with_vllm(tmp_path: Path, tiny_policy: str, generator: Any) -> None:
    """PPO with an adaptive KL penalty; between the attempts the engine holds weights of something else."""
    job = make_job(tmp_path, tiny_policy, PPO)
    rows = assert_interruption_changes_nothing(job, tmp_path, generator, generator)
    assert len({row["kl/coef"] for row in rows}) == 4
    assert max(row["logp_gap/max"] for row in rows) < 1e-4


def assert_interruption_changes_nothing(
    job: OnPolicyJob, tmp_path: Path, source: Any, source_after: Any
) -> list[dict[str, Any]]:
    """Run it straight, then killed in its third iteration, after the checkpoint at two, and again. Returns the rows."""
    train_on_policy(job, Worker(job.stage_dir), source)
    again = replace(job, stage_dir=str(tmp_path / "again"))
    train_until_killed(again, Dying(source, "rlhf@3"))
    assert len(metric_rows(again)) == 3
    source_after.sync(load_policy(job.model_dir).state_dict().items(), "something-else")
    torch.manual_seed(torch.initial_seed() + 1)  # the global random state plays no part
    worker = Worker(again.stage_dir)
    resumed = OnPolicyTrainer(again, worker, source_after)
    resumed.restore()
    assert resumed.iteration == 2 and resumed.state()["weight_version"] == "rlhf@2"
    train_on_policy(again, worker, source_after)
    assert equal(final_weights(again), final_weights(job))
    assert timeless(again) == timeless(job)
    return metric_rows(again)
