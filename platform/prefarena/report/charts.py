"""The charts of report.html as plain data, which the page's script hands to the plotting library.

Every number is the one that tables and figures have. A `key` names what the legend switches: an entry, or in a sweep a
method with its grid of settings.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prefarena.report.curves import OFF_POLICY_METRICS, ON_POLICY_METRICS, OWN_SCALE, read_curves
from prefarena.report.label_efficiency import label_curves, measures
from prefarena.report.overoptimisation import law_line
from prefarena.report.plots import FRONTIER_NOTE, frontier_lines, group_curves
from prefarena.report.results import Aggregate, EntryResult, Results, aggregate, kl_key, with_gains
from prefarena.report.style import looks, on_ground
from prefarena.report.tables import plus_minus, wall_seconds
from prefarena.report.trajectories import (
    ESTIMATES,
    estimated_points,
    frontiers_of,
    how_measured,
    measured_on_the_way,
    prompts_of,
    rollout_rows,
    shows_proxy,
)
from prefarena.report.tuning import TunedCurve, expected_best_text, shown_settings, tuned_curves

#: The grounds that charts stand on; report.css has the same.
LIGHT, DARK = "#ffffff", "#161a20"
_MOST_POINTS = 240  # of one line of a training curve
_KL = "KL(π ‖ reference), nats"

Line = dict[str, Any]  # key, name, role (how it is drawn), x, y, and as it has them ex, ey, text
Chart = dict[str, Any]  # id, title, note, x, y (names of the axes), lines; ticks: of an x axis in logarithms
Value = Callable[[Results, EntryResult], Aggregate | None]


def legend(results: Results) -> list[dict[str, Any]]:
    """The legend's items, with marker and colours on light and dark ground; `failed`: there is nothing to show."""
    entries = [entry for entry in results.entries if entry.kind != "optimum" or results.frontier]
    names, kinds = [entry.name for entry in entries], [entry.kind for entry in entries]
    failed = {entry.name: not entry.seeds for entry in entries}
    if results.is_sweep:
        groups = results.groups()
        names = kinds = list(groups) if results.exact else ["reference", *groups]  # which has samples
        failed = {group: not any(entry.seeds for entry in grid) for group, grid in groups.items()}
    styles = looks(names, kinds)
    return [
        {
            "key": name,
            "light": on_ground(look.colour, LIGHT),
            "dark": on_ground(look.colour, DARK),
            "marker": look.marker,
            "failed": failed.get(name, False),
        }
        for name, look in styles.items()
    ]


def key_of(results: Results, entry: EntryResult) -> str:
    """The legend's key that an entry belongs to."""
    return entry.group if results.is_sweep and entry.is_trained else entry.name


# ----------------------------------------------------------------------------------------- reward and KL


def reward_kl_charts(results: Results) -> list[Chart]:
    """Reward against KL, and its companions in the report's first figure."""
    found = with_gains(results)
    if results.exact:
        return [
            _plane(
                found, "reward-kl", "Reward and KL on prompts with pairs", ("kl/covered", "reward/covered"),
                (_KL, "expected gold reward"), _frontier(found, "kl/covered"),
                "Up is better, left is closer to the reference. No policy can lie above the frontier, π* ∝ "
                "π_ref·exp(r/β); the vertical distance to it is the regret.",
            ),
            _plane(
                found, "drift", "Drift on prompts without pairs", ("gain/covered", "kl/uncovered"),
                ("gain in reward on prompts with pairs", "KL on prompts without pairs, nats"), [],
                "Lower is better: how far each policy moves on prompts without pairs.",
            ),
        ]  # fmt: skip
    scored = any(aggregate(entry, "judge_score") for entry in found.entries)
    measure = "judge score" if scored else "win rate"
    return [
        _plane(
            found, "reward-kl", f"{measure.capitalize()} and KL on held-out prompts",
            (kl_key(found), measure.replace(" ", "_")), (_KL, f"mean {measure}"),
            _frontier(found, kl_key(found), "all") if scored else [],
            "Up is better, left is closer to the reference. Bars are one standard error."
            + (FRONTIER_NOTE if found.estimated_frontier else ""),
        ),
        _bars(
            found, "win-rates", "Win rate against the reference", lambda _, entry: aggregate(entry, "win_rate"),
            "share of comparisons won", 3, "Ties count half; the line is at one half. Bars are one standard error.",
            0.5,
        ),
    ]  # fmt: skip


def cost_chart(results: Results) -> Chart | None:
    """A chart of the seconds of each entry's own stages for one seed; empty where nothing is known of them."""
    chart = _bars(
        results, "wall", "Cost of one seed", wall_seconds, "seconds of the entry's own stages", 1,
        "Stages that entries share, and evaluation, are left out.",
    )  # fmt: skip
    return chart if chart["lines"] else None


def _plane(
    results: Results,
    name: str,
    title: str,
    measures: tuple[str, str],
    axes: tuple[str, str],
    frontiers: list[Line],
    note: str,
) -> Chart:
    """Every entry's mean with its error and its seeds; in a sweep each method's grid as a line."""
    x, y = measures
    lines = list(frontiers)
    if results.is_sweep:
        lines += [
            _points(group, group, "grid", [(a, b, f"{entry.name}") for entry, a, b in points], axes)
            for group, points in group_curves(results, x, y).items()
        ]
        return {"id": name, "title": title, "note": note, "x": axes[0], "y": axes[1], "lines": lines}
    for entry in results.entries:
        a, b = aggregate(entry, x), aggregate(entry, y)
        if a is None or b is None or (entry.kind == "optimum" and not frontiers):
            continue
        lines.append(_points(entry.name, entry.name, "mean", [(a, b, entry.name)], axes))
        seeds = [(seed, row[x], row[y]) for seed, row in entry.seeds.items() if x in row and y in row]
        if len({(one, other) for _, one, other in seeds}) > 1:
            text = [f"<b>{html.escape(entry.name)}</b>, seed {seed}" for seed, _, _ in seeds]
            values = [[value for _, value, _ in seeds], [value for _, _, value in seeds]]
            lines.append(make_line(entry.name, entry.name, "seed", values[0], values[1], text=text))
    return {"id": name, "title": title, "note": note, "x": axes[0], "y": axes[1], "lines": lines}


def _points(
    key: str, name: str, role: str, points: list[tuple[Aggregate, Aggregate, str]], axes: tuple[str, str]
) -> Line:
    text = [
        f"<b>{html.escape(label)}</b><br>{axes[1]}: {plus_minus(b, 3)}<br>{axes[0]}: {plus_minus(a, 3)}{_seeds(a, b)}"
        for a, b, label in points
    ]
    errors = [[a.stderr for a, _, _ in points], [b.stderr for _, b, _ in points]]
    values = [[a.mean for a, _, _ in points], [b.mean for _, b, _ in points]]
    return make_line(key, name, role, values[0], values[1], text=text, ex=_numbers(errors[0]), ey=_numbers(errors[1]))


def _seeds(*values: Aggregate) -> str:
    over = [value.num_seeds for value in values if value.over_seeds]
    return f"<br>mean of {over[0]} seeds" if over else ""


def _frontier(results: Results, kl: str, prompts: str = "covered") -> list[Line]:
    """The optimal frontiers, up to a little beyond the largest KL that an entry has."""
    measured = [row[kl] for entry in results.entries for row in entry.seeds.values() if kl in row]
    furthest = 1.25 * max(measured, default=0.0)
    lines = []
    for line in frontier_lines(results, prompts):
        shown = line[line[:, 0] <= furthest] if furthest > 0 else line
        if len(shown):
            lines.append(make_line(None, "optimal frontier", "frontier", shown[:, 0], shown[:, 1]))
    return lines


def _bars(
    results: Results, name: str, title: str, value: Value, axis: str, digits: int, note: str, at: float | None = None
) -> Chart:
    """One value for each trained entry, along the x axis; `at`: where a line stands."""
    lines = []
    for entry in results.trained():
        found = value(results, entry)
        if found is not None:
            text = [f"<b>{html.escape(entry.name)}</b><br>{axis}: {plus_minus(found, digits)}{_seeds(found)}"]
            key = key_of(results, entry)
            line = make_line(key, entry.name, "bar", [found.mean], [entry.name], text=text, ex=_numbers([found.stderr]))
            lines.append(line)
    return {"id": name, "title": title, "note": note, "x": axis, "y": "", "lines": lines, "at": at}


# -------------------------------------------------------------------------------------- through training


def through_training_charts(results: Results, folder: Path) -> list[Chart]:
    """Charts through training: policies as measured, and what training logged of rollouts if nothing is exact."""
    if results.exact:
        return _trajectories(results)
    rows = rollout_rows(results, folder)
    charts = []
    for key, axis in ESTIMATES.items():
        lines = []
        for entry in (entry for entry in results.trained() if entry.name in rows):
            for seed, found in rows[entry.name].items():
                points, smooth = estimated_points(found, key)
                if len(points):
                    owner = (key_of(results, entry), f"{entry.name}, seed {seed}")
                    lines.append(make_line(*owner, "dots", points[:, 0], points[:, 1]))
                    lines.append(make_line(*owner, "mean line", smooth[:, 0], smooth[:, 1]))
        if lines:
            note = (
                "This is the score that training maximises."
                if key == "reward/mean"
                else "This is the evaluation's judge, which policies are not trained on. Where it falls behind the "
                "training reward, that reward is over-optimised."
            )
            note = f"Each dot is one iteration's rollouts, each line their running mean over five. {note}"
            name = f"through-{key.replace('/', '-')}"
            axes = {"x": "KL(π ‖ reference), k1, nats", "y": axis}
            charts.append({"id": name, "title": axis.capitalize(), "note": note, **axes, "lines": lines})
    return [*charts, *_trajectories(results)]


def _trajectories(results: Results) -> list[Chart]:
    lines: list[Line] = []
    furthest: dict[str, tuple[float, EntryResult]] = {}  # the largest KL on the prompts that entries sample on
    for entry in measured_on_the_way(results):
        key = key_of(results, entry)
        for seed, rows in results.trajectories[entry.name].items():
            lines.append(_trajectory(key, f"{entry.name}, seed {seed}: gold reward", "steps", rows, "reward"))
            if shows_proxy(results, entry) and any("proxy_reward" in row for row in rows):
                name = f"{entry.name}, seed {seed}: reward learned from"
                lines.append(_trajectory(key, name, "dashed", rows, "proxy_reward"))
            law = law_line(results, entry) if seed == next(iter(results.trajectories[entry.name])) else None
            if law is not None:
                lines.append(make_line(key, f"{entry.name}: the law fitted to it", "law", law[:, 0], law[:, 1]))
            prompts = prompts_of(entry) if results.exact else "all"
            before = furthest[prompts][0] if prompts in furthest else 0.0
            furthest[prompts] = (max(before, *(row["kl"] for row in rows)), entry)
    for prompts, (kl, entry) in furthest.items():
        for line in frontiers_of(results, entry, 1.1 * kl):
            where = "prompts with pairs" if prompts == "covered" else "all prompts" if results.exact else "estimated"
            lines.append(make_line(None, f"optimal frontier, {where}", "frontier", line[:, 0], line[:, 1]))
    if not lines:
        return []
    note = (
        f"{how_measured(results)}: policies before, during and after training, one line for each seed. Solid: the gold "
        "reward; dashed: the reward that the policy is trained on. Where the dashed line rises and the solid one does "
        "not follow, the reward is over-optimised. Dotted: the law fitted to the gold reward, where there are four "
        "policies or more."
    )
    if not results.exact:
        note = (
            f"{how_measured(results)}: policies before, during and after training, one line for each seed. Dotted: the "
            "law fitted to them, where there are four policies or more."
        )
    title = "Reward and KL through training"
    return [{"id": "through", "title": title, "note": note, "x": _KL, "y": "expected reward", "lines": lines}]


def _trajectory(key: str, name: str, role: str, rows: list[dict[str, float]], measure: str) -> Line:
    kept = [row for row in rows if measure in row]
    text = [
        f"<b>{html.escape(name)}</b><br>after {row['step']:.0f} updates<br>reward {row[measure]:.3f}<br>"
        f"KL {row['kl']:.3f}"
        for row in kept
    ]
    return make_line(key, name, role, [row["kl"] for row in kept], [row[measure] for row in kept], text=text)


# ---------------------------------------------------------------------------------------- training curves


def training_charts(results: Results, folder: Path) -> list[Chart]:
    """A chart for each metric that any entry logged, with a line for each entry and seed, thinned where it is long."""
    metrics = tuple(dict.fromkeys(OFF_POLICY_METRICS + ON_POLICY_METRICS))
    lines: dict[str, list[Line]] = {metric: [] for metric in metrics}
    for entry in results.trained():
        for seed, path in results.curves.get(entry.name, {}).items():
            if not (folder / path).is_file():
                continue
            for metric, found in read_curves([folder / path], metrics).items():
                for points in found:
                    x, y = thinned(points).T
                    name = f"{entry.name}, seed {seed}"
                    lines[metric].append(make_line(key_of(results, entry), name, "curve", x, y))
    note = "Losses of different methods are different quantities and cannot be compared."
    return [
        {
            "id": f"curve-{metric.replace('/', '-')}",
            "title": metric,
            "note": note if metric == OWN_SCALE else "",
            "x": "step",
            "y": "",
            "lines": found,
        }
        for metric, found in lines.items()
        if found
    ]


# ------------------------------------------------------------------------------------------------ labels


def label_charts(results: Results) -> list[Chart]:
    """A chart for each measure over the number of labelled pairs, a line for each method; none without such curves."""
    charts = []
    for measure in measures(results):
        lines, ticks = [], set[int]()
        for curve in label_curves(results):
            known = [(pairs, value) for pairs, entry in curve.entries if (value := aggregate(entry, measure.key))]
            text = [
                f"<b>{html.escape(curve.group)}</b>, {pairs:,} pairs<br>{measure.name}: {plus_minus(value, 3)}"
                for pairs, value in known
            ]
            x, y, errors = [pairs for pairs, _ in known], [v.mean for _, v in known], [v.stderr for _, v in known]
            key = key_of(results, curve.entries[0][1])
            lines.append(make_line(key, curve.group, "grid", x, y, text=text, ey=_numbers(errors)))
            ticks.update(x)
        better = {True: "Up is better.", False: "Down is better.", None: "Lower is closer to the reference."}
        note = f"{better[measure.more_is_better]} Means over seeds; bars are one standard error."
        title = f"{measure.name[:1].upper()}{measure.name[1:]} by number of labelled pairs"
        axes = {"x": "labelled pairs", "y": measure.name, "ticks": sorted(ticks)}
        name = f"labels-{measure.name.replace(' ', '-').lower()}"
        charts.append({"id": name, "title": title, "note": note, **axes, "lines": lines})
    return charts


# ------------------------------------------------------------------------------------------------ tuning


def tuning_charts(results: Results) -> list[Chart]:
    """Expected best of k trials with bands, the same against device-seconds, and what happened; none without tuning."""
    curves = tuned_curves(results)
    if not curves:
        return []
    expected, costly, happened = [], [], []
    for curve in curves:
        key = key_of(results, curve.entry)
        k = np.arange(1, len(curve.trials) + 1)
        expected += _expected(key, curve, k)
        costly += _expected(key, curve, k * curve.seconds)
        text = [_told(curve, place) for place in range(len(k))]
        happened.append(make_line(key, curve.entry.name, "dots", k, curve.counted, text=text))
        happened.append(make_line(key, f"{curve.entry.name}, best so far", "so far", k, curve.so_far))
    note, value = expected_best_text(results), "value of a trial"
    note = f"{note[:1].upper()}{note[1:]}"
    seconds = "The same curves against k times the average device-seconds of the entry's trials."
    order = "Trials in the order in which they were made, and the best of them so far. A trial below 0 is shown at 0."
    charts = [("expected-best", "Expected best of k trials", note, "trials k", expected)]
    if all(curve.seconds > 0 for curve in curves):
        charts.append(("expected-best-cost", "Expected best against cost", seconds, "device-seconds", costly))
    charts.append(("best-so-far", "Best so far, in order", order, "trials made", happened))
    return [
        {"id": name, "title": title, "note": note, "x": x, "y": value, "lines": lines}
        for name, title, note, x, lines in charts
    ]


def _expected(key: str, curve: TunedCurve, x: np.ndarray) -> list[Line]:
    """The band, drawn once around, and the line above it."""
    name, (mean, interval) = curve.entry.name, curve.expected
    known = ~np.isnan(interval[:, 0])
    text = []
    for place, value in enumerate(mean):
        ends = f" [{interval[place, 0]:.3f}, {interval[place, 1]:.3f}]" if known[place] else ""
        text.append(f"<b>{html.escape(name)}</b><br>best of {place + 1}: {value:.3f}{ends}")
    lines = [make_line(key, name, "expected", x, mean, text=text)]
    if known.any():
        around = [np.concatenate([x[known], x[known][::-1]])]
        around.append(np.concatenate([interval[known, 1], interval[known, 0][::-1]]))
        lines.insert(0, make_line(key, f"{name}, 95 %", "band", *around))
    return lines


def _told(curve: TunedCurve, place: int) -> str:
    """The text shown when the mouse is over a trial."""
    trial = curve.trials[place]
    value = "" if trial.value is None else f", value {trial.value:.3f}"
    title = f"<b>{html.escape(curve.entry.name)}</b>, trial {trial.number}: {trial.state}{value}"
    return "<br>".join([title, *(html.escape(part) for part in shown_settings(trial.settings).split(", "))])


def thinned(points: np.ndarray) -> np.ndarray:
    """Choose at most 240 of the points [N, 2] evenly, including the first and the last."""
    if len(points) <= _MOST_POINTS:
        return points
    return points[np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int)]


def make_line(key: str | None, name: str, role: str, x: Any, y: Any, **more: Any) -> Line:
    """A line whose numbers have six digits, which is more than a screen can show."""
    return {"key": key, "name": name, "role": role, "x": _numbers(x), "y": _numbers(y), **more}


def _numbers(values: Any) -> list[Any]:
    return [value if value is None or isinstance(value, str) else float(f"{float(value):.6g}") for value in values]
