"""Gold reward at equal KL, read from the policies measured during training, next to the reward at the end.

A table at the end of training compares policies that have moved unequally far. What a method is worth at a KL that
others reach, too, is interpolated between the two neighbouring policies, linearly in the square root of the KL: near
the reference the gain is about linear in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from prefarena.report.results import Aggregate, EvalRow, Results, mean_and_error
from prefarena.report.tables import MISSING, Table, number, plus_minus

#: Where curves are read: shares of the root of the KL that half of the entries reach.
_SHARES = (0.5, 0.75, 1.0)


def reward_at(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The reward at a KL on a curve of (KL, reward), in the order of training, where it first gets there.

    None where it never does.
    """
    for (near, first), (far, second) in pairwise(curve):
        if near <= kl <= far:
            whole = math.sqrt(far) - math.sqrt(near)
            share = (math.sqrt(kl) - math.sqrt(near)) / whole if whole > 0 else 1.0
            return first + share * (second - first)
    return None


def equal_kl_table(results: Results) -> Table | None:
    """One row for each entry that was measured during training; None if fewer than two were."""
    curves = _curves(results)
    if len(curves) < 2:
        return None
    levels = _levels(curves)
    rows = []
    for name, seeds in curves.items():
        read = [[reward_at(curve, level) for curve in seeds] for level in levels]
        cells = [_mean([value for value in found if value is not None], len(seeds)) for found in read]
        ends = [curve[-1] for curve in seeds]
        rows.append(
            (name, *cells, _mean([reward for _, reward in ends], len(ends)), _mean([kl for kl, _ in ends], len(ends)))
        )
    header = ("policy", *(f"at KL {number(level, 2)}" for level in levels), "at the end", "KL at the end")
    where = "exact, on prompts with pairs" if results.exact else "from samples on held-out prompts"
    caption = (
        f"Gold reward, {where}; means over seeds ± one standard error. It is read where a training run first reaches "
        "that KL, interpolated linearly in the square root of the KL between the policies measured before and after. "
        "A cell is empty if some seed never gets that far. Half of the entries reach the largest of these KLs."
    )
    return Table(f"{results.name}: at equal KL", header, tuple(rows), caption)


def _curves(results: Results) -> dict[str, list[list[tuple[float, float]]]]:
    """(KL, reward) of every policy measured on an entry's way, by entry, a curve for each seed."""
    kl, reward = ("kl/covered", "reward/covered") if results.exact else ("kl", "reward")
    found = {}
    for entry in results.trained():
        seeds: list[list[EvalRow]] = list(results.trajectories.get(entry.name, {}).values())
        curves = [[(max(0.0, row[kl]), row[reward]) for row in rows if kl in row and reward in row] for rows in seeds]
        curves = [curve for curve in curves if len(curve) > 1]
        if curves:
            found[entry.name] = curves
    return found


def _levels(curves: dict[str, list[list[tuple[float, float]]]]) -> list[float]:
    """The KLs to read at, in nats: as far as half of the entries go with every seed, and nearer."""
    furthest = sorted(min(max(kl for kl, _ in curve) for curve in seeds) for seeds in curves.values())
    root = math.sqrt(furthest[len(furthest) // 2])
    return [float(np.square(share * root)) for share in _SHARES]


def _mean(values: list[float], num_seeds: int) -> str:
    if not values or len(values) < num_seeds:
        return MISSING
    return plus_minus(Aggregate(*mean_and_error(values), len(values), True), 3)
