"""Text policies through training by two rewards: the judge, and the reward that they learned from, the proxy.

The two have units of their own, so both are shown as gains over the reference in the standard deviations of its own
samples: what the proxy gains beyond the judge is over-optimisation. On the language both rewards have such units from
the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefarena.report.labels import Label, place_labels
from prefarena.report.overoptimisation import Fit, Law, fit_law
from prefarena.report.plots import along
from prefarena.report.results import Aggregate, EntryResult, EvalRow, Results, mean_and_error
from prefarena.report.style import house_style
from prefarena.report.tables import Table, plus_minus
from prefarena.report.trajectories import MOST_PANELS, colours_of, panels_for

TITLE = "Gold and proxy reward through training"
ROOT_KL = "√KL(π ‖ reference)"
GAIN = "gain in standard deviations of the reference"
NOTE = (
    "Gains over the reference, in standard deviations of its own samples on the same held-out prompts. Solid: the "
    "evaluation's judge (gold); dashed: the reward that the policy learned from (proxy). Where the dashed line rises "
    "and the solid one does not follow, the proxy is over-optimised. Dotted: the law fitted to the gold gains, where "
    "there are four policies or more (three with several seeds)."
)


class Point(NamedTuple):
    """A policy on the way; `gold` and `proxy` are gains."""

    step: float
    kl: float
    gold: float
    proxy: float

    @property
    def root(self) -> float:
        return math.sqrt(max(0.0, self.kl))


_GOLD, _PROXY = attrgetter("gold"), attrgetter("proxy")


def proxy_curves(results: Results) -> dict[str, dict[str, list[Point]]]:
    """entry -> seed -> its policies in order, where they were scored by the reward that they learned from.

    Of best-of-n, the best of ever more samples by the reward that picks them.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for entry in results.trained():
        curves = results.trajectories.get(entry.name) or results.best_of_curves.get(entry.name, {})
        for seed, rows in curves.items():
            points = [_point(row) for row in rows if row.keys() >= {"standard_gain", "standard_proxy_gain"}]
            if len(points) > 1:
                found.setdefault(entry.name, {})[seed] = points
    return found


def _point(row: EvalRow) -> Point:
    return Point(row["step"], row["kl"], row["standard_gain"], row["standard_proxy_gain"])


def law_of(results: Results, name: str, curves: Sequence[Sequence[Point]]) -> Fit | None:
    """Gao's law through the gold gains of one entry, a curve for each seed."""
    law: Law = "best of n" if is_best_of(results, name) else "learning"
    return fit_law(law, [[{"kl": point.kl, "reward": point.gold} for point in curve] for curve in curves])


def is_best_of(results: Results, name: str) -> bool:
    """Whether an entry's curve is of the best of ever more samples, and not of a policy through training."""
    return not results.trajectories.get(name)


def line_of_law(fit: Fit) -> np.ndarray:
    """(root of the KL, gain) [60, 2] along a law, as far as was measured."""
    kls, gains = fit.line().T
    return np.stack([np.sqrt(kls), gains], axis=1)


def proxy_table(results: Results) -> Table | None:
    """A row for each entry with a proxy: where the gold reward was best, what both are there and at the end."""
    rows = []
    for name, by_seed in proxy_curves(results).items():
        peaks = [max(points, key=_GOLD) for points in by_seed.values()]
        ends = [points[-1] for points in by_seed.values()]
        rows.append(
            (
                name,
                _learned_from(results.entry(name)),
                _mean(peaks, _GOLD),
                _mean(peaks, _PROXY),
                " / ".join(f"{peak.step:.0f}" for peak in peaks),
                _mean(peaks, lambda point: point.kl),
                _mean(ends, _GOLD),
                _mean(ends, _PROXY),
                _mean(ends, lambda point: point.kl),
                _mean(ends, lambda point: point.proxy - point.gold),
            )
        )
    if not rows:
        return None
    header = (
        *("policy", "proxy", "peak of gold", "proxy there", "at step or n", "KL there"),
        *("gold at the end", "proxy at the end", "KL at the end", "proxy − gold at the end"),
    )
    caption = (
        "Gains over the reference in standard deviations of its samples on held-out prompts; means over seeds ± one "
        "standard error, and steps for each seed (of best-of-n, n). Gold: the evaluation's judge. Proxy: the reward "
        "that the policy learned from, or that picks the best. Proxy − gold: over-optimisation. The KL of best-of-n "
        "is its upper bound."
    )
    return Table(f"{results.name}: gold and proxy reward", header, tuple(rows), caption, 2)


def _learned_from(entry: EntryResult) -> str:
    """The kind of the reward that an entry learned from."""
    settings = entry.settings.get("reward") or (entry.settings.get("online") or {}).get("reward") or {}
    return str(settings.get("kind", ""))


def _mean(points: Sequence[Point], value: Callable[[Point], float]) -> str:
    values = [value(point) for point in points]
    return plus_minus(Aggregate(*mean_and_error(values), len(values), True), 3)


def proxy_figure(results: Results) -> Figure | None:
    """A panel for each entry with a proxy (the first twelve): gold and proxy gains over the root of the KL."""
    found = dict(list(proxy_curves(results).items())[:MOST_PANELS])
    if not found:
        return None
    with house_style():
        figure, panels = panels_for(len(found))
        colours = colours_of(results)
        for axes, (name, by_seed) in zip(panels, found.items(), strict=False):
            curves = list(by_seed.values())
            _draw(axes, curves, law_of(results, name, curves), colours[name])
            axes.set_title(name, color=colours[name])
            axes.set_xlabel(f"{ROOT_KL}, nats$^{{1/2}}$")
        panels[0].set_ylabel(GAIN)
        for axes, (name, by_seed) in zip(panels, found.items(), strict=False):
            _label(axes, list(by_seed.values()), colours[name])
        return figure


def _draw(axes: Axes, curves: list[list[Point]], fit: Fit | None, colour: str) -> None:
    for points in curves:
        roots = [point.root for point in points]
        gold, proxy = [point.gold for point in points], [point.proxy for point in points]
        axes.plot(roots, gold, color=colour, marker="o", markersize=3.5, linewidth=1.3, zorder=4)
        axes.plot(
            roots, proxy, color=colour, linewidth=1.1, zorder=3, linestyle=(0, (4, 2)), marker="s", markersize=3,
            markerfacecolor="white",
        )  # fmt: skip
    if fit is not None:
        law = line_of_law(fit)
        axes.plot(law[:, 0], law[:, 1], color=colour, linewidth=1.0, linestyle=":", zorder=2)
    axes.margins(0.1)


def _label(axes: Axes, curves: list[list[Point]], colour: str) -> None:
    """Names beside the ends of the first seed's lines, clear of all lines."""
    end = curves[0][-1]
    labels = [Label(end.root, end.gold, "gold", colour), Label(end.root, end.proxy, "proxy", colour)]
    lines = [[(point.root, value(point)) for point in curve] for curve in curves for value in (_GOLD, _PROXY)]
    place_labels(axes, labels, np.concatenate([along(np.array(line)) for line in lines]))
