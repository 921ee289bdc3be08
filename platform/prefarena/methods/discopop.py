"""DiscoPOP: a loss that a language model proposed, logistic and exponential mixed."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class DiscoPOP(OrderedLoss):
    """DiscoPOP, the log-ratio modulated loss (arXiv 2406.08414): logistic and exponential, mixed by the margin.

    Equation 5: (1 - m) (-log sigma(h)) + m exp(-h), m = sigma(h / temperature), h = beta (rho_w - rho_l),
    rho = log pi - log pi_ref. Not monotone: with a small temperature it rises with h about h = 0, so that it
    first pushes a pair at the reference the wrong way.
    """

    formula: ClassVar[str] = r"-(1-\mu)\log\sigma(h)+\mu e^{-h},\;\mu=\sigma(h/\tau)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["discopop"] = "discopop"
    beta: float = Field(0.1, gt=0)
    temperature: float = Field(0.05, gt=0, lt=1, description="tau in the paper.")

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        h = self.beta * policy.minus(reference).margin
        logistic = -torch.sigmoid(-h / self.temperature) * F.logsigmoid(h)
        exponential = torch.exp(F.logsigmoid(h / self.temperature) - h)  # the product alone would be 0 times infinity
        return logistic + exponential, h
