"""Losses as users write them, for `kind: custom`: one that works, and ones that do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefarena.objectives.preference import PairLogps

Losses = tuple[Tensor, Tensor]
NO_LOSS = 3


def logistic(
    policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps, beta: float = 0.1
) -> Losses:
    """DPO, written out."""
    h = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    return -(labels * F.logsigmoid(h) + (1 - labels) * F.logsigmoid(-h)), h


def detached(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    h = policy.margin
    return -h.detach(), h


def mean(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    h = policy.margin
    return -h.mean(), h


def alone(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Tensor:
    return -policy.margin


def numbers(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> tuple[Tensor, float]:
    return -policy.margin, 1.0


def counted(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    return -policy.margin, labels > 0


def whitened(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    """Depends on who else is in the batch."""
    h = policy.margin
    return -(h - h.mean()) * h, h


def infinite(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    h = policy.margin
    return torch.log(-policy.chosen.exp()), h


def broken(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    raise KeyError("reward")


def few(policy: PairLogps, reference: PairLogps) -> Losses:
    return -policy.margin, policy.margin


def breaks_on_larger_batches(policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Losses:
    if len(labels) > 3:
        raise ValueError("too many of them")
    return -policy.margin, policy.margin
