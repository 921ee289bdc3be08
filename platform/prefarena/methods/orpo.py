"""ORPO: Odds Ratio Preference Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OrderedLoss


class ORPO(OrderedLoss):
    """Odds Ratio Preference Optimization (arXiv 2403.07691): fine-tuning on the chosen, and a log-odds ratio.

    Equation 6: -log p_w - odds_weight log sigma(h), h = log(p_w / (1 - p_w)) - log(p_l / (1 - p_l)), where
    log p = log pi(y) / |y|, the mean over the response's tokens (equations 2 to 5 and 7).
    """

    formula: ClassVar[str] = r"-\bar\ell_w-\lambda\log\sigma(h),\;h=o_w-o_l,\;o=\bar\ell-\log(1-e^{\bar\ell})"
    searched: ClassVar[tuple[str, ...]] = ("odds_weight",)
    kind: Literal["orpo"] = "orpo"
    odds_weight: float = Field(0.1, ge=0, description="lambda in the paper.")

    @property
    def needs_reference(self) -> bool:
        return False

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        logps = policy.per_token(num_tokens)
        h = _log_odds(logps.chosen) - _log_odds(logps.rejected)
        return -logps.chosen - self.odds_weight * F.logsigmoid(h), h


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, which rounding may have brought to 0, where the odds have no logarithm."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))
