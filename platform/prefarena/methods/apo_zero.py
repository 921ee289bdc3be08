"""APO-zero: Anchored Preference Optimization for chosen responses that are better than the model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class APOZero(OrderedLoss):
    """Anchored Preference Optimization, zero (arXiv 2408.06266): chosen likelier, rejected less likely.

    Equation 7: -sigma(r_w) + sigma(r_l), r = beta (log pi - log pi_ref). For chosen responses that are better than the
    model's own.
    """

    formula: ClassVar[str] = r"-\sigma(r_w)+\sigma(r_l)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["apo_zero"] = "apo_zero"
    beta: float = Field(0.1, gt=0)

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        ratio = policy.minus(reference)
        won, lost = self.beta * ratio.chosen, self.beta * ratio.rejected
        return torch.sigmoid(lost) - torch.sigmoid(won), won - lost
