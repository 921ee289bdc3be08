"""Every method of a sweep against DPO: regret at equal KL, and KL without pairs at equal gain.

A method's settings trace a curve for each seed. Two methods are compared where both of their curves are, seed by seed,
and the differences over seeds are tested with Holm's correction for the number of methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prefarena.report.leakage import GAIN, kl_at_gain
from prefarena.report.results import Aggregate, Results, mean_and_error, with_gains
from prefarena.report.significance import holm, p_value
from prefarena.report.tables import MISSING, Table, number, plus_minus

BASELINE = "dpo"
_KL, _REGRET, _LEAKED = "kl/covered", "regret/covered", "kl/uncovered"
_LEVELS = 9  # where two curves are read, evenly spaced in what both reach

Curves = dict[str, dict[str, np.ndarray]]  # group -> seed -> [N, 2] of (x, y), a row for each setting


@dataclass(frozen=True)
class Against:
    """A method compared with DPO. kls: its smallest and largest KL, means over seeds, nats.

    regret: its regret less DPO's at equal KL. leaked: its KL without pairs over DPO's at equal gain, as a logarithm.
    Means over the levels that both reach, then over seeds; none where they reach none in common with some seed.
    """

    group: str
    kls: tuple[float, float]
    regret: Aggregate | None
    leaked: Aggregate | None


def against(results: Results) -> list[Against]:
    """Every group with a curve except DPO's; empty where DPO has no curve, or regret is not known."""
    rows = with_gains(results)
    regrets, leaks = _curves(rows, _KL, _REGRET), _curves(rows, GAIN, _LEAKED)
    if BASELINE not in regrets:
        return []
    seeds = [str(seed) for seed in results.seeds]
    return [
        Against(
            group,
            _range(regrets[group]),
            _over_seeds([_difference(regrets[group].get(s), regrets[BASELINE].get(s)) for s in seeds]),
            _over_seeds([_ratio(leaks.get(group, {}).get(s), leaks.get(BASELINE, {}).get(s)) for s in seeds]),
        )
        for group in regrets
        if group != BASELINE
    ]


def against_table(results: Results) -> Table | None:
    """The table of all methods against DPO; None where there is nothing to compare."""
    found = against(results)
    if not any(one.regret or one.leaked for one in found):
        return None
    corrected = [_corrected([getattr(one, key) for one in found]) for key in ("regret", "leaked")]
    rows = tuple(
        (
            one.group,
            f"{number(one.kls[0], 2)} – {number(one.kls[1], 2)}",
            plus_minus(one.regret, 3),
            _p(corrected[0][place]),
            plus_minus(_as_ratio(one.leaked), 2),
            _p(corrected[1][place]),
        )
        for place, one in enumerate(found)
    )
    errors = f"± one standard error over {len(results.seeds)} seeds" if len(results.seeds) > 1 else "one seed: no error"
    caption = (
        f"On prompts with pairs: the KL range of a method's settings, and its regret minus that of {BASELINE}, "
        f"averaged over the KLs that both reach (above 0: worse). Then its KL on prompts without pairs divided by "
        f"that of {BASELINE}, likewise at equal gain (a geometric mean; above 1: it leaks more). Curves are "
        f"interpolated between settings, linearly in √KL, and paired by seed; {errors}. p: Student's t test over "
        f"seeds, with Holm's correction for all methods in a column. {MISSING}: with some seed the two have no range "
        f"in common."
    )
    header = ("method", "KL, nats", f"regret − {BASELINE}’s", "p", f"leakage / {BASELINE}’s", "p")
    return Table(f"Against {BASELINE}", header, rows, caption)


def _curves(results: Results, x: str, y: str) -> Curves:
    """The curves of groups with at least two settings, for every seed."""
    found: Curves = {}
    for group, entries in results.groups().items():
        by_seed: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            for seed, row in entry.seeds.items():
                if x in row and y in row:
                    by_seed.setdefault(seed, []).append((row[x], row[y]))
        curves = {seed: np.array(sorted(points)) for seed, points in by_seed.items()}
        if curves and all(len(np.unique(curve[:, 0])) > 1 for curve in curves.values()):
            found[group] = curves
    return found


def _range(curves: dict[str, np.ndarray]) -> tuple[float, float]:
    ends = np.array([(curve[0, 0], curve[-1, 0]) for curve in curves.values()])
    return float(ends[:, 0].mean()), float(ends[:, 1].mean())


def _levels(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    if one is None or other is None:
        return None
    low, high = max(one[0, 0], other[0, 0]), min(one[-1, 0], other[-1, 0])
    return np.linspace(low, high, _LEVELS) if low < high else None


def _difference(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """Mean over shared KLs of one's regret less the other's, each interpolated linearly in the root of KL."""
    levels = _levels(one, other)
    if levels is None or one is None or other is None:
        return None
    values = [np.interp(np.sqrt(levels), np.sqrt(np.maximum(c[:, 0], 0)), c[:, 1]) for c in (one, other)]
    return float((values[0] - values[1]).mean())


def _ratio(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """Mean over shared gains above zero of the logarithm of one's KL over the other's."""
    levels = _levels(one, other)
    if levels is None or one is None or other is None or levels[-1] <= 0:
        return None
    levels = np.linspace(max(levels[0], 0.1 * levels[-1]), levels[-1], _LEVELS)
    values = [kl_at_gain(c[:, 0], np.maximum(c[:, 1], 0), levels) for c in (one, other)]
    return float(np.log(values[0] / values[1]).mean())


def _over_seeds(values: list[float | None]) -> Aggregate | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean, error = mean_and_error(known)
    return Aggregate(mean, error, len(known), len(known) > 1)


def _corrected(values: list[Aggregate | None]) -> list[float | None]:
    """Fill in each one's p-value, by Holm's method for all that have one."""
    known = {place: p for place, value in enumerate(values) if value is not None and (p := p_value(value)) is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    return [corrected.get(place) for place in range(len(values))]


def _as_ratio(value: Aggregate | None) -> Aggregate | None:
    """Convert a logarithm's mean and error to those of the number itself."""
    if value is None:
        return None
    ratio = math.exp(value.mean)
    return value._replace(mean=ratio, stderr=None if value.stderr is None else ratio * value.stderr)


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else number(value, 3)
