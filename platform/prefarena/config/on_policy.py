"""The on-policy methods: PPO, GRPO and RLOO on fresh samples, and best-of-n, which trains nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefarena.config.judges import JudgeSettings, RewardModel
from prefarena.settings.optimisation import LearnerSettings
from prefarena.settings.section import Section


class OnPolicyTraining(LearnerSettings):
    """The loop that every on-policy method shares; docs/methods.md says what is done exactly."""

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


class PPOTraining(OnPolicyTraining):
    """Proximal Policy Optimization with a critic (arXiv 1707.06347); the KL penalty is part of the reward."""

    critic_learning_rate: float = Field(2e-3, gt=0)
    critic_warmup_iterations: int = Field(
        0, ge=0, description="First iterations, in which the critic learns and the policy stays as it is."
    )
    value_clip: float = Field(0.2, gt=0)
    discount: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)


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


class GRPOTraining(GroupTraining):
    """Group Relative Policy Optimization (arXiv 2402.03300)."""

    normalise_std: bool = Field(True, description="Divide advantages by the group's standard deviation, as the paper.")
    kl_in: Literal["loss", "reward"] = Field("loss", description="Where the KL penalty stands.")
    kl_estimator: Literal["k2", "k3", "k3_straight_through"] = Field(
        "k3_straight_through",
        description="Of the penalty in the loss: k3 as the paper has a biased gradient; straight-through has k3's "
        "value and k2's gradient.",
    )
    loss_mean: Literal["tokens", "sequences", "limit"] = Field(
        "tokens",
        description="Mean over all tokens; over sequences of their token means, as the paper; or the sum over tokens, "
        "by the tokens that as many responses of the greatest length have (Dr. GRPO, arXiv 2503.20783).",
    )


class RLOOTraining(GroupTraining):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740); the KL penalty is part of the reward."""


class OnPolicy(Section):
    """Settings that every on-policy method shares."""

    reward: JudgeSettings = RewardModel()
    prompts: Literal["covered", "all"] = Field("covered", description="Prompts to sample on.")


class RLHF(OnPolicy):
    """Reward model on the pairs, then PPO with vLLM rollouts."""

    kind: Literal["rlhf"] = "rlhf"
    training: PPOTraining = PPOTraining()


class GRPO(OnPolicy):
    """Reward model on the pairs, then GRPO with vLLM rollouts."""

    kind: Literal["grpo"] = "grpo"
    training: GRPOTraining = GRPOTraining()


class RLOO(OnPolicy):
    """Reward model on the pairs, then RLOO with vLLM rollouts."""

    kind: Literal["rloo"] = "rloo"
    training: RLOOTraining = RLOOTraining()


class BestOfN(Section):
    """The best of n samples of the reference, by the reward model: no training of the policy."""

    kind: Literal["best_of_n"] = "best_of_n"
    reward: JudgeSettings = RewardModel()
    n: int = Field(4, ge=1)


OnPolicyMethod = RLHF | GRPO | RLOO
