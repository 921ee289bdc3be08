"""What a training worker is told to do: plain values, sent from the driver to every worker.

A job ends with its model (a transformers folder) at `<stage_dir>/model`, its metric rows at
`<stage_dir>/metrics.jsonl`, and the manifest of its stage, written last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefarena.config import Generation, OffPolicyMethod, Optimisation, PPOStep, RewardModel


@dataclass(frozen=True)
class Job:
    """Common to all jobs: where the result goes, the model to start from, and the seed of every random choice."""

    stage_dir: str
    name: str
    policy: str
    seed: int

    @property
    def model_dir(self) -> str:
        return str(Path(self.stage_dir) / "model")


@dataclass(frozen=True)
class ReferenceJob(Job):
    """Supervised fine-tuning of the base model on demonstrations."""

    training: Optimisation
    demonstrations: str
    loss_on: Literal["response", "all"] = "response"


@dataclass(frozen=True)
class OffPolicyJob(Job):
    """An off-policy method on pairs that carry the reference's log-probs."""

    method: OffPolicyMethod
    pairs: str
    demonstrations: str | None = None
    pretraining: str | None = None


@dataclass(frozen=True)
class RewardModelJob(Job):
    """A Bradley-Terry reward model from the policy's body, scores normalised on the pairs' own responses."""

    settings: RewardModel
    pairs: str
    test_pairs: str


@dataclass(frozen=True)
class PPOJob(Job):
    """PPO from `policy` against `reward_model`, with rollouts from the named generation actor."""

    ppo: PPOStep
    reward_model: str
    prompts: str
    covered_only: bool
    generator: str
    generation: Generation
    response_limit: int
