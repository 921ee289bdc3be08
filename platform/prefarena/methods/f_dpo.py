"""f-DPO: DPO under another divergence than the reverse KL."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss

#: Nats beyond which an exponential goes on as its tangent: float32 holds it, and its square in the gradient's norm.
_STEEPEST = 20.0


class FDPO(OrderedLoss):
    """DPO under another f-divergence (arXiv 2309.16240): forward KL, Jensen-Shannon, alpha, or DPO's own reverse KL.

    -log sigma(h), h = beta (f'(u_w) - f'(u_l)), u = pi / pi_ref = exp(rho), with f' up to a constant, table 1:
    reverse KL log u, forward KL -1 / u, Jensen-Shannon log(u / (1 + u)), alpha-divergence -u^-alpha / alpha, which
    goes from the reverse KL's (alpha 0) to the forward KL's (alpha 1).
    """

    formula: ClassVar[str] = (
        r"-\log\sigma(h),\;h=\beta(f'(e^{\rho_w})-f'(e^{\rho_l})),\;f'(u)=\log u,\;-\tfrac1u,\;\log\tfrac u{1+u},\;"
        r"-\tfrac{u^{-\alpha}}\alpha"
    )
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["f_dpo"] = "f_dpo"
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "jensen_shannon"
    beta: float = Field(0.1, gt=0)
    alpha: float = Field(0.5, gt=0, lt=1, description="The alpha of `divergence: alpha`.")

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        ratio = policy.minus(reference)
        h = self.beta * (self._slope(ratio.chosen) - self._slope(ratio.rejected))
        return -F.logsigmoid(h), h

    def _slope(self, ratio: Tensor) -> Tensor:
        """f'(exp(ratio)), up to a constant."""
        match self.divergence:
            case "reverse_kl":
                return ratio
            case "forward_kl":
                return -_exp(-ratio)
            case "jensen_shannon":
                return F.logsigmoid(ratio)
            case "alpha":
                return -_exp(-self.alpha * ratio) / self.alpha


def _exp(x: Tensor) -> Tensor:
    """exp(x), and its tangent at `_STEEPEST` beyond it, so that far pairs have a gradient that is a number."""
    return torch.exp(x.clamp(max=_STEEPEST)) * (1 + (x - _STEEPEST).clamp(min=0))
