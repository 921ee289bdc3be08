"""How much each tuned setting mattered among the trials that were made: rank statistics, setting by setting.

Trials are ranked by their value, failed ones last, and cut into a low, a middle and a high third of a setting (into its
values, where there are at most three or they have no order). The share of the ranks' variance that lies between these
groups is Kruskal and Wallis's H over n - 1. What it would be by chance is found by dealing the ranks out again. Nothing
of this sees that two settings matter together, and a search that learns looks closer where values were high.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prefarena.report.results import Results
from prefarena.report.significance import holm
from prefarena.report.tables import MISSING, Table, number
from prefarena.report.tuning import TunedCurve, shown_value, tuned_curves
from prefarena.settings.search import Value

_FEWEST = 6  # trials: two in each third
_NUM_DEALS = 2000
_MOST_VALUES = 3  # that are groups of their own


class Sensitivity(NamedTuple):
    """A setting over an entry's trials.

    correlation: Spearman's, of the setting and the value; None where the setting's values have no order. share: of the
    variance of ranks, between groups. p: how often chance gives as much. groups: each one's name and the median of what
    its trials count. are_thirds: whether the groups are the setting's low, middle and high values.
    """

    entry: str
    setting: str
    num_trials: int
    correlation: float | None
    share: float
    p: float
    groups: list[tuple[str, float]]
    are_thirds: bool

    @property
    def medians(self) -> str:
        """The medians of all groups, with their names if the groups are values."""
        return " · ".join(
            f"{'' if self.are_thirds else f'{name}: '}{number(median, 3)}" for name, median in self.groups
        )

    @property
    def best(self) -> str:
        """The group with the highest median; of equals the first."""
        return max(self.groups, key=lambda group: group[1])[0]


def sensitivities(curve: TunedCurve, seed: int) -> list[Sensitivity]:
    """One for each setting that was tried at two values at least; none for fewer than six trials."""
    if len(curve.trials) < _FEWEST:
        return []
    values = np.array([-np.inf if trial.value is None else trial.value for trial in curve.trials])
    found = []
    for name in dict.fromkeys(name for trial in curve.trials for name in trial.settings):
        tried = [trial.settings.get(name) for trial in curve.trials]
        known = [place for place, one in enumerate(tried) if one is not None]
        settings = [one for one in tried if one is not None]
        if len(known) < _FEWEST or len(set(settings)) < 2:
            continue
        ranks = average_ranks(values[known])
        groups, names = _groups(settings)
        share, p = between_groups(ranks, groups, seed)
        medians = [float(np.median(curve.counted[known][groups == place])) for place in range(len(names))]
        correlation = None
        if _has_order(settings):
            correlation = _correlation(average_ranks(np.array(settings, dtype=np.float64)), ranks)
        named, are_thirds = list(zip(names, medians, strict=True)), len(set(settings)) > len(names)
        found.append(Sensitivity(curve.entry.name, name, len(known), correlation, share, p, named, are_thirds))
    return found


def sensitivity_table(results: Results) -> Table | None:
    """A row for each entry and setting; None where nothing was tuned, or with too few trials."""
    seed = results.tuning.seed if results.tuning else 0
    found = [one for curve in tuned_curves(results) for one in sensitivities(curve, seed)]
    if not found:
        return None
    corrected = holm([one.p for one in found])
    rows = tuple(
        (
            one.entry,
            one.setting,
            str(one.num_trials),
            number(one.share, 2),
            "< 0.01" if p < 0.01 else number(p, 2),
            MISSING if one.correlation is None else number(one.correlation, 2),
            one.medians,
            one.best,
        )
        for one, p in zip(found, corrected, strict=True)
    )
    caption = (
        "Each setting by itself. Share: the part of the variance of the trials' ranks that lies between the thirds of "
        "a setting's values (or between its values, if there are few). p: how often chance gives as large a share, "
        f"with Holm's correction for all {len(found)} rows. Rank correlation: Spearman's, above 0 if larger values are "
        "better. Then the median value of the trials in each third, and the setting's values in the best third. A "
        "high p means that these trials do not show the setting to matter, not that it does not matter. Settings that "
        "matter only in combination are missed, and trials proposed by a search that learns from earlier ones are not "
        "independent."
    )
    header = ("policy", "setting", "trials", "share", "p", "rank correlation", "low · middle · high", "best")
    return Table("How much each setting mattered", header, rows, caption, 2)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n] from 1; equals share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def between_groups(ranks: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """The share of the variance of `ranks` [n] between `groups` [n], and how often as much comes by chance.

    Ranks that are all alike have no variance: a share of 0, which chance always gives.
    """
    centred = ranks - ranks.mean()
    total = float((centred**2).sum())
    if total == 0:
        return 0.0, 1.0
    members = (groups[:, None] == np.unique(groups)).astype(np.float64)  # [n, G]
    sizes = members.sum(axis=0)
    share = float(((centred @ members) ** 2 / sizes).sum()) / total
    generator = np.random.default_rng(seed)
    dealt = generator.permuted(np.tile(centred, (_NUM_DEALS, 1)), axis=1)
    by_chance = ((dealt @ members) ** 2 / sizes).sum(axis=1) / total
    return share, (1 + int((by_chance >= share - 1e-12).sum())) / (1 + _NUM_DEALS)


def _has_order(settings: list[Value]) -> bool:
    return not any(isinstance(one, bool | str) for one in settings)


def _groups(settings: list[Value]) -> tuple[np.ndarray, list[str]]:
    """Each trial's group [n], and the groups' names."""
    different = sorted(set(settings), key=lambda one: (isinstance(one, str), one))
    if not _has_order(settings) or len(different) <= _MOST_VALUES:
        return np.array([different.index(one) for one in settings]), [shown_value(one) for one in different]
    ranks = average_ranks(np.array(settings, dtype=np.float64))
    thirds = np.floor(3 * (ranks - 0.5) / len(ranks)).astype(int)
    kept = np.unique(thirds)
    names = []
    for third in kept:
        inside = [one for one, place in zip(settings, thirds, strict=True) if place == third]
        low, high = shown_value(min(inside)), shown_value(max(inside))
        names.append(low if low == high else f"{low} to {high}")
    return np.searchsorted(kept, thirds), names


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's correlation; None where one of them is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
