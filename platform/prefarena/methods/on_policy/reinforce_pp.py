"""REINFORCE++, without a baseline and with one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from prefarena.objectives.advantages import (
    group_advantages,
    less_kl,
    masked_moments,
    penalised_rewards,
    rewards_to_go,
    whiten,
)
from prefarena.objectives.kl import k1
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.ppo import with_kl_loss
from prefarena.objectives.rollouts import Advantages, Judged, Minibatch
from prefarena.settings.on_policy import GroupTraining, OnPolicy


class ReinforcePPTraining(GroupTraining):
    """A token's advantage is the score less c times the sum of k1 from the token on, whitened over all tokens of the
    rollout batch; the loss is PPO's clipped one, without a critic (arXiv 2501.03262, section 3, "REINFORCE++").

    With groups their mean score is subtracted first ("REINFORCE++ w/ baseline" there, whose KL penalty is k2 in the
    loss).
    """

    group_size: int = Field(
        1,
        ge=1,
        description="Samples per prompt; above 1, the mean score of a prompt's samples is subtracted "
        "(REINFORCE++-baseline).",
    )
    kl_in: Literal["reward", "loss"] = Field(
        "reward",
        description="Whether the KL penalty is part of the reward or of the loss; with groups, the paper has it in "
        "the loss.",
    )
    kl_estimator: Literal["k2", "k3", "k3_straight_through"] = Field(
        "k2", description="Estimator of the penalty in the loss."
    )

    def advantages(self, rollouts: Judged, kl_coef: float) -> Advantages:
        scores, in_loss = rollouts.scores, self.kl_in == "loss"
        if self.group_size > 1:
            scores = self.in_groups(_less_mean, scores, rollouts)
        token_kl = k1(rollouts.old_logps, rollouts.reference_logps)
        penalty = torch.zeros_like(token_kl) if in_loss else token_kl
        returns = rewards_to_go(penalised_rewards(scores, penalty, rollouts.mask, kl_coef), rollouts.mask)
        rewards = rollouts.scores if in_loss else less_kl(rollouts, kl_coef)
        return Advantages(
            whiten(returns, rollouts.mask, *masked_moments(returns, rollouts.mask)),
            rewards,
            reference_logps=rollouts.reference_logps if in_loss else None,
        )

    def policy_loss(self, logps: Tensor, batch: Minibatch, kl_coef: float) -> ObjectiveOutput:
        clipped = super().policy_loss(logps, batch, kl_coef)
        return with_kl_loss(clipped, logps, batch, kl_coef, estimator=self.kl_estimator)


def _less_mean(scores: Tensor, group_size: int) -> Tensor:
    return group_advantages(scores, group_size, normalise_std=False)


class ReinforcePP(OnPolicy):
    """REINFORCE++ (arXiv 2501.03262): rewards to go, whitened over the batch, and PPO's clip; no critic."""

    formula: ClassVar[str] = r"s-c\sum_{i\ge t}k_{1,i}\text{, whitened over the batch}"
    kind: Literal["reinforce_pp"] = "reinforce_pp"
    training: ReinforcePPTraining = ReinforcePPTraining()
