"""KL on prompts without preference pairs, at equal gain on prompts with pairs: which method drifts where no pair is?

A method's settings trace a curve: gain in reward on prompts with pairs against KL(pi || pi_ref) on prompts without.
Methods are compared where their curves reach the same gain, seed by seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefarena.report.results import Results, mean_and_error, with_gains
from prefarena.report.tables import MISSING, Table, number

GAIN = "gain/covered"


def kl_at_gain(gains: ArrayLike, kls: ArrayLike, levels: ArrayLike) -> np.ndarray:
    """KL [L] at gain `levels` [L] on the curve through points (`gains`, `kls`) [N]; nan outside their range.

    Piecewise linear in sqrt(KL) against the gain, hence monotone between neighbouring points: near the reference KL
    grows with the square of the gain, so that sqrt(KL) is near straight where KL is not. Points of equal gain are
    averaged. Raises ValueError for a negative KL, and for fewer than two different gains.
    """
    x, y = np.asarray(gains, dtype=np.float64), np.asarray(kls, dtype=np.float64)
    if (y < 0).any():
        raise ValueError(f"a KL divergence cannot be negative: {y.min()}")
    at, index = np.unique(x, return_inverse=True)
    if len(at) < 2:
        raise ValueError("a curve needs at least two different gains")
    roots = np.bincount(index, weights=np.sqrt(y)) / np.bincount(index)
    return np.interp(np.asarray(levels, dtype=np.float64), at, roots, left=np.nan, right=np.nan) ** 2


def shared_range(curves: list[np.ndarray]) -> tuple[float, float] | None:
    """The gains that every curve ([N, 2]: gain, KL) reaches, or None where there are none."""
    low = max(float(curve[:, 0].min()) for curve in curves)
    high = min(float(curve[:, 0].max()) for curve in curves)
    return (low, high) if low < high else None


def paired_ratio(values: ArrayLike, baseline: ArrayLike) -> tuple[float, float | None]:
    """Mean over seeds of values / baseline [S], with its standard error (None for one seed)."""
    ratios = np.asarray(values, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    return mean_and_error(list(ratios))


@dataclass(frozen=True)
class Leakage:
    """`kls[group]` [S, L]: KL per seed and gain level (nats). Groups and seeds keep the results' order."""

    measure: str
    seeds: list[str]
    levels: np.ndarray  # [L]
    kls: dict[str, np.ndarray]
    left_out: dict[str, str]  # group -> why

    def ratios(self, baseline: str) -> dict[str, list[tuple[float, float | None]]]:
        """Per group, at each level and then for the geometric mean over levels: ratio to `baseline`, paired by seed."""
        base = self.kls[baseline]
        found = {}
        for group, kls in self.kls.items():
            by_level = [paired_ratio(kls[:, index], base[:, index]) for index in range(len(self.levels))]
            overall = np.exp(np.log(kls / base).mean(axis=1))
            found[group] = [*by_level, mean_and_error(list(overall))]
        return found


def curves_of(results: Results, measure: str = "kl/uncovered") -> dict[str, dict[str, np.ndarray]]:
    """group -> seed -> [N, 2] of (gain on prompts with pairs, `measure`), one row for each setting of the group."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for group, entries in with_gains(results).groups().items():
        by_seed: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            for seed, row in entry.seeds.items():
                if GAIN in row and measure in row:
                    by_seed.setdefault(seed, []).append((row[GAIN], max(0.0, row[measure])))
        if by_seed:
            found[group] = {seed: np.array(points) for seed, points in by_seed.items()}
    return found


def leakage(results: Results, measure: str = "kl/uncovered", num_levels: int = 5) -> Leakage | None:
    """`measure` at `num_levels` evenly spaced gains that every group reaches with every seed.

    Gains under a tenth of the largest are not used: both KLs are near zero there, and their ratio says little. A
    group is left out, with the reason, when it has fewer than two settings, lacks a seed, reaches no gain above the
    reference, or stands in the way of a range of gains that the others share. None when no two groups share one.
    """
    curves = curves_of(results, measure)
    seeds = [str(seed) for seed in results.seeds]
    left_out: dict[str, str] = {}
    for group, by_seed in curves.items():
        if any(len(np.unique(by_seed[seed][:, 0])) < 2 for seed in seeds if seed in by_seed):
            left_out[group] = "a single setting, no curve"
        elif any(seed not in by_seed for seed in seeds):
            left_out[group] = "not every seed was run"
        elif any(by_seed[seed][:, 0].max() <= 0 for seed in seeds):
            left_out[group] = "no gain over the reference"
    kept = {group: by_seed for group, by_seed in curves.items() if group not in left_out}
    common = None
    while len(kept) >= 2 and common is None:
        common = shared_range([by_seed[seed] for by_seed in kept.values() for seed in seeds])
        if common is None:
            stray = max(kept, key=lambda group: _overlap(kept, seeds, without=group))
            del kept[stray]
            left_out[stray] = "its grid does not reach the other methods' gains with every seed"
    if common is None or common[1] <= 0:
        return None
    levels = np.linspace(max(common[0], 0.1 * common[1]), common[1], num_levels)
    kls = {
        group: np.stack([kl_at_gain(by_seed[seed][:, 0], by_seed[seed][:, 1], levels) for seed in seeds])
        for group, by_seed in kept.items()
    }
    return Leakage(measure, seeds, levels, kls, left_out)


def _overlap(kept: dict[str, dict[str, np.ndarray]], seeds: list[str], without: str) -> float:
    """The width of the gains shared by all groups but one; negative where a gap parts them."""
    gains = [by_seed[seed][:, 0] for group, by_seed in kept.items() if group != without for seed in seeds]
    return float(min(values.max() for values in gains) - max(values.min() for values in gains))


def baseline_of(found: Leakage) -> str:
    """The group that ratios are taken to: IPO where it was run, else the first."""
    return "ipo" if "ipo" in found.kls else next(iter(found.kls))


def leakage_tables(found: Leakage, title: str) -> tuple[Table, Table]:
    """KL at each gain (mean ± standard error over seeds), and its ratio to the baseline, paired by seed."""
    header = ("method", *(f"gain {level:.2f}" for level in found.levels))
    rows = tuple(
        (group, *(_cell(mean_and_error(list(kls[:, index]))) for index in range(len(found.levels))))
        for group, kls in found.kls.items()
    )
    base = baseline_of(found)
    ratio_rows = tuple(
        (group, *((_cell(ratio) if group != base else "1") for ratio in ratios))
        for group, ratios in found.ratios(base).items()
    )
    errors = f"± one standard error over {len(found.seeds)} seeds" if len(found.seeds) > 1 else "one seed: no error"
    left = "".join(f" {group} is left out: {why}." for group, why in found.left_out.items())
    caption = (
        f"Nats per response, where each method's grid of settings reaches the same gain in reward on prompts with "
        f"pairs; interpolated for each seed, linear in √KL between settings; {errors}.{left}"
    )
    ratio_caption = (
        f"Ratios to {base} at equal gain, paired by seed; the last column is "
        f"their geometric mean over the gains; {errors}."
    )
    return (
        Table(title, header, rows, caption),
        Table(f"{title}, as a ratio to {base}", (*header, "all"), ratio_rows, ratio_caption),
    )


def _cell(value: tuple[float, float | None]) -> str:
    mean, error = value
    if not np.isfinite(mean):
        return MISSING
    return number(mean, 3) if error is None else f"{number(mean, 3)} ± {number(error, 3)}"
