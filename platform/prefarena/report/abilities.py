"""Forgetting: the results of policies on tasks of lm-eval, compared with the reference."""

from __future__ import annotations

from prefarena.report.results import Ability, Aggregate, Results, mean_and_error
from prefarena.report.significance import significant
from prefarena.report.tables import MISSING, Table, number, plus_minus

TITLE = "What is forgotten"


def ability_difference(rows: list[Ability]) -> Aggregate:
    """One entry's difference on a task and metric; the error is over seeds, or paired by item for one seed."""
    mean, error = mean_and_error([row.difference for row in rows])
    if error is not None:
        return Aggregate(mean, error, len(rows), True)
    return Aggregate(mean, rows[0].stderr, 1, False)


def abilities_table(results: Results) -> Table | None:
    """One row per task, metric and entry; None if no abilities were measured."""
    groups: dict[tuple[str, str, str], list[Ability]] = {}
    for entry in results.entries:
        for row in results.abilities:
            if row.entry == entry.name:
                groups.setdefault((row.task, row.metric, row.entry), []).append(row)
    if not groups:
        return None
    ordered = sorted(groups, key=lambda key: key[:2])  # entries stay in their own order
    changes = [ability_difference(groups[key]) for key in ordered]
    rows = []
    for key, change, clear in zip(ordered, changes, significant(changes), strict=True):
        own = groups[key]
        value = mean_and_error([row.value for row in own])[0]
        cells = number(own[0].reference, 3), number(value, 3), plus_minus(change, 3)
        rows.append((*key, str(own[0].num_items), *cells, _verdict(change, clear, own[0].higher_is_better)))
    caption = (
        "Each policy minus the reference, on the same items. The error of a difference is paired by item, or over "
        "seeds if there are several. Worse and better: significant at 5 % after Holm's correction for all rows of "
        "this table. `nll` metrics are in nats, and lower is better."
    )
    header = ("task", "metric", "policy", "items", "reference", "value", "difference", "verdict")
    return Table(f"{results.name}: {TITLE.lower()}", header, tuple(rows), caption, 3)


def _verdict(change: Aggregate, clear: bool | None, higher_is_better: bool) -> str:
    if clear is None:
        return MISSING
    if not clear:
        return "no difference shown"
    return "better" if (change.mean > 0) == higher_is_better else "worse"
