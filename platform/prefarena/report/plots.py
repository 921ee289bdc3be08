"""Figures of a comparison: the reward-KL plane, drift where there are no pairs, win rates, grids of settings."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefarena.report.labels import Label, place_labels
from prefarena.report.results import Aggregate, EntryResult, Results, aggregate, kl_key, with_gains
from prefarena.report.style import BLACK, GREY, Look, house_style, looks
from prefarena.report.tuning import tuned_curves

#: Of text, behind other sentences.
FRONTIER_NOTE = (
    " The line is the best score that any policy could have at its KL, estimated from samples of the reference (π* ∝ "
    "π_ref·exp(r/β), by importance sampling); it ends where this number of samples no longer suffices to estimate it."
)
_MOST_LABELS = 12
_GAIN_LABEL = "gain in reward on prompts with pairs"
_DRIFT_LABEL = "KL(π ‖ reference) on prompts without pairs, nats"


def reward_kl_figure(results: Results) -> Figure:
    """The comparison in two panels.

    Enumerable tasks: reward against KL on prompts with pairs under the optimal frontier, and KL on prompts without
    pairs against the gain on prompts with them. Other tasks: judge score (or win rate) against KL, and win rates.
    """
    with house_style():
        figure = Figure(figsize=(11.5, 4.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        found = with_gains(results)
        if results.exact:
            _titles(left, "Reward and KL on prompts with pairs", "KL(π ‖ reference), nats", "expected gold reward")
            _titles(right, "Drift on prompts without pairs: lower is better", _GAIN_LABEL, _DRIFT_LABEL)
            draw = _lines if results.is_sweep else _points
            draw(left, found, "kl/covered", "reward/covered", frontier_lines(found, "covered"))
            draw(right, found, "gain/covered", "kl/uncovered", [])
        else:
            scored = any(aggregate(entry, "judge_score") for entry in found.entries)
            measure = "judge score" if scored else "win rate"
            title, unit = f"{measure.capitalize()} and KL on held-out prompts", f"mean {measure}"
            _titles(left, title, "KL(π ‖ reference), nats", unit)
            _titles(right, "Win rate against the reference", "share of comparisons won (± standard error)", "")
            shown = frontier_lines(found, "all") if scored else []
            _points(left, found, kl_key(found), measure.replace(" ", "_"), shown)
            _win_rates(right, found)
    return figure


def drift_figure(results: Results) -> Figure:
    """A sweep's drift on prompts without pairs against its gain on prompts with them."""
    title = "Drift without pairs against gain with pairs: lower is better"
    return grid_figure(results, "gain/covered", "kl/uncovered", title, _GAIN_LABEL, _DRIFT_LABEL)


def grid_figure(results: Results, x: str, y: str, title: str, x_label: str, y_label: str) -> Figure:
    """`y` against `x` (keys of evaluation rows, `gain/...` included): a line for each group over its settings.

    Points are means over seeds, bars one standard error in both directions; groups as in `EntryResult.group`.
    """
    with house_style():
        figure = Figure(figsize=(8.2, 5.4), layout="constrained")
        axes = figure.subplots()
        _titles(axes, title, x_label, y_label)
        _lines(axes, with_gains(results), x, y, [])
    return figure


def expected_best_figure(results: Results) -> Figure | None:
    """Left the expected best of k trials with its bands, right the trials in order and the best so far.

    None where nothing was tuned.
    """
    curves = tuned_curves(results)
    if not curves:
        return None
    with house_style():
        figure = Figure(figsize=(11.5, 4.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _titles(left, "Expected best of k trials", "trials k", "value of a trial")
        _titles(right, "Trials and the best so far, in order", "trials made", "")
        styles = looks([entry.name for entry in results.entries], [entry.kind for entry in results.entries])
        for curve in curves:
            name, k = curve.entry.name, np.arange(1, len(curve.trials) + 1)
            colour, marker = styles[name]
            left.fill_between(k, *curve.expected.interval.T, color=colour, alpha=0.15, linewidth=0)
            left.plot(k, curve.expected.mean, color=colour, marker=marker, markersize=4, label=name)
            right.plot(k, curve.counted, color=colour, marker=marker, markersize=4, linestyle="", alpha=0.6)
            right.step(k, curve.so_far, color=colour, where="post")
        left.legend(frameon=False, loc="lower right", title="policy")
    return figure


def group_curves(results: Results, x: str, y: str) -> dict[str, list[tuple[EntryResult, Aggregate, Aggregate]]]:
    """Each group's settings as points (entry, x, y), in order of x."""
    curves = {}
    for group, entries in results.groups().items():
        points = [(e, a, b) for e, a, b in ((e, aggregate(e, x), aggregate(e, y)) for e in entries) if a and b]
        if points:
            curves[group] = sorted(points, key=lambda point: point[1].mean)
    return curves


def _lines(axes: Axes, results: Results, x: str, y: str, frontiers: list[np.ndarray]) -> None:
    """Each group's points joined in order, with error bars, named at its last point."""
    curves = group_curves(results, x, y)
    styles = looks(list(curves), list(curves))
    labels, obstacles, largest = [], [], 0.0
    for name, points in curves.items():
        line = np.array([(a.mean, b.mean) for _, a, b in points])
        axes.plot(line[:, 0], line[:, 1], color=styles[name].colour, linewidth=1.2, alpha=0.8)
        for _, a, b in points:
            _mark(axes, a, b, styles[name])
        labels.append(Label(float(line[-1, 0]), float(line[-1, 1]), name, styles[name].colour))
        obstacles.append(along(line))
        largest = max(largest, float(line[-1, 0]))
    _finish(axes, labels, obstacles, frontiers, largest)


def _points(axes: Axes, results: Results, x: str, y: str, frontiers: list[np.ndarray]) -> None:
    """Every entry's mean with its error, its seeds as small open marks, and its name beside the mean.

    The optimum is shown where there is a frontier.
    """
    styles = looks([entry.name for entry in results.entries], [entry.kind for entry in results.entries])
    labels, obstacles, largest = [], [], 0.0
    for entry in results.entries:
        seeds = np.array([(row[x], row[y]) for row in entry.seeds.values() if x in row and y in row])
        a, b = aggregate(entry, x), aggregate(entry, y)
        if a is None or b is None or not len(seeds) or (entry.kind == "optimum" and not frontiers):
            continue
        look = styles[entry.name]
        if len(np.unique(seeds, axis=0)) > 1:
            axes.scatter(seeds[:, 0], seeds[:, 1], s=16, facecolors="none", edgecolors=look.colour, linewidths=0.8)
        _mark(axes, a, b, look)
        labels.append(Label(a.mean, b.mean, entry.name, look.colour))
        obstacles.append(seeds)
        largest = max(largest, float(seeds[:, 0].max()))
    _finish(axes, labels, obstacles, frontiers, largest)


def _finish(
    axes: Axes, labels: list[Label], obstacles: list[np.ndarray], frontiers: list[np.ndarray], largest: float
) -> None:
    """Draw the frontiers up to a little beyond the `largest` KL shown, then write all labels."""
    labels, obstacles = list(labels), list(obstacles)
    for index, line in enumerate(frontiers):
        shown = line[line[:, 0] <= 1.25 * largest] if largest > 0 else line
        if not len(shown):
            continue
        axes.plot(shown[:, 0], shown[:, 1], color=BLACK, linewidth=1.1, zorder=1)
        obstacles.append(along(shown))
        if index == 0:
            labels.append(Label(float(shown[-1, 0]), float(shown[-1, 1]), "optimal frontier", BLACK))
    axes.margins(0.12)
    if len(labels) > _MOST_LABELS:
        axes.text(
            0, -0.2, f"{len(labels)} policies: see the table for their names", transform=axes.transAxes, color=GREY
        )
    elif labels:
        place_labels(axes, labels, np.concatenate(obstacles))


def _mark(axes: Axes, a: Aggregate, b: Aggregate, look: Look) -> None:
    size = 10 if look.marker == "*" else 6
    axes.errorbar(
        a.mean,
        b.mean,
        xerr=a.stderr,
        yerr=b.stderr,
        color=look.colour,
        marker=look.marker,
        markersize=size,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.0,
        capsize=2,
        linestyle="none",
        zorder=4,
    )


def frontier_lines(results: Results, group: str) -> list[np.ndarray]:
    """The different frontiers among seeds, each [N, 2] of (KL, reward); on text the estimated one, of all prompts."""
    listed = [by_group[group] for by_group in (results.frontier or {}).values() if group in by_group]
    if group == "all":
        listed += [[(kl, reward) for kl, reward, _ in points] for points in results.estimated_frontier.values()]
    different: list[np.ndarray] = []
    for points in listed:
        line = np.array(sorted(points))
        if not any(line.shape == other.shape and np.allclose(line, other) for other in different):
            different.append(line)
    return different


def along(line: np.ndarray, num_points: int = 60) -> np.ndarray:
    """Points [num_points, 2] evenly spread along a polyline [N, 2], for labels to keep clear of."""
    if len(line) < 2:
        return line
    spans = np.ptp(line, axis=0)
    steps = np.hypot(*(np.diff(line, axis=0) / np.where(spans > 0, spans, 1.0)).T)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, at[-1], num_points)
    return np.stack([np.interp(wanted, at, line[:, 0]), np.interp(wanted, at, line[:, 1])], axis=1)


def _win_rates(axes: Axes, results: Results) -> None:
    """Every method's win rate against the reference; the line is at one half."""
    styles = looks([entry.name for entry in results.entries], [entry.kind for entry in results.entries])
    found = [(entry, aggregate(entry, "win_rate")) for entry in results.trained()]
    rows = [(entry, rate) for entry, rate in found if rate is not None]
    for index, (entry, rate) in enumerate(rows):
        look = styles[entry.name]
        axes.errorbar(
            rate.mean, index, xerr=rate.stderr, color=look.colour, marker=look.marker, capsize=3, markersize=7
        )
    axes.axvline(0.5, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), [entry.name for entry, _ in rows])
    for tick, (entry, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(styles[entry.name].colour)
    axes.invert_yaxis()
    axes.margins(0.1)


def _titles(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
