"""The figure of measures over the number of labelled pairs."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from prefarena.report.label_efficiency import LabelCurve, Measure, label_curves, measures
from prefarena.report.results import Results, aggregate
from prefarena.report.style import Look, house_style, looks


def labels_figure(results: Results) -> Figure | None:
    """A panel for each measure, a line for each method; None where no entry stands there at several numbers."""
    curves, shown = label_curves(results), measures(results)
    if not curves or not shown:
        return None
    groups = list(results.groups())
    styles = looks(groups, groups)
    with house_style():
        figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
        for axes, measure in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            _panel(axes, measure, curves, styles)
        figure.axes[0].legend(frameon=False, title="method")
    return figure


def _panel(axes: Axes, measure: Measure, curves: list[LabelCurve], styles: dict[str, Look]) -> None:
    better = {True: ": higher is better", False: ": lower is better", None: ""}[measure.more_is_better]
    axes.set_title(f"{measure.name[:1].upper()}{measure.name[1:]}{better}")
    axes.set_xlabel("labelled pairs")
    axes.set_xscale("log")
    axes.set_xticks(sorted({number for curve in curves for number in curve.numbers}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for curve in curves:
        known = [(pairs, value) for pairs, entry in curve.entries if (value := aggregate(entry, measure.key))]
        colour, marker = styles[curve.group]
        axes.errorbar(
            [pairs for pairs, _ in known], [value.mean for _, value in known],
            yerr=[value.stderr or 0.0 for _, value in known], color=colour, marker=marker, markersize=5, capsize=2,
            linewidth=1.4, label=curve.group,
        )  # fmt: skip
