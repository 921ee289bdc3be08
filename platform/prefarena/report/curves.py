"""Training curves as small multiples, read from each run's metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefarena.report.results import EntryResult, Results
from prefarena.report.style import GREY, house_style, looks
from prefarena.stage_files import read_log

OFF_POLICY_METRICS = (
    *("loss", "preference/accuracy", "preference/margin"),
    *("response/accuracy", "response/baseline", "demonstration/nll"),
)
ON_POLICY_METRICS = ("reward/mean", "kl/k1", "entropy", "policy/clip_fraction", "logp_gap/max")
OWN_SCALE = "loss"  # methods' losses are different quantities: no common axis
_MOST_COLUMNS = 6

Curves = dict[str, list[np.ndarray]]  # metric -> per seed [N, 2] of (step, value)


def read_curves(paths: list[Path], metrics: tuple[str, ...]) -> Curves:
    """Each metric's rows in every file. Raises UserError naming the file and line that is not JSON."""
    found: Curves = {metric: [] for metric in metrics}
    for path in paths:
        rows = read_log(path)
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None and "step" in row]
            if points:
                found[metric].append(np.array(points, dtype=np.float64))
    return found


def curve_figures(results: Results, folder: Path) -> dict[str, Figure]:
    """Figures by file name: off-policy methods (at most six a figure), then on-policy ones.

    Relative paths in `results.curves` are taken from `folder`. A method is on-policy when it logs the reward of its
    own rollouts.
    """
    read = {}
    for entry in results.trained():
        paths = [folder / path for path in results.curves.get(entry.name, {}).values()]
        existing = [path for path in paths if path.is_file()]
        if existing:
            read[entry.name] = read_curves(existing, OFF_POLICY_METRICS + ON_POLICY_METRICS)
    on_policy = [name for name, curves in read.items() if curves[ON_POLICY_METRICS[0]]]
    off_policy = [name for name in read if name not in on_policy]
    figures: dict[str, Figure] = {}
    for stem, names, metrics in (
        ("curves_off_policy", off_policy, OFF_POLICY_METRICS),
        ("curves_on_policy", on_policy, ON_POLICY_METRICS),
    ):
        for start in range(0, len(names), _MOST_COLUMNS):
            chosen = {name: read[name] for name in names[start : start + _MOST_COLUMNS]}
            suffix = f"_{start // _MOST_COLUMNS + 1}" if len(names) > _MOST_COLUMNS else ""
            figures[stem + suffix] = multiples(chosen, metrics, _colours(results.entries))
    return figures


def _colours(entries: list[EntryResult]) -> dict[str, str]:
    styles = looks([entry.name for entry in entries], [entry.kind for entry in entries])
    return {name: look.colour for name, look in styles.items()}


def multiples(curves: dict[str, Curves], metrics: tuple[str, ...], colours: dict[str, str]) -> Figure:
    """A column for each entry and a row for each metric that any logged; one entry alone fills rows of three."""
    shown = [metric for metric in metrics if any(found[metric] for found in curves.values())]
    with house_style():
        if len(curves) == 1:
            return _single(next(iter(curves)), next(iter(curves.values())), shown, colours)
        figure = Figure(figsize=(1.2 + 2.3 * len(curves), 0.6 + 1.55 * len(shown)), layout="constrained")
        grid = figure.subplots(len(shown), len(curves), squeeze=False, sharex="col")
        for column, (name, found) in enumerate(curves.items()):
            grid[0, column].set_title(name, color=colours[name])
            grid[-1, column].set_xlabel("step")
            for row, metric in enumerate(shown):
                _draw(grid[row, column], found[metric], colours[name])
        for row, metric in enumerate(shown):
            grid[row, 0].set_ylabel(metric)
            if metric != OWN_SCALE:
                _share_limits(list(grid[row]))
    return figure


def _single(name: str, found: Curves, shown: list[str], colours: dict[str, str]) -> Figure:
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure = Figure(figsize=(3.6 * num_columns, 0.5 + 2.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, metric in zip(panels, shown, strict=False):
        _draw(axes, found[metric], colours[name])
        axes.set_title(metric)
        axes.set_xlabel("step")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.suptitle(name, x=0.01, ha="left", color=colours[name], weight="bold")
    return figure


def _draw(axes: Axes, seeds: list[np.ndarray], colour: str) -> None:
    """One thin line for each seed."""
    if not seeds:
        axes.text(0.5, 0.5, "not part of\nthis method", ha="center", va="center", color=GREY, transform=axes.transAxes)
        axes.grid(False)
        axes.set_yticks([])
    for line in seeds:
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.0, alpha=0.9 if len(seeds) == 1 else 0.7)


def _share_limits(panels: list[Axes]) -> None:
    """Give all panels that hold a line the same y range; only the first keeps its numbers."""
    drawn = [axes for axes in panels if axes.lines]
    limits = [axes.get_ylim() for axes in drawn]
    for axes in drawn:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        if axes is not drawn[0]:
            axes.tick_params(labelleft=False)
