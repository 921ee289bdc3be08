"""CPO: Contrastive Preference Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class CPO(OrderedLoss):
    """Contrastive Preference Optimization (arXiv 2401.08417): DPO without a reference, and fine-tuning on the chosen.

    Equation 3 and the likelihood term beside it: -log sigma(h) - likelihood_weight log pi(y_w), summed over tokens,
    h = beta (log pi(y_w) - log pi(y_l)).
    """

    formula: ClassVar[str] = r"-\log\sigma(h)-\lambda\ell_w,\;h=\beta(\ell_w-\ell_l)"
    searched: ClassVar[tuple[str, ...]] = ("beta", "likelihood_weight")
    kind: Literal["cpo"] = "cpo"
    beta: float = Field(0.1, gt=0)
    likelihood_weight: float = Field(
        1.0, ge=0, description="Weight of -log pi(y_w), in nats per sequence; 1 in the paper."
    )

    @property
    def needs_reference(self) -> bool:
        return False

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        h = self.beta * policy.margin
        return -F.logsigmoid(h) - self.likelihood_weight * policy.chosen, h
