"""IPO: Identity Preference Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps, scaled
from prefarena.settings.off_policy import Pairwise


class IPO(Pairwise):
    """Identity Preference Optimization (arXiv 2310.12036); sums over tokens, as the paper does.

    Equation 17: E[(h - (2p - 1) / (2 tau))^2], h = rho_w - rho_l, rho = log pi - log pi_ref; `length_normalise`
    averages over tokens, as TRL does. With a soft label p the two orderings' losses average to this form plus a
    constant.
    """

    formula: ClassVar[str] = r"(h-\tfrac1{2\tau})^2,\;h=\rho_w-\rho_l"
    searched: ClassVar[tuple[str, ...]] = ("tau",)
    kind: Literal["ipo"] = "ipo"
    tau: float = Field(0.1, gt=0)
    length_normalise: bool = Field(False, description="If true, log-ratios are averaged over tokens, as in TRL.")

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        h = scaled(policy.minus(reference), num_tokens, self.length_normalise).margin
        losses = (h - (2 * labels - 1) / (2 * self.tau)) ** 2
        return losses, h
