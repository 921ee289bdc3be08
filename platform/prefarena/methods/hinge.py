"""Hinge: the rank calibration of SLiC-HF, and its form with a reference."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps, scaled
from prefarena.settings.off_policy import OrderedLoss


class Hinge(OrderedLoss):
    """Hinge loss, as in SLiC-HF (arXiv 2305.10425) with `reference: none`, beta 1.

    Its calibration loss is max(0, margin - log pi(y_w) + log pi(y_l)), here max(0, margin - h), h = beta (s_w - s_l):
    s = log pi, or with a reference log pi - log pi_ref, as in RSO (arXiv 2309.06657), whose margin is 1. SLiC's
    regulariser, the likelihood of answers that the reference was trained on, is `demonstration_weight`.
    """

    formula: ClassVar[str] = r"\max(0,\,m-h),\;h=\beta(s_w-s_l),\;m=\text{margin}"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["hinge"] = "hinge"
    beta: float = Field(0.1, gt=0)
    margin: float = Field(1.0, gt=0, description="The h above which a pair costs nothing; delta in SLiC.")
    reference: Literal["none", "precomputed"] = Field(
        "precomputed", description="`none` is SLiC's form; `precomputed` starts every pair at h = 0."
    )
    length_normalise: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.reference == "precomputed"

    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        scores = policy.minus(reference) if self.needs_reference else policy
        h = self.beta * scaled(scores, num_tokens, self.length_normalise).margin
        return torch.relu(self.margin - h), h
