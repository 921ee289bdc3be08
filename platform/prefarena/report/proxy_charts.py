"""The chart of gold and proxy reward through training, as data for the script of report.html."""

from __future__ import annotations

import html

from prefarena.report.charts import Chart, Line, key_of, make_line
from prefarena.report.proxies import GAIN, NOTE, ROOT_KL, TITLE, Point, is_best_of, law_of, line_of_law, proxy_curves
from prefarena.report.results import Results


def proxy_charts(results: Results) -> list[Chart]:
    """One chart with two lines for each entry and seed, and the law of each entry; none without proxies."""
    lines: list[Line] = []
    for name, by_seed in proxy_curves(results).items():
        key = key_of(results, results.entry(name))
        where = "best of {:.0f}" if is_best_of(results, name) else "after {:.0f} updates"
        for seed, points in by_seed.items():
            gold, proxy = [point.gold for point in points], [point.proxy for point in points]
            lines.append(_line(key, f"{name}, seed {seed}: gold reward", "steps", where, points, gold))
            lines.append(_line(key, f"{name}, seed {seed}: reward learned from", "dashed", where, points, proxy))
        fit = law_of(results, name, list(by_seed.values()))
        if fit is not None:
            lines.append(make_line(key, f"{name}: the law fitted to it", "law", *line_of_law(fit).T))
    if not lines:
        return []
    return [{"id": "proxies", "title": TITLE, "note": NOTE, "x": f"{ROOT_KL}, nats^½", "y": GAIN, "lines": lines}]


def _line(key: str, name: str, role: str, where: str, points: list[Point], gains: list[float]) -> Line:
    text = [
        f"<b>{html.escape(name)}</b><br>{where.format(point.step)}<br>gain {gain:.3f}<br>KL {point.kl:.3f}"
        for point, gain in zip(points, gains, strict=True)
    ]
    return make_line(key, name, role, [point.root for point in points], gains, text=text)
