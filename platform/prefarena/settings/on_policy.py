"""What every on-policy method is: a reward, the loop's settings, advantages and losses; what groups and critics add."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from prefarena.objectives.advantages import among_scored
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.ppo import policy_loss
from prefarena.objectives.rollouts import Advantages, Judged, Minibatch
from prefarena.settings.judges import JudgeSettings, RewardModel
from prefarena.settings.optimisation import LearnerSettings
from prefarena.settings.search import OneOf, Space, proposed
from prefarena.settings.section import Section


class OnPolicyTraining(LearnerSettings):
    """The loop that every on-policy method shares, and its formulas; docs/methods.md says what is done exactly.

    Losses are sums over the tokens of a micro-batch. The loop divides them by `loss_count` of the whole optimizer step,
    so micro-batches and workers change nothing.
    """

    #: Settings that are not in a stage's address while they have their defaults: it is older than they are.
    added: ClassVar[frozenset[str]] = frozenset({"reference_every", "reference_mix"})

    num_iterations: int = Field(40, ge=1, description="Rollout batches.")
    rollouts_per_iteration: int = Field(256, ge=2)
    num_epochs: int = Field(2, ge=1, description="Passes over each rollout batch.")
    num_minibatches: int = Field(4, ge=1, description="Optimizer steps per pass.")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Rollouts per forward pass of one worker. auto: 64, or the largest half, quarter and so on, that "
        "is predicted to fit the worker's share of memory.",
    )
    warmup_iterations: int = Field(2, ge=0, description="Linear learning-rate warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description=LearnerSettings.model_fields["schedule"].description
    )
    kl_coef: float = Field(0.2, ge=0)
    target_kl: float | None = Field(
        None, gt=0, description="Adaptive KL controller's target (nats per sequence); none: fixed."
    )
    kl_horizon: int = Field(2048, ge=1, description="Adaptive KL controller's horizon, in rollouts.")
    reference_every: int | None = Field(
        None,
        ge=1,
        description="Iterations after which the reference that the KL penalty is against moves towards the policy; "
        "none: it never does. Reports measure KL against the original one.",
    )
    reference_mix: float = Field(
        1.0,
        gt=0,
        le=1,
        description="With reference_every: how far it moves. 1: it becomes the policy; less: a moving average of "
        "weights (arXiv 2404.10719), which adapters cannot have.",
    )
    clip: float = Field(0.2, gt=0)
    clip_high: float | None = Field(
        None, gt=0, description="Clips ratios above 1 by this instead (DAPO's clip-higher, arXiv 2503.14476)."
    )
    temperature: float = Field(1.0, gt=0)
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Subtracted from the score of a response cut off before a token that ends it."
    )
    overlong_penalty: float = Field(
        0.0,
        ge=0,
        description="Subtracted from the score of a response as long as the limit allows; of shorter ones in "
        "proportion, down to none `overlong_tokens` before it (DAPO's soft punishment, arXiv 2503.14476).",
    )
    overlong_tokens: int = Field(32, ge=1, description="With overlong_penalty.")
    reward_clip: float = Field(10.0, gt=0)
    importance_cap: float | None = Field(
        2.0, gt=0, description="Cap of the truncated trainer/generator importance weights; none turns them off."
    )
    mode: Literal["synchronous", "asynchronous"] = Field(
        "synchronous",
        description="`asynchronous`: the next batch is generated, by weights one step old, while this one is learned "
        "from; needs importance_cap.",
    )
    max_bad_iterations: int = Field(
        2,
        ge=0,
        description="Iterations in a row that may pass without one step of policy or critic whose loss and gradient "
        "are numbers; one more, and the method has failed.",
    )
    checkpoint_every: int = Field(10, ge=1, description="Iterations between checkpoints.")
    num_snapshots: int = Field(
        0, ge=0, description="Policies kept on the way, evenly spaced, and evaluated where evaluation is exact."
    )

    @model_validator(mode="after")
    def _asynchronous_is_corrected(self) -> OnPolicyTraining:
        if self.mode == "asynchronous" and self.importance_cap is None:
            raise ValueError("mode: asynchronous needs importance_cap, which corrects for samples one step old")
        return self

    @model_validator(mode="after")
    def _reference_can_move(self) -> OnPolicyTraining:
        if self.reference_every is None and self.reference_mix != 1:
            raise ValueError("reference_mix says how far the reference moves, and needs reference_every")
        if self.lora is not None and self.reference_mix != 1:
            raise ValueError(
                "reference_mix below 1 averages weights, and an average of adapters is none of what they add; set "
                "reference_mix: 1, or train without lora"
            )
        return self

    @property
    def samples_per_prompt(self) -> int:
        """Rollouts of a prompt; those of one prompt are consecutive."""
        return 1

    @abstractmethod
    def advantages(self, rollouts: Judged, kl_coef: float) -> Advantages:
        """Of a whole rollout batch, all workers' rollouts in it; kl_coef: of this iteration."""

    def policy_loss(self, logps: Tensor, batch: Minibatch, kl_coef: float) -> ObjectiveOutput:
        """The sum over a micro-batch, and its metrics: PPO's clipped loss. logps: of the policy in training, [B, T]."""
        return policy_loss(
            logps,
            batch.old_logps,
            batch.advantages,
            batch.mask,
            clip=self.clip,
            clip_high=self.clip_high,
            weights=batch.weights,
        )

    def loss_count(self, mask: Tensor, response_limit: int) -> Tensor:
        """What the losses of an optimizer step are divided by, []: its tokens. mask: [B, T] of all its rollouts."""
        return mask.sum()


class CriticTraining(OnPolicyTraining):
    """A method that learns a critic, too: a model of values at every token, with an optimizer of its own."""

    critic_learning_rate: float = Field(2e-3, gt=0)
    critic_warmup_iterations: int = Field(
        0, ge=0, description="First iterations, in which the critic learns and the policy stays as it is."
    )

    @abstractmethod
    def value_loss(self, values: Tensor, batch: Minibatch) -> ObjectiveOutput:
        """The sum over a micro-batch, and its metrics. values: of the critic in training, [B, T]."""


class GroupTraining(OnPolicyTraining):
    """Several samples of every prompt, which are each other's baseline; no critic."""

    group_size: int = Field(8, ge=2, description="Samples of a prompt; it divides rollouts_per_iteration.")

    @model_validator(mode="after")
    def _groups_are_whole(self) -> GroupTraining:
        if self.rollouts_per_iteration % self.group_size:
            raise ValueError(
                f"rollouts_per_iteration {self.rollouts_per_iteration} is not a multiple of group_size "
                f"{self.group_size}"
            )
        return self

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size

    def in_groups(self, compare: Callable[[Tensor, int], Tensor], rewards: Tensor, rollouts: Judged) -> Tensor:
        """`compare` of rewards [B] in groups of a size, each among those of its group that have a score, [B]."""
        return among_scored(compare, rewards, rollouts.scored, self.group_size)


class OnPolicy(Section):
    """A method that learns from what its policy says, by a reward: `training` holds the loop's settings and formulas.

    `prefarena.methods.on_policy` has one file for each; docs/architecture.md says how one is added.
    """

    #: The advantage of a token or response, in TeX, in the notation of docs/methods.md, for its table.
    formula: ClassVar[str] = ""

    #: What `prefarena tune` searches beside what all have: numbers, of which those above 0 are at work.
    searched: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:

        @property
        def kind(self) -> str:
            """The method's name in a configuration: a field that each method declares, as a literal."""

        @property
        def training(self) -> OnPolicyTraining:
            """A field of each method's own kind, with its default."""

    reward: JudgeSettings = RewardModel()
    prompts: Literal["covered", "all"] = Field("covered", description="Prompts to sample on.")

    def search_space(self) -> Space:
        """What `prefarena tune` searches unless it is told otherwise: a factor to either side of what is configured.

        The penalty, which decides how far the policy goes, by ten; learning rates by five; and the passes over each
        rollout batch.
        """
        rates = proposed(self, ("training.learning_rate", *self.searched), 5)
        passes = OneOf(values=tuple(sorted({1, 2, 4, self.training.num_epochs})))
        return {**proposed(self, ("training.kl_coef",), 10), **rates, "training.num_epochs": passes}

    def address(self) -> dict[str, Any]:
        """What results depend on, for the address of stages."""
        found, fields = self.model_dump(mode="json"), type(self.training).model_fields
        as_ever = {name for name in self.training.added if getattr(self.training, name) == fields[name].default}
        found["training"] = {name: value for name, value in found["training"].items() if name not in as_ever}
        return found
