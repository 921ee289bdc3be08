"""Methods through training: gold and own ("proxy") reward against KL, and logged against exact KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefarena.report.labels import Label, place_labels
from prefarena.report.overoptimisation import law_line
from prefarena.report.plots import along, frontier_lines
from prefarena.report.results import Aggregate, EntryResult, Results, mean_and_error
from prefarena.report.style import BLACK, GREY, house_style, looks
from prefarena.report.tables import Table, number, plus_minus
from prefarena.stage_files import read_log

MOST_PANELS = 12
_COLUMNS = 3
_SMOOTHED_OVER = 5  # iterations in the running mean of an estimated curve
#: What each iteration's rollouts are scored by: a key of metrics.jsonl and its name on an axis.
ESTIMATES = {"reward/mean": "reward learned from", "reward/judge": "judge, not trained on"}

Rows = list[dict[str, float]]
Logged = dict[str, dict[str, Rows]]


def measured_on_the_way(results: Results) -> list[EntryResult]:
    """Entries whose policies were measured through training, in order."""
    return [entry for entry in results.trained() if results.trajectories.get(entry.name)]


def prompts_of(entry: EntryResult) -> str:
    """The prompts that exact measures on the way are of: those that an entry samples on, or has pairs of."""
    if "reward" not in entry.settings:
        return "covered"
    return "covered" if entry.settings.get("prompts") == "covered" else "all"


def how_measured(results: Results) -> str:
    """The first words of a caption about policies on the way."""
    if results.exact:
        return "Exact values on the prompts that the entry samples on, or has pairs of"
    return "From samples on held-out prompts, scored by the judge of the evaluation"


def is_gold(entry: EntryResult) -> bool:
    """Whether the entry learned from the gold reward itself, so that there is no proxy."""
    return bool(entry.settings.get("reward", {}).get("kind") == "gold")


def shows_proxy(results: Results, entry: EntryResult) -> bool:
    """Whether an entry's proxy is shown beside the gold reward: on text they have other units (proxies.py)."""
    return results.exact and not is_gold(entry)


# ------------------------------------------------------------------------------------------------ tables


def summary_table(results: Results) -> Table | None:
    """One row for each entry: the best gold reward on the way, and what is left of it at the end."""
    entries = measured_on_the_way(results)
    if not entries:
        return None
    rows = []
    for entry in entries:
        seeds = list(results.trajectories[entry.name].values())
        peaks = [max(rows, key=_reward) for rows in seeds]
        ends = [rows[-1] for rows in seeds]
        gaps = [_gap(end) for end in ends if "proxy_reward" in end and shows_proxy(results, entry)]
        rows.append(
            (
                entry.name,
                _mean([peak["reward"] for peak in peaks]),
                " / ".join(f"{peak['step']:.0f}" for peak in peaks),
                _mean([peak["kl"] for peak in peaks]),
                _mean([end["reward"] for end in ends]),
                _mean([end["kl"] for end in ends]),
                _mean([end["regret"] for end in ends if "regret" in end]),
                _mean([end["proxy_reward"] for end in ends if "proxy_reward" in end]),
                _mean(gaps),
            )
        )
    header = (
        *("policy", "peak gold reward", "at step", "KL there"),
        *("gold at the end", "KL at the end", "regret at the end", "proxy at the end", "proxy − gold at the end"),
    )
    proxy = (
        "Proxy: the reward that the entry was trained on, which like the gold reward has mean 0 and variance 1 under "
        "the reference (estimated from samples if it is learned). Proxy − gold: over-optimisation; none if the entry "
        "was trained on the gold reward itself."
    )
    caption = (
        f"{how_measured(results)}; means over seeds ± one standard error, and steps for each seed. The peak is the "
        "highest among the policies measured (start, snapshots, end). "
        f"{proxy if results.exact else 'Gold: the score of that judge. Proxy: the reward that the entry learned from.'}"
    )
    return Table(f"{results.name}: through training", header, tuple(rows), caption)


def _gap(row: dict[str, float]) -> float:
    return row["proxy_reward"] - row["reward"]


def trajectory_table(results: Results, entry: EntryResult) -> Table:
    """Every measured policy of one entry, in order; means over seeds."""
    by_step: dict[float, Rows] = {}
    for rows in results.trajectories[entry.name].values():
        for row in rows:
            by_step.setdefault(row["step"], []).append(row)
    columns = {"KL": "kl", "gold reward": "reward", "proxy reward": "proxy_reward"}
    columns |= {"best reward at that KL": "frontier_reward", "regret": "regret", "entropy": "entropy"}
    if is_gold(entry) or not any("proxy_reward" in row for rows in by_step.values() for row in rows):
        del columns["proxy reward"]
    cells = tuple(
        (f"{step:.0f}", *(_mean([row[key] for row in found if key in row]) for key in columns.values()))
        for step, found in sorted(by_step.items())
    )
    return Table(f"{entry.name}: through training", ("step", *columns), cells)


def agreement_table(results: Results, entry: EntryResult) -> Table | None:
    """Logged KL estimates beside the exact KL, a row for each policy and seed; None where nothing can be compared."""
    by_seed = results.kl_agreement.get(entry.name, {})
    rows = [
        (
            f"{row['step']:.0f}",
            seed,
            number(row["exact"], 3),
            *(cell for name in ("k1", "k3") for cell in _estimate(row, name)),
        )
        for seed, found in by_seed.items()
        for row in found
    ]
    if not rows:
        return None
    header = ("step", "seed", "exact KL", "k1", "true error", "z of k1", "k3", "true error", "z of k3")
    return Table(f"{entry.name}: KL estimates", header, tuple(rows), num_labels=2)


def agreement_summary(results: Results) -> str:
    """How many of all comparisons are within three standard errors, and how the comparison is made."""
    found = [row for by_seed in results.kl_agreement.values() for rows in by_seed.values() for row in rows]
    parts = []
    for name in ("k1", "k3"):
        sizes = [abs(row[f"{name}_z"]) for row in found if f"{name}_z" in row]
        if sizes:
            within = sum(size <= 3 for size in sizes)
            too_small = max(row[f"{name}_exact_stderr"] / row[f"{name}_stderr"] for row in found if f"{name}_z" in row)
            parts.append(
                f"{name}: {within} of {len(sizes)} within three true standard errors, the largest |z| "
                f"{max(sizes):.2f}; the true error is up to {too_small:.2g} times the logged one"
            )
    return (
        f"{'. '.join(parts)}. The exact KL of the policy after a step, over the prompts that the entry samples on, "
        f"and the estimate logged by the next iteration, whose rollouts come from that policy. ± is the standard "
        f"error logged with it, the true error is that of as many draws from the enumerated policy, and z is the "
        f"difference in units of the true error. Errors are over sequences, as if prompts were drawn at random, too; "
        f"if every iteration uses each prompt equally often, this overstates the error, so a large z is still a "
        f"finding. Far from the reference k3 is heavy-tailed: a sample then misses its tail and shows too small an "
        f"error, so rely on k1."
    )


def _estimate(row: dict[str, float], name: str) -> tuple[str, str, str]:
    if name not in row:
        return number(None, 3), number(None, 3), number(None, 2)
    estimate = plus_minus(Aggregate(row[name], row[f"{name}_stderr"], 1, False), 3)
    return estimate, number(row[f"{name}_exact_stderr"], 3), number(row[f"{name}_z"], 2)


def _mean(values: Sequence[float]) -> str:
    return plus_minus(Aggregate(*mean_and_error(list(values)), len(values), True) if values else None, 3)


def _reward(row: dict[str, float]) -> float:
    return row["reward"]


# ----------------------------------------------------------------------------------------------- figures


def trajectory_figure(results: Results) -> Figure | None:
    """A panel for each entry (the first twelve): gold and proxy reward over KL, under the optimal frontier."""
    entries = measured_on_the_way(results)[:MOST_PANELS]
    if not entries:
        return None
    with house_style():
        figure, panels = panels_for(len(entries))
        colours = colours_of(results)
        for axes, entry in zip(panels, entries, strict=False):
            _draw_exact(axes, results, entry, colours[entry.name])
            axes.set_title(entry.name, color=colours[entry.name])
            axes.set_xlabel("KL(π ‖ reference), nats")
        panels[0].set_ylabel("expected reward")
        for axes, entry in zip(panels, entries, strict=False):
            _label(axes, results, entry, colours[entry.name])
        return figure


def _draw_exact(axes: Axes, results: Results, entry: EntryResult, colour: str) -> None:
    furthest = 0.0
    for rows in results.trajectories[entry.name].values():
        axes.plot(*_line(rows, "reward"), color=colour, marker="o", markersize=3.5, linewidth=1.3, zorder=4)
        if shows_proxy(results, entry) and any("proxy_reward" in row for row in rows):
            style: dict[str, Any] = {
                "linestyle": (0, (4, 2)),
                "marker": "s",
                "markersize": 3,
                "markerfacecolor": "white",
            }
            axes.plot(*_line(rows, "proxy_reward"), color=colour, linewidth=1.1, zorder=3, **style)
        furthest = max(furthest, *(row["kl"] for row in rows))
    for line in frontiers_of(results, entry, 1.1 * furthest):
        axes.plot(line[:, 0], line[:, 1], color=BLACK, linewidth=1.1, zorder=1)
    law = law_line(results, entry)
    if law is not None:
        axes.plot(law[:, 0], law[:, 1], color=colour, linewidth=1.0, linestyle=":", zorder=2)
    axes.margins(0.1)


def _label(axes: Axes, results: Results, entry: EntryResult, colour: str) -> None:
    """Names beside the ends of the first seed's lines and the frontier, clear of all lines."""
    seeds = list(results.trajectories[entry.name].values())
    end = seeds[0][-1]
    labels = [Label(end["kl"], end["reward"], "gold reward", colour)]
    obstacles = [along(np.stack(_line(rows, "reward"), axis=1)) for rows in seeds]
    if shows_proxy(results, entry) and "proxy_reward" in end:
        labels.append(Label(end["kl"], end["proxy_reward"], "reward learned from", colour))
        obstacles += [along(np.stack(_line(rows, "proxy_reward"), axis=1)) for rows in seeds]
    for index, line in enumerate(frontiers_of(results, entry, 1.1 * end["kl"])):
        if index == 0:
            middle = line[len(line) // 2]
            labels.append(Label(float(middle[0]), float(middle[1]), "optimal frontier (gold)", BLACK))
        obstacles.append(line)
    place_labels(axes, labels, np.concatenate(obstacles))


def _line(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    kept = [row for row in rows if key in row]
    return np.array([row["kl"] for row in kept]), np.array([row[key] for row in kept])


def frontiers_of(results: Results, entry: EntryResult, furthest: float) -> list[np.ndarray]:
    """The frontiers on the prompts that the entry samples on, up to a KL: [60, 2], denser where they are steep."""
    lines = frontier_lines(results, prompts_of(entry) if results.exact else "all")
    kls = furthest * np.linspace(0, 1, 60) ** 2
    return [np.stack([kls, np.interp(kls, line[:, 0], line[:, 1])], axis=1) for line in lines]


def estimated_figure(results: Results, logged: Logged) -> Figure | None:
    """For tasks that cannot be listed: the score of each iteration's rollouts against their k1, from metrics.jsonl.

    A column for each on-policy entry (the first six): above the reward learned from, below the judge, which it does
    not learn from. logged: `rollout_rows`.
    """
    found = {name: list(by_seed.values()) for name, by_seed in logged.items()}
    if not found:
        return None
    names = list(found)[: MOST_PANELS // 2]
    shown = [key for key in ESTIMATES if any(key in rows[0] for name in names for rows in found[name])]
    with house_style():
        figure = Figure(figsize=(max(4.2, 1.0 + 3.2 * len(names)), 0.7 + 2.6 * len(shown)), layout="constrained")
        grid = figure.subplots(len(shown), len(names), squeeze=False, sharex="col", sharey="row")
        colours = colours_of(results)
        for column, name in enumerate(names):
            grid[0, column].set_title(name, color=colours[name])
            grid[-1, column].set_xlabel("KL(π ‖ reference), k1, nats")
            for row, key in enumerate(shown):
                for rows in found[name]:
                    _draw_estimates(grid[row, column], rows, key, colours[name])
        for row, key in enumerate(shown):
            grid[row, 0].set_ylabel(ESTIMATES[key])
        return figure


def rollout_rows(results: Results, folder: Path) -> Logged:
    """entry -> seed -> the iterations that on-policy training logged; entries without any are left out.

    Relative paths in `results.curves` are taken from `folder`.
    """
    found: Logged = {}
    for entry in results.trained():
        for seed, path in results.curves.get(entry.name, {}).items():
            if (folder / path).is_file():
                rows = [row for row in read_log(folder / path) if "kl/k1" in row]
                if rows:
                    found.setdefault(entry.name, {})[seed] = rows
    return found


def judged_while_trained(logged: Logged) -> bool:
    """Whether some training logged what the judge, which it does not learn from, says of its rollouts."""
    return any("reward/judge" in row for by_seed in logged.values() for rows in by_seed.values() for row in rows)


def estimated_points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(k1, value) of each iteration, [N, 2], and their running mean over five, [M, 2]; both empty without `key`."""
    points = np.array([(row["kl/k1"], row[key]) for row in rows if key in row]).reshape(-1, 2)
    width = min(_SMOOTHED_OVER, len(points))
    if not width:
        return points, points
    window = np.full(width, 1 / width)
    return points, np.stack([np.convolve(points[:, i], window, mode="valid") for i in (0, 1)], axis=1)


def _draw_estimates(axes: Axes, rows: Rows, key: str, colour: str) -> None:
    """Iterations as dots, and their running mean as a line with a mark at its end."""
    points, smooth = estimated_points(rows, key)
    if not len(points):
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", color=GREY, transform=axes.transAxes)
        return
    axes.scatter(points[:, 0], points[:, 1], s=9, color=colour, alpha=0.35, linewidths=0)
    axes.plot(smooth[:, 0], smooth[:, 1], color=colour, linewidth=1.4)
    axes.plot(smooth[-1:, 0], smooth[-1:, 1], color=colour, marker="o", markersize=5, markeredgecolor="white")
    axes.margins(0.08)


def panels_for(number_of: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, three in a row."""
    columns = min(_COLUMNS, number_of)
    rows = -(-number_of // columns)
    figure = Figure(figsize=(max(5.6, 4.3 * columns), 0.4 + 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).ravel())
    for axes in panels[number_of:]:
        axes.set_visible(False)
    return figure, panels


def colours_of(results: Results) -> dict[str, str]:
    """The colour of each entry."""
    styles = looks([entry.name for entry in results.entries], [entry.kind for entry in results.entries])
    return {name: look.colour for name, look in styles.items()}
