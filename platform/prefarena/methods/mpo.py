"""MPO: Maximum Preference Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps, scaled
from prefarena.settings.off_policy import Pairwise


class MPO(Pairwise):
    """Maximum Preference Optimization with importance sampling (arXiv 2312.16430).

    -E[p sigma(h) + (1 - p) sigma(-h)]: the importance-sampled expected reward of the preference policy
    pi^p = sigma(h), where h = beta (log pi(y_w) - log pi(y_l)), the paper's final form; with a reference, log pi is
    replaced by log pi - log pi_ref, and every pair starts at h = 0. The gradient is -pi^p grad log pi^p: bounded, and
    fading on pairs that are settled either way. The regularisers (eta, gamma) are likelihood terms, see
    objectives/likelihood.py.
    """

    formula: ClassVar[str] = r"-\sigma(h),\;h=\beta(s_w-s_l)"
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["mpo"] = "mpo"
    beta: float = Field(1.0, gt=0)
    reference: Literal["none", "precomputed"] = Field(
        "precomputed", description="`none` is the paper's final form; `precomputed` starts every pair at h = 0."
    )
    length_normalise: bool = False
    demonstration_weight: float = Field(0.05, ge=0, description="eta: weight of the off-policy forward-KL term.")

    @property
    def needs_reference(self) -> bool:
        return self.reference == "precomputed"

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        scores = policy.minus(reference) if self.needs_reference else policy
        h = self.beta * scaled(scores, num_tokens, self.length_normalise).margin
        losses = -(labels * torch.sigmoid(h) + (1 - labels) * torch.sigmoid(-h))
        return losses, h
