"""Jobs for training workers: plain values, sent from the driver to every worker.

A job ends with its model (a transformers folder) at `<stage_dir>/model`, its metric rows at
`<stage_dir>/metrics.jsonl`, and the manifest of its stage, written last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefarena.config import (
    Generation,
    OffPolicyMethod,
    OnPolicyTraining,
    Optimisation,
    RewardModel,
)
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.stage_files import MODEL


@dataclass(frozen=True)
class Job:
    """Common to all jobs: where the result goes, the model to start from, and the seed of every random choice.

    max_length: most tokens of a prompt and its response, where it is known.
    """

    stage_dir: str
    name: str
    policy: str
    seed: int
    max_length: int | None = field(default=None, kw_only=True)

    @property
    def model_dir(self) -> str:
        return str(Path(self.stage_dir) / MODEL)

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic that it trains in."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReferenceJob(Job):
    """Supervised fine-tuning of the base model on demonstrations."""

    training: Optimisation
    demonstrations: str
    loss_on: Literal["response", "all"] = "response"

    @property
    def arithmetic(self) -> Arithmetic:
        return self.training.precision


@dataclass(frozen=True)
class Drawing:
    """How an off-policy training gets pairs of its own policy, from the named generation actors.

    every: steps from one drawing to the next. reward: what orders two responses. labels, label_temperature: as the
    task's pairs are labelled.
    """

    every: int
    reward: JudgeSpec
    generators: tuple[str, ...]
    generation: Generation
    response_limit: int
    temperature: float = 1.0
    labels: Literal["deterministic", "bradley_terry"] = "deterministic"
    label_temperature: float = 1.0


@dataclass(frozen=True)
class Replayed:
    """An online training of the same seed whose pairs are used again: its stage, and what determined the pairs."""

    stage_dir: str
    every: int
    training: Optimisation
    num_pairs: int | None = None


@dataclass(frozen=True)
class Regulariser:
    """The eta and gamma terms of a loss: their weights and tables; a term without a table is left out.

    demonstrations: responses, or pairs of which the chosen ones are taken; num_demonstrations: how many rows of that
    table are used, from its start; None means all.
    """

    demonstration_weight: float = 0.0
    demonstration_mean: Literal["sequences", "tokens"] = "sequences"
    pretraining_weight: float = 0.0
    demonstrations: str | None = None
    pretraining: str | None = None
    num_demonstrations: int | None = None


@dataclass(frozen=True)
class OffPolicyJob(Job):
    """An off-policy method on pairs that carry the reference's log-probs, or on `responses` that do.

    drawing: how it draws new pairs while it trains; None means that it uses the table's alone. replayed: another
    training whose drawn pairs replace the table's, except for those of the table that it was trained on, too.
    """

    method: OffPolicyMethod
    pairs: str
    demonstrations: str | None = None
    pretraining: str | None = None
    num_demonstrations: int | None = None
    responses: str | None = None
    drawing: Drawing | None = None
    replayed: Replayed | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        return self.method.training.precision

    @property
    def regulariser(self) -> Regulariser:
        """The terms that are added to the method's own loss."""
        method = self.method
        return Regulariser(
            method.demonstration_weight,
            method.demonstration_mean,
            method.pretraining_weight,
            self.demonstrations,
            self.pretraining,
            self.num_demonstrations,
        )


@dataclass(frozen=True)
class RewardModelJob(Job):
    """A Bradley-Terry reward model from the policy's body, its scores normalised on samples of the reference.

    samples: a table with prompt_ids and response_ids, drawn from the reference policy. scored_in: the arithmetic in
    which the trained model will score, and so is normalised and measured.
    """

    settings: RewardModel
    pairs: str
    test_pairs: str
    samples: str
    scored_in: Arithmetic = "float32"

    @property
    def arithmetic(self) -> Arithmetic:
        return self.settings.training.precision


@dataclass(frozen=True)
class OnPolicyJob(Job):
    """An on-policy method (`training` is of its kind) from `policy`, with rollouts from the named generation actors.

    reward: what is maximised. monitor: another judge whose mean score on the rollouts is logged as `reward/judge` and
    never learned from. critic: the reward model that the critic starts from; None means the policy's body with a head
    of zeros. regulariser: what the policy learns from in every step, beside its rollouts.
    """

    training: OnPolicyTraining
    reward: JudgeSpec
    prompts: str
    covered_only: bool
    generators: tuple[str, ...]
    generation: Generation
    response_limit: int
    critic: str | None = None
    monitor: JudgeSpec | None = None
    regulariser: Regulariser = Regulariser()

    @property
    def arithmetic(self) -> Arithmetic:
        return self.training.precision
