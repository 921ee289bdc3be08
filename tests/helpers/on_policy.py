"""What tests of on-policy training share: a generator in this process, a reward that can be earned, a tiny job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import BOS, FIRST_LETTER
from torch import Tensor

from prefarena.config import Generation, GRPOTraining, PPOTraining, RewardModel, RLOOTraining
from prefarena.data.tables import write_rows
from prefarena.generation.interface import Sampling, StaleWeightsError
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.endings import load_ends
from prefarena.modeling.load import load_policy, load_tokenizer, new_reward_model, save_policy
from prefarena.records import PROMPTS, Rollout
from prefarena.stage_files import METRICS, read_log
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import train_on_policy
from prefarena.training.worker import Worker

LIKED = 5


@dataclass(frozen=True)
class Done:
    """A batch that was made when it was asked for."""

    outcome: list[Rollout] | StaleWeightsError

    def result(self) -> list[Rollout]:
        if isinstance(self.outcome, StaleWeightsError):
            raise self.outcome
        return self.outcome


class LocalGenerator:
    """Samples with transformers from the weights it was last given; refuses other versions, as the actor does."""

    def __init__(self, policy: str) -> None:
        self.model = load_policy(policy)
        self.ends = torch.tensor(load_ends(policy, load_tokenizer(policy)))
        self.version: str | None = None
        self.num_syncs = 0

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        self.model.load_state_dict({name: tensor.clone() for name, tensor in named_tensors})
        self.version = version
        self.num_syncs += 1

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
        try:
            return Done(self._sample(prompts, sampling, version))
        except StaleWeightsError as error:
            return Done(error)

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return self.submit(prompts, sampling, version).result()

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
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
            ended |= torch.isin(tokens[:, 0], self.ends)
            ids = torch.cat([ids, tokens], 1)
        return [
            Rollout(prompt, response, logp, response[-1] in self.ends.tolist(), version)
            for prompt, response, logp in zip(prompts, responses, logps, strict=True)
        ]


class SharedGenerator(LocalGenerator):
    """A generator that workers in several processes share: its weights are in a file of `folder`.

    `syncs` tells which worker gave it which weights.
    """

    def __init__(self, policy: str, folder: Path, worker: Worker) -> None:
        super().__init__(policy)
        self.folder, self.worker = folder, worker

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        with (self.folder / "syncs").open("a") as file:
            file.write(f"{self.worker.rank} {version}\n")
        partial = self.folder / f"weights-{self.worker.rank}"
        torch.save((version, dict(named_tensors)), partial)
        partial.replace(self.folder / "weights")

    def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        self.version, weights = torch.load(self.folder / "weights")
        self.model.load_state_dict(weights)
        return super()._sample(prompts, sampling, version)


def syncs(folder: Path) -> list[tuple[int, str]]:
    """Which worker gave a `SharedGenerator` which weights, in order."""
    lines = (folder / "syncs").read_text().splitlines()
    return [(int(rank), version) for rank, version in map(str.split, lines)]


class LikedCount:
    """A reward that every response token can earn."""

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        return np.array([float(response.count(LIKED)) for response in responses])


def make_job(folder: Path, policy: str, training: PPOTraining | GRPOTraining | RLOOTraining) -> OnPolicyJob:
    """A job on eight prompts of one length, six of them covered, with a random reward model."""
    prompts = {
        "id": [f"{i:02d}" for i in range(8)],
        "prompt_ids": [[BOS, FIRST_LETTER + i, FIRST_LETTER + 2] for i in range(8)],
        "covered": [True] * 6 + [False] * 2,
        "split": ["train"] * 8,
    }
    write_rows(pa.table(prompts), folder / "prompts.parquet", PROMPTS)
    save_policy(new_reward_model(policy, 0), load_tokenizer(policy), folder / "reward")
    return OnPolicyJob(
        stage_dir=str(folder / "stage"), name="rlhf", policy=policy, seed=0, training=training,
        reward=JudgeSpec(RewardModel(), str(folder / "reward"), policy), critic=str(folder / "reward"),
        prompts=str(folder / "prompts.parquet"), covered_only=True,
        generators=("none",), generation=Generation(), response_limit=4,
    )  # fmt: skip


def metric_rows(job: OnPolicyJob) -> list[dict[str, Any]]:
    return read_log(Path(job.stage_dir) / METRICS)


def timeless(job: OnPolicyJob) -> list[dict[str, Any]]:
    """The rows without what a clock measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith("time/") and name != "tokens_per_second"}
        for row in metric_rows(job)
    ]


def train_until_killed(job: OnPolicyJob, source: Any, **how: Any) -> None:
    """Train with a source that ends the training by a ConnectionError, all checkpoints up to there written.

    A checkpoint is written in the background; what is resumed from would otherwise depend on how fast the disk is.
    """
    worker = Worker(job.stage_dir)
    with pytest.raises(ConnectionError):
        train_on_policy(job, worker, source, **how)
    worker.flush()
