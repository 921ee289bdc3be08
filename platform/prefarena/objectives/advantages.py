"""Advantages of on-policy methods, as pure functions: of groups of responses to one prompt, and (PPO's) per token."""

from __future__ import annotations

from torch import Tensor

from prefarena.objectives.ppo import (
    explained_variance,
    generalised_advantages,
    masked_moments,
    penalised_rewards,
    whiten,
)

__all__ = [
    "explained_variance",
    "generalised_advantages",
    "group_advantages",
    "leave_one_out_advantages",
    "masked_moments",
    "penalised_rewards",
    "whiten",
]


def group_advantages(scores: Tensor, group_size: int, normalise_std: bool) -> Tensor:
    """Scores [B] less their group's mean, over population std + 1e-6 if normalised; a group's rows are consecutive.

    In float64: a float32 mean of equal scores can be off by a rounding error, which their std of 0 makes an advantage.
    """
    groups = scores.double().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if normalise_std:
        centred = centred / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    return centred.flatten().to(scores.dtype)


def leave_one_out_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Scores [B] less the mean of the others in their group; groups are consecutive rows."""
    groups = scores.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()
