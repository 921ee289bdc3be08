"""PPO end to end on a tiny model, with a generator of the same interface that runs in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny import BOS, EOS, FIRST_LETTER
from torch import Tensor

from prefarena.config import Generation, PPOTraining, RewardModel
from prefarena.data.tables import write_rows
from prefarena.errors import UserError
from prefarena.generation.interface import Sampling, StaleWeightsError
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.load import load_policy, load_tokenizer, new_reward_model, save_policy
from prefarena.modeling.logprobs import Sequences
from prefarena.records import PROMPTS, Rollout
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.ppo import train_ppo
from prefarena.training.rollouts import minibatches, prompt_indices, share
from prefarena.training.worker import Worker

LIKED = 5


class LocalGenerator:
    """Samples with transformers from the weights it was last given; refuses other versions, as the actor does."""

    def __init__(self, policy: str) -> None:
        self.model = load_policy(policy)
        self.version: str | None = None
        self.num_syncs = 0

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        self.model.load_state_dict({name: tensor.clone() for name, tensor in named_tensors})
        self.version = version
        self.num_syncs += 1

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        if version != self.version:
            raise StaleWeightsError(f"holds {self.version}, asked for {version}")
        randoms = [torch.Generator().manual_seed(seed) for seed in sampling.request_seeds(len(prompts))]
        ids, ended = torch.tensor(prompts), torch.zeros(len(prompts), dtype=torch.bool)
        responses: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        for _ in range(sampling.max_tokens):
            log_softmax = torch.log_softmax(self.model(ids).logits[:, -1] / sampling.temperature, -1)
            tokens = torch.stack(
                [torch.multinomial(row.exp(), 1, generator=g) for row, g in zip(log_softmax, randoms, strict=True)]
            )
            for row in (~ended).nonzero()[:, 0].tolist():
                responses[row].append(int(tokens[row]))
                logps[row].append(float(log_softmax[row, tokens[row]]))
            ended |= tokens[:, 0] == EOS
            ids = torch.cat([ids, tokens], 1)
        return [
            Rollout(prompt, response, logp, response[-1] == EOS, version)
            for prompt, response, logp in zip(prompts, responses, logps, strict=True)
        ]


def count_liked(sequences: Sequences) -> Tensor:
    """A reward that every response token can earn."""
    return ((sequences.input_ids[:, 1:] == LIKED) & sequences.response_mask).sum(1).float()


@pytest.fixture
def job(tmp_path: Path, tiny_policy: str) -> OnPolicyJob:
    prompts = {
        "id": [f"{i:02d}" for i in range(8)],
        "prompt_ids": [[BOS, FIRST_LETTER + i, FIRST_LETTER + 2] for i in range(8)],
        "covered": [True] * 6 + [False] * 2,
        "split": ["train"] * 8,
    }
    write_rows(pa.table(prompts), tmp_path / "prompts.parquet", PROMPTS)
    save_policy(new_reward_model(tiny_policy, 0), load_tokenizer(tiny_policy), tmp_path / "reward")
    settings = PPOTraining(
        num_iterations=8, rollouts_per_iteration=48, num_minibatches=3, micro_batch_size=10, kl_coef=0.05,
        target_kl=0.5, kl_horizon=200, checkpoint_every=2,
    )  # fmt: skip
    return OnPolicyJob(
        stage_dir=str(tmp_path / "stage"), name="rlhf", policy=tiny_policy, seed=0, training=settings,
        reward=JudgeSpec(RewardModel(), str(tmp_path / "reward"), tiny_policy), critic=str(tmp_path / "reward"),
        prompts=str(tmp_path / "prompts.parquet"), covered_only=True,
        generators=("none",), generation=Generation(), response_limit=4,
    )  # fmt: skip


def metric_rows(job: OnPolicyJob) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(job.stage_dir) / "metrics.jsonl").read_text().splitlines()]


def test_the_reward_rises_and_every_metric_is_there(job: OnPolicyJob) -> None:
    source = LocalGenerator(job.policy)
    costs = train_ppo(job, Worker(job.stage_dir), source, reward=count_liked)["costs"]
    rows = metric_rows(job)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.5
    assert rows[0]["kl/k1"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl/k3"] > 0.05
    assert max(row["logp_gap/max"] for row in rows) < 1e-4
    assert min(row["importance/ess"] for row in rows) > 0.999
    assert rows[-1]["kl/coef"] != rows[0]["kl/coef"]
    assert costs["num_tokens_trained"] == rows[-1]["num_tokens_trained"] > 2 * costs["num_tokens_generated"]
    expected = {
        "reward/mean", "reward/penalised", "kl/k1", "kl/k3", "entropy", "policy/clip_fraction", "value/clip_fraction",
        "value/explained_variance", "logp_gap/mean", "logp_gap/max", "response_length", "truncation_rate",
        "importance/ess", "time/generate", "time/score", "time/logprobs", "time/update", "time/sync",
        "num_tokens_generated", "num_tokens_trained", "step", "num_steps",
    }  # fmt: skip
    assert expected <= rows[0].keys()
    trained = load_policy(job.model_dir)
    assert source.version == "rlhf@8" and source.num_syncs == 9
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, source.model.state_dict()[name])


def test_an_interrupted_run_ends_in_the_same_weights_bit_for_bit(job: OnPolicyJob, tmp_path: Path) -> None:
    job = replace(job, training=job.training.model_copy(update={"num_iterations": 5}))
    train_ppo(job, Worker(job.stage_dir), LocalGenerator(job.policy))

    class Dying(LocalGenerator):
        def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
            if version == "rlhf@3":
                raise ConnectionError("killed")
            super().sync(named_tensors, version)

    again = replace(job, stage_dir=str(tmp_path / "interrupted"))
    with pytest.raises(ConnectionError):
        train_ppo(again, Worker(again.stage_dir), Dying(job.policy))
    train_ppo(again, Worker(again.stage_dir), LocalGenerator(job.policy))
    whole, resumed = load_policy(job.model_dir).state_dict(), load_policy(again.model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timeless = [
        [{key: value for key, value in row.items() if not key.startswith("time/")} for row in metric_rows(run)]
        for run in (job, again)
    ]
    assert timeless[0] == timeless[1]


class GlooWorker(Worker):
    """One of several workers in processes that the test started."""

    world_size = 2

    def __init__(self, stage_dir: str, rank: int) -> None:
        self.rank = rank
        super().__init__(stage_dir)


def run_as_one_of_two(rank: int, job: OnPolicyJob, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    train_ppo(job, GlooWorker(job.stage_dir, rank), LocalGenerator(job.policy), reward=count_liked)
    torch.distributed.destroy_process_group()


def test_two_workers_do_what_one_does(job: OnPolicyJob, tmp_path: Path) -> None:
    job = replace(job, training=job.training.model_copy(update={"num_iterations": 2, "rollouts_per_iteration": 51}))
    train_ppo(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=count_liked)
    shared = replace(job, stage_dir=str(tmp_path / "shared"))
    torch.multiprocessing.spawn(run_as_one_of_two, args=(shared, str(tmp_path / "rendezvous")), nprocs=2)
    for alone, together in zip(metric_rows(job), metric_rows(shared), strict=True):
        assert alone.keys() == together.keys()
        for name in (name for name in alone if not name.startswith("time/")):
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_a_generator_that_lost_its_weights_is_given_them_again(job: OnPolicyJob) -> None:
    class Forgetful(LocalGenerator):
        def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
            if version == "rlhf@1" and self.num_syncs == 2:
                self.version = None
            return super().generate(prompts, sampling, version)

    job = replace(job, training=job.training.model_copy(update={"num_iterations": 2}))
    source = Forgetful(job.policy)
    train_ppo(job, Worker(job.stage_dir), source, reward=count_liked)
    assert source.num_syncs == 4 and source.version == "rlhf@2"


def test_too_few_rollouts_to_share_is_one_clear_sentence(job: OnPolicyJob) -> None:
    job = replace(job, training=job.training.model_copy(update={"rollouts_per_iteration": 2}))
    with pytest.raises(UserError, match="rollouts_per_iteration 2 is fewer than one rollout for each of 3"):
        train_ppo(job, Worker(job.stage_dir), LocalGenerator(job.policy))


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
