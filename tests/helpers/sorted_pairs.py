"""The loss of AOT a second time: batches are sorted, and a soft label is a pair that stands there several times."""

from __future__ import annotations

import torch
from torch import Tensor

from prefarena.methods.aot import AOT
from prefarena.objectives.preference import PairLogps


def aot(method: AOT, policy: PairLogps, reference: PairLogps, labels: Tensor, parts: int = 1) -> Tensor:
    """The mean over pairs, as the paper has it, of a batch that holds each pair `parts` times.

    labels: multiples of 1 / parts; so many copies are as given, the others turned round.
    """
    copies = (labels[:, None] * parts).round() > torch.arange(parts)  # [B, parts]: as given

    def repeated(pair: PairLogps) -> PairLogps:
        both = [value[:, None].expand(copies.shape) for value in (pair.chosen, pair.rejected)]
        return PairLogps(*(torch.where(copies, a, b).flatten() for a, b in (both, both[::-1])))

    own, other = repeated(policy), repeated(reference)
    if method.form == "paired":
        larger, smaller = own.chosen - own.rejected, other.chosen - other.rejected
    else:
        larger, smaller = own.chosen - other.chosen, own.rejected - other.rejected
    gaps = torch.sort(larger).values - torch.sort(smaller).values
    return torch.log1p(torch.exp(-method.beta * gaps)).mean()
