"""SPPO with hard labels: Self-Play Preference Optimization, one round of it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class SPPOHard(OrderedLoss):
    """Self-Play Preference Optimization, its loss with hard labels (arXiv 2405.00675), on the pairs that there are.

    Equation 4.7 with probabilities 1 and 0: (rho_w - 1 / (2 beta))^2 + (rho_l + 1 / (2 beta))^2, rho = log pi -
    log pi_ref; the paper's eta is 1 / beta. The paper draws new pairs from the policy after each round; this is one.
    """

    formula: ClassVar[str] = r"(\rho_w-\tfrac1{2\beta})^2+(\rho_l+\tfrac1{2\beta})^2"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["sppo_hard"] = "sppo_hard"
    beta: float = Field(0.1, gt=0)

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        ratio = policy.minus(reference)
        target = 1 / (2 * self.beta)
        return (ratio.chosen - target) ** 2 + (ratio.rejected + target) ** 2, ratio.margin
