"""BCO: Binary Classifier Optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from prefarena.settings.unpaired import Unpaired


class BCO(Unpaired):
    """Binary Classifier Optimization (arXiv 2404.04656): a classifier of responses by their reward, shifted.

    -log sigma(r - delta) of a desirable response, -log sigma(delta - r) of an undesirable one, r = beta rho, rho =
    log pi - log pi_ref; the shift delta is half the sum of the mean rewards of both kinds, of the optimizer step,
    without a gradient. The density ratio by which the paper may weigh undesirable responses is left out.
    """

    formula: ClassVar[str] = (
        r"-\log\sigma(r-\delta),\;-\log\sigma(\delta-r),\;\delta=\tfrac12(\mathrm{mean}_D\,r+\mathrm{mean}_U\,r)"
    )
    searched: ClassVar[tuple[str, ...]] = ("beta",)
    kind: Literal["bco"] = "bco"
    beta: float = Field(0.1, gt=0)

    def baseline_sums(self, ratio: Tensor, labels: Tensor) -> Tensor:
        r = self.beta * ratio
        return torch.stack([(labels * r).sum(), labels.sum(), ((1 - labels) * r).sum(), (1 - labels).sum()])

    def baseline(self, sums: Tensor) -> Tensor:
        """The baseline of the step; if the step has only one kind of response, the mean of that kind."""
        means = sums[0::2] / sums[1::2].clamp(min=torch.finfo(torch.float32).tiny)
        kinds = (sums[1::2] > 0).to(sums.dtype)
        return (means * kinds).sum() / kinds.sum()

    def response_losses(self, ratio: Tensor, labels: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        h = self.beta * ratio - baseline
        return -(labels * F.logsigmoid(h) + (1 - labels) * F.logsigmoid(-h)), h
