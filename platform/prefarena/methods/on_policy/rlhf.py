"""RLHF: a reward, and Proximal Policy Optimization with a critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from prefarena.objectives.advantages import generalised_advantages, masked_moments, penalised_rewards, whiten
from prefarena.objectives.kl import k1
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.ppo import value_loss
from prefarena.objectives.rollouts import Advantages, Judged, Minibatch
from prefarena.settings.on_policy import CriticTraining, OnPolicy


class PPOTraining(CriticTraining):
    """The KL penalty is part of each token's reward. Advantages are GAE's (arXiv 1506.02438, equation 16), whitened
    over the whole rollout batch; the policy's loss is equation 7 of arXiv 1707.06347.
    """

    value_clip: float = Field(0.2, gt=0)
    discount: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)

    def advantages(self, rollouts: Judged, kl_coef: float) -> Advantages:
        if rollouts.values is None:
            raise TypeError("PPO needs the critic's values")
        token_kl = k1(rollouts.old_logps, rollouts.reference_logps)
        rewards = penalised_rewards(rollouts.scores, token_kl, rollouts.mask, kl_coef)
        advantages, returns = generalised_advantages(
            rewards, rollouts.values, rollouts.mask, discount=self.discount, gae_lambda=self.gae_lambda
        )
        advantages = whiten(advantages, rollouts.mask, *masked_moments(advantages, rollouts.mask))
        return Advantages(advantages, rewards.sum(1), returns=returns)

    def value_loss(self, values: Tensor, batch: Minibatch) -> ObjectiveOutput:
        """Squared errors, clipped about the old values as the policy's ratios are about 1."""
        if batch.values is None or batch.returns is None:
            raise TypeError("PPO needs the critic's values")
        return value_loss(values, batch.values, batch.returns, batch.mask, clip=self.value_clip)


class RLHF(OnPolicy):
    """Proximal Policy Optimization with a critic (arXiv 1707.06347), on a reward model by default."""

    formula: ClassVar[str] = r"\text{GAE of }\;s\cdot[t=T]-c\,k_{1,t}\text{, whitened over the batch}"
    searched: ClassVar[tuple[str, ...]] = ("training.critic_learning_rate",)
    kind: Literal["rlhf"] = "rlhf"
    training: PPOTraining = PPOTraining()
