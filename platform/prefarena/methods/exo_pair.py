"""EXO on pairs: Efficient Exact Optimization."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class EXOPair(OrderedLoss):
    """Efficient Exact Optimization on pairs (arXiv 2402.00856): the reverse KL where DPO has the forward one.

    KL(q || p) over the two orderings, q = (sigma(h), sigma(-h)), h = beta (rho_w - rho_l), rho = log pi - log pi_ref,
    and p = (1 - e, e) the label, smoothed as this KL needs it: e = label_smoothing.
    """

    formula: ClassVar[str] = r"q\log\frac q{1-\varepsilon}+(1-q)\log\frac{1-q}\varepsilon,\;q=\sigma(h)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["exo_pair"] = "exo_pair"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(1e-3, gt=0, lt=0.5)

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        h = self.beta * policy.minus(reference).margin
        won, lost = F.logsigmoid(h), F.logsigmoid(-h)
        won_is, lost_is = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        return won.exp() * (won - won_is) + lost.exp() * (lost - lost_is), h
