"""GRPO: Group Relative Policy Optimization."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from prefarena.objectives.advantages import group_advantages, less_kl
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.ppo import sequence_mean_weights, with_kl_loss
from prefarena.objectives.rollouts import Advantages, Judged, Minibatch
from prefarena.settings.on_policy import GroupTraining, OnPolicy


class GRPOTraining(GroupTraining):
    """A response's advantage is its score's place in its group (arXiv 2402.03300, section 4.1.2), the same at every
    token; the KL penalty is a term of the loss (equation 3 there), by equation 4's estimate or one of the same value.
    """

    normalise_std: bool = Field(
        True, description="Divide advantages by the group's standard deviation, as in the paper."
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="Whether the KL penalty is part of the loss or of the reward."
    )
    kl_estimator: Literal["k2", "k3", "k3_straight_through"] = Field(
        "k3_straight_through",
        description="Estimator of the penalty in the loss: the paper's k3 has a biased gradient; "
        "k3_straight_through has k3's value and k2's gradient.",
    )
    loss_mean: Literal["tokens", "sequences", "limit"] = Field(
        "tokens",
        description="Mean over all tokens; over sequences, of each one's mean over its tokens, as in the paper; or "
        "the sum over tokens, divided by the number of tokens that as many responses of maximum length would have "
        "(Dr. GRPO, arXiv 2503.20783).",
    )

    def advantages(self, rollouts: Judged, kl_coef: float) -> Advantages:
        in_loss = self.kl_in == "loss"
        rewards = rollouts.scores if in_loss else less_kl(rollouts, kl_coef)
        normalised = partial(group_advantages, normalise_std=self.normalise_std)
        found = self.in_groups(normalised, rewards, rollouts)
        return Advantages(
            found[:, None] * rollouts.mask,
            rewards,
            weights=sequence_mean_weights(rollouts.mask) if self.loss_mean == "sequences" else None,
            reference_logps=rollouts.reference_logps if in_loss else None,
        )

    def policy_loss(self, logps: Tensor, batch: Minibatch, kl_coef: float) -> ObjectiveOutput:
        clipped = super().policy_loss(logps, batch, kl_coef)
        return with_kl_loss(clipped, logps, batch, kl_coef, estimator=self.kl_estimator)

    def loss_count(self, mask: Tensor, response_limit: int) -> Tensor:
        if self.loss_mean == "tokens":
            return mask.sum()
        return mask.any(1).sum() * (response_limit if self.loss_mean == "limit" else 1)


class GRPO(OnPolicy):
    """Group Relative Policy Optimization (arXiv 2402.03300): a response against others to its prompt; no critic."""

    formula: ClassVar[str] = r"(s-\mathrm{mean}_G\,s)/(\mathrm{std}_G\,s+10^{-6})"
    kind: Literal["grpo"] = "grpo"
    training: GRPOTraining = GRPOTraining()
