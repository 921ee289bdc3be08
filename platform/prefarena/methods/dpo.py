"""DPO: Direct Preference Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps, scaled
from prefarena.settings.off_policy import Pairwise


class DPO(Pairwise):
    """Direct Preference Optimization (arXiv 2305.18290); label_smoothing > 0 is cDPO.

    Equation 7 with soft labels: -E[p log sigma(h) + (1 - p) log sigma(-h)], h = beta (rho_w - rho_l),
    rho = log pi - log pi_ref, and p moved towards its opposite by `label_smoothing`.
    """

    formula: ClassVar[str] = r"-(1-\varepsilon)\log\sigma(h)-\varepsilon\log\sigma(-h)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    length_normalise: bool = False

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        h = self.beta * scaled(policy.minus(reference), num_tokens, self.length_normalise).margin
        p = labels * (1 - self.label_smoothing) + (1 - labels) * self.label_smoothing
        losses = -(p * F.logsigmoid(h) + (1 - p) * F.logsigmoid(-h))
        return losses, h
