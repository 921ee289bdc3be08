"""Optimal transport between two weighted samples on a line: the smallest is matched with the smallest, and so on."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the mass of each of N atoms begins and ends, [N] each, when all mass is laid out sorted by `values`.

    Equal values lie in the order that they are given in. weights: [N], not below zero.
    """
    order = torch.sort(values, stable=True).indices
    ends = torch.empty_like(weights)
    ends[order] = weights[order].cumsum(0)
    return ends - weights, ends


def met(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The mass [N, M] that each of N atoms shares with each of M others, from the `shares` of both.

    Sorted samples of equal mass meet at equal quantiles; with weights of one each, rank by rank.
    """
    ends = torch.minimum(one[1][:, None], other[1][None, :])
    return (ends - torch.maximum(one[0][:, None], other[0][None, :])).clamp(min=0)
