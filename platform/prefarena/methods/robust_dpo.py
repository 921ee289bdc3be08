"""Robust DPO: an unbiased loss where labels are flipped at a known rate."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps, scaled
from prefarena.settings.off_policy import OrderedLoss


class RobustDPO(OrderedLoss):
    """Robust DPO (arXiv 2403.00409): DPO's loss on clean labels, estimated without bias from noisy ones.

    ((1 - e) l(w, l) - e l(l, w)) / (1 - 2 e), e = flip_rate, l(w, l) = -log sigma(h), h = beta (rho_w - rho_l),
    rho = log pi - log pi_ref. It has no lower bound where e is above 0.
    """

    formula: ClassVar[str] = r"-\frac{(1-\varepsilon)\log\sigma(h)-\varepsilon\log\sigma(-h)}{1-2\varepsilon}"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["robust_dpo"] = "robust_dpo"
    beta: float = Field(0.1, gt=0)
    flip_rate: float = Field(0.1, ge=0, lt=0.5, description="Share of the labels that are reversed.")
    length_normalise: bool = False

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        h = self.beta * scaled(policy.minus(reference), num_tokens, self.length_normalise).margin
        kept, flipped = -(1 - self.flip_rate) * F.logsigmoid(h), -self.flip_rate * F.logsigmoid(-h)
        return (kept - flipped) / (1 - 2 * self.flip_rate), h
