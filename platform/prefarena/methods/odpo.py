"""ODPO: DPO with an offset, by how much better the chosen response is."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OffsetLoss


class ODPO(OffsetLoss):
    """DPO with an offset (arXiv 2402.10571): the margin is to exceed what the scores of both responses say.

    -log sigma(h - Delta), h = beta (rho_w - rho_l), rho = log pi - log pi_ref, Delta = alpha f(d), d the winner's score
    less the loser's. `scaling` is f: the logarithm, as in the authors' code, or the gap itself, with which alpha 1 is
    the loss with a margin of Llama 2's reward model (arXiv 2307.09288, equation 2). A winner that does not score higher
    has the offset log 0 = -infinity: such a pair costs nothing.
    """

    formula: ClassVar[str] = (
        r"-\log\sigma(h-\Delta),\;\Delta=\alpha\log d\text{ or }\alpha d,\;d=\text{score}_w-\text{score}_l"
    )
    searched: ClassVar[tuple[str, ...]] = ("beta", "alpha")
    kind: Literal["odpo"] = "odpo"
    beta: float = Field(0.1, gt=0)
    alpha: float = Field(1.0, gt=0, description="How much the scores count; the smaller, the nearer to DPO.")
    scaling: Literal["log", "linear"] = Field(
        "log", description="The offset grows with the logarithm of the gap between the scores, or with the gap."
    )

    def offsets(self, gaps: Tensor) -> Tensor:
        if self.scaling == "linear":
            return self.alpha * gaps
        return torch.where(gaps > 0, self.alpha * torch.log(gaps.clamp(min=0)), -torch.inf)

    def losses(
        self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = self.beta * policy.minus(reference).margin
        return -F.logsigmoid(h - offsets), h
