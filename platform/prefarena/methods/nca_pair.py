"""NCA on pairs: Noise Contrastive Alignment."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class NCAPair(OrderedLoss):
    """Noise Contrastive Alignment on pairs (arXiv 2402.05369): also holds the likelihood of the chosen up.

    -log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2, r = beta (log pi - log pi_ref).
    """

    formula: ClassVar[str] = r"-\log\sigma(r_w)-\tfrac12\log\sigma(-r_w)-\tfrac12\log\sigma(-r_l)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["nca_pair"] = "nca_pair"
    beta: float = Field(0.1, gt=0)

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        ratio = policy.minus(reference)
        won, lost = self.beta * ratio.chosen, self.beta * ratio.rejected
        return -F.logsigmoid(won) - (F.logsigmoid(-won) + F.logsigmoid(-lost)) / 2, won - lost
