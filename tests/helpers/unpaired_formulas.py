"""The losses of methods on single responses a second time, in other terms than the package's; labels are 0 and 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefarena.methods.bco import BCO
from prefarena.methods.kto import KTO
from prefarena.settings.unpaired import Unpaired

METHODS: list[Unpaired] = [KTO(), KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7), BCO(), BCO(beta=0.5)]


def named(method: Unpaired) -> str:
    return "-".join([method.kind, *map(str, method.model_dump(exclude_defaults=True))])


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def kto(method: KTO, ratio: Tensor, desirable: Tensor, z0: Tensor) -> Tensor:
    """Equations 7 and 8 of arXiv 2402.01306: lambda_y - v of each response."""
    good = method.desirable_weight - method.desirable_weight * sigma(method.beta * (ratio - z0))
    bad = method.undesirable_weight - method.undesirable_weight * sigma(method.beta * (z0 - ratio))
    return torch.where(desirable, good, bad)


def bco(method: BCO, ratio: Tensor, desirable: Tensor, delta: Tensor) -> Tensor:
    """Binary cross-entropy of arXiv 2404.04656."""
    reward = method.beta * ratio - delta
    return torch.where(desirable, torch.log1p(torch.exp(-reward)), torch.log1p(torch.exp(reward)))


FORMULAS: dict[str, Callable[..., Tensor]] = {"kto": kto, "bco": bco}


def baseline_by_hand(method: Unpaired, ratios: Tensor, mismatched: Tensor, labels: Tensor) -> Tensor:
    """The step's, without a gradient; labels are 0 and 1."""
    if isinstance(method, KTO):
        return mismatched.detach().mean().clamp(min=0)
    assert isinstance(method, BCO)
    rewards = method.beta * ratios.detach()
    kinds = [rewards[labels == label] for label in (0, 1)]
    return torch.stack([kind.mean() for kind in kinds if len(kind)]).mean()
