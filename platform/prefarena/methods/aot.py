"""AOT: alignment in distribution, by optimal transport between sorted batches."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.ranked import Ranked


class AOT(Ranked):
    """Alignment via Optimal Transport (arXiv 2406.05882): sorted batches are compared, rank by rank.

    -log sigma(beta (u_(k) - v_(k))) over the ranks k of an optimizer step. `paired`: u is a pair's log pi(y_w) - log
    pi(y_l) and v the same of the reference. `unpaired`: u is rho = log pi - log pi_ref of chosen responses, v that of
    rejected ones, whose pairs are forgotten.
    """

    formula: ClassVar[str] = (
        r"-\log\sigma(\beta(u_{(k)}-v_{(k)})),\;u=\ell_w-\ell_l,\;v=\ell^\text{ref}_w-\ell^\text{ref}_l"
        r"\text{ or }u=\rho_w,\;v=\rho_l"
    )
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["aot"] = "aot"
    beta: float = Field(0.1, gt=0)
    form: Literal["paired", "unpaired"] = Field(
        "paired", description="What is sorted: margins of pairs, or chosen and rejected responses by themselves."
    )

    def better(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return policy.margin if self.form == "paired" else policy.minus(reference).chosen

    def worse(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return reference.margin if self.form == "paired" else policy.minus(reference).rejected

    def margins(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return self.beta * policy.minus(reference).margin

    def cost(self, gap: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * gap)
