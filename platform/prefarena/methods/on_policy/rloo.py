"""RLOO: REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from typing import ClassVar, Literal

from prefarena.objectives.advantages import leave_one_out_advantages, less_kl
from prefarena.objectives.rollouts import Advantages, Judged
from prefarena.settings.on_policy import GroupTraining, OnPolicy


class RLOOTraining(GroupTraining):
    """A response's advantage is its reward less the mean of the others in its group (arXiv 2402.14740), the
    same at every token; the KL penalty is part of the reward.
    """

    def advantages(self, rollouts: Judged, kl_coef: float) -> Advantages:
        rewards = less_kl(rollouts, kl_coef)
        found = self.in_groups(leave_one_out_advantages, rewards, rollouts)
        return Advantages(found[:, None] * rollouts.mask, rewards)


class RLOO(OnPolicy):
    """REINFORCE, leave one out (arXiv 2402.14740): a response against the others to its prompt; no critic."""

    formula: ClassVar[str] = r"q-\mathrm{mean}_{G\setminus i}\,q,\;q=s-c\sum_t k_{1,t}"
    kind: Literal["rloo"] = "rloo"
    training: RLOOTraining = RLOOTraining()
