"""Charts of the best available measure against what methods cost, as data for the script of report.html."""

from __future__ import annotations

import html

from prefarena.report.charts import Chart, Line, key_of
from prefarena.report.results import Results
from prefarena.report.tables import number
from prefarena.report.whole_costs import Priced, against_costs, scientific

_NOTE = "Costs are per seed, without shared stages and evaluation. Bars show one standard error."


def against_cost_charts(results: Results) -> list[Chart]:
    """One chart for each kind of cost in which methods differ."""
    measure, found = against_costs(results)
    return [
        {
            "id": f"against-{axis.split(',')[0].lower().replace(' ', '-')}",
            "title": f"{measure[:1].upper()}{measure[1:]} against {axis.split(',')[0]}",
            "note": _NOTE,
            "x": axis,
            "y": measure,
            "lines": [_line(results, point, measure, axis) for point in points],
        }
        for axis, points in found
    ]


def _line(results: Results, point: Priced, measure: str, axis: str) -> Line:
    cost = scientific(point.cost) if point.cost >= 1e7 else number(point.cost, 0)
    text = f"<b>{html.escape(point.entry.name)}</b><br>{measure}: {number(point.value, 3)}<br>{axis}: {cost}"
    return {
        "key": key_of(results, point.entry),
        "name": point.entry.name,
        "role": "mean",
        "x": [float(f"{point.cost:.6g}")],
        "y": [float(f"{point.value:.6g}")],
        "ex": [None],
        "ey": [point.error],
        "text": [text],
    }
