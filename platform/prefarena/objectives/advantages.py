"""Advantages of on-policy methods, as pure functions: over groups of responses to one prompt, or per token (PPO)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefarena.objectives.kl import k1
from prefarena.objectives.output import inside
from prefarena.objectives.ppo import (
    explained_variance,
    generalised_advantages,
    masked_moments,
    penalised_rewards,
    whiten,
)
from prefarena.objectives.rollouts import Judged

__all__ = [
    "among_scored",
    "explained_variance",
    "generalised_advantages",
    "group_advantages",
    "leave_one_out_advantages",
    "less_kl",
    "masked_moments",
    "penalised_rewards",
    "rewards_to_go",
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


def rewards_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return [B, T]: the sum of a row's rewards [B, T] from each token on, zero outside the mask."""
    return inside(inside(rewards, mask).flip(1).cumsum(1).flip(1), mask)


def less_kl(rollouts: Judged, kl_coef: float) -> Tensor:
    """Scores [B] less the penalty for each response's k1 to the reference."""
    token_kl = k1(rollouts.old_logps, rollouts.reference_logps)
    return rollouts.scores - kl_coef * (token_kl * rollouts.mask).sum(1)


def among_scored(
    compare: Callable[[Tensor, int], Tensor], rewards: Tensor, scored: Tensor | None, group_size: int
) -> Tensor:
    """Apply `compare` to rewards [B] in groups of `group_size` rows, using only the rows of a group that have a score.

    scored: [B] bool; None means that all have a score. Rows without one, and the only row with one in its group, get 0.
    """
    if scored is None or scored.all():
        return compare(rewards, group_size)
    found = torch.zeros_like(rewards)
    for rows in torch.arange(len(rewards), device=rewards.device).split(group_size):
        there = rows[scored[rows]]
        if len(there) > 1:
            found[there] = compare(rewards[there], len(there))
    return found
