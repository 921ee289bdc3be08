"""What an objective returns: means in two addable parts, so that micro-batches and workers change nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean as `total / count`, both scalars []. Adding two of them gives the mean over both batches."""

    total: Tensor
    count: Tensor

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        """The mean; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class ObjectiveOutput:
    """`loss.total` is the sum to differentiate; the step divides it by the count over the whole optimizer step."""

    loss: Mean
    metrics: dict[str, Mean]

    def plus(self, penalty: ObjectiveOutput, weight: float) -> ObjectiveOutput:
        """Add a weighted penalty to the loss; both are means over the same things. Metrics stay."""
        return ObjectiveOutput(Mean(self.loss.total + weight * penalty.loss.total, self.loss.count), self.metrics)


def inside(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` inside the bool mask, zero outside: not even NaN or infinity there reaches a sum or a gradient.

    What is differentiated must go through here before the arithmetic, not after it: zero times the derivative at NaN is
    NaN.
    """
    return torch.where(mask, values, 0)


def mean_of(values: Tensor, mask: Tensor | None = None) -> Mean:
    """The mean of `values` (any shape), over the true positions of `mask` when given."""
    if mask is None:
        return Mean(values.sum(), values.new_tensor(values.numel()))
    return Mean(inside(values, mask).sum(), mask.sum().to(values.dtype))
