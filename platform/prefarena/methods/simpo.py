"""SimPO: Simple Preference Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class SimPO(OrderedLoss):
    """Simple Preference Optimization (arXiv 2405.14734): no reference, log-probs of a token, and a margin.

    Equation 6: -log sigma(h - margin), h = beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|).
    """

    formula: ClassVar[str] = r"-\log\sigma(h-m),\;h=\beta(\bar\ell_w-\bar\ell_l),\;m=\text{margin}"
    searched: ClassVar[tuple[str, ...]] = ("beta", "margin")
    kind: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    margin: float = Field(1.0, ge=0, description="gamma in the paper.")

    @property
    def needs_reference(self) -> bool:
        return False

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        h = self.beta * policy.per_token(num_tokens).margin
        return -F.logsigmoid(h - self.margin), h
