"""APO-down: Anchored Preference Optimization for chosen responses that are worse than the model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class APODown(OrderedLoss):
    """Anchored Preference Optimization, down (arXiv 2408.06266): both less likely, rejected ones more so.

    Equation 8: sigma(r_w) - sigma(r_w - r_l), r = beta (log pi - log pi_ref). For chosen responses that are worse than
    the model's own.
    """

    formula: ClassVar[str] = r"\sigma(r_w)-\sigma(r_w-r_l)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["apo_down"] = "apo_down"
    beta: float = Field(0.1, gt=0)

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        ratio = policy.minus(reference)
        h = self.beta * ratio.margin
        return torch.sigmoid(self.beta * ratio.chosen) - torch.sigmoid(h), h
