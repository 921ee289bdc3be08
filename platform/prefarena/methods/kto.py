"""KTO: Kahneman-Tversky Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from prefarena.settings.unpaired import Unpaired


class KTO(Unpaired):
    """Kahneman-Tversky Optimization (arXiv 2402.01306): desirable and undesirable responses, against a KL baseline.

    Equations 7 and 8: lambda_D (1 - sigma(beta (rho - z0))) of a desirable response, lambda_U (1 - sigma(beta (z0 -
    rho))) of an undesirable one, rho = log pi - log pi_ref, z0 = max(0, mean of rho over mismatched responses): each
    prompt of the optimizer step with a response to another prompt. z0 has no gradient.
    """

    formula: ClassVar[str] = (
        r"\lambda_D\,\sigma(\beta(z_0-\rho)),\;\lambda_U\,\sigma(\beta(\rho-z_0)),\;z_0=\max(0,\mathrm{mean}\,\rho')"
    )
    baseline_of: ClassVar[Literal["responses", "mismatched responses"]] = "mismatched responses"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    desirable_weight: float = Field(1.0, ge=0, description="lambda_D in the paper.")
    undesirable_weight: float = Field(1.0, ge=0, description="lambda_U in the paper.")

    def baseline_sums(self, ratio: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([ratio.sum(), ratio.new_tensor(len(ratio))])

    def baseline(self, sums: Tensor) -> Tensor:
        return (sums[0] / sums[1]).clamp(min=0)

    def response_losses(self, ratio: Tensor, labels: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        h = self.beta * (ratio - baseline)
        desirable, undesirable = self.desirable_weight * torch.sigmoid(-h), self.undesirable_weight * torch.sigmoid(h)
        return labels * desirable + (1 - labels) * undesirable, h
