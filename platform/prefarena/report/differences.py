"""The differences between two comparisons: settings, software, policies and numbers."""

from __future__ import annotations

import json
import math
from typing import Any

from prefarena.report.results import Aggregate, Results
from prefarena.report.tables import MISSING, Table, main_columns, plus_minus
from prefarena.report.verdict import is_clear

_LONGEST_VALUE = 60


def differences(first: Results, second: Results) -> list[Table]:
    """Tables of differences in settings, versions, policies and numbers; empty tables are left out."""
    tables = [
        _changes("Settings that differ", "setting", settings(first.config), settings(second.config)),
        _changes("Versions that differ", "package", dict(first.versions), dict(second.versions)),
        _changes("Policies that exist in only one run, or that failed", "policy", _outcomes(first), _outcomes(second)),
        _numbers(first, second),
    ]
    return [table for table in tables if table.rows]


def settings(config: Any, prefix: str = "") -> dict[str, str]:
    """Every setting by its path, as `--set` takes it; entries by their names, so that their order does not matter."""
    if isinstance(config, list) and config and all(isinstance(item, dict) and "name" in item for item in config):
        config = {item["name"]: {key: value for key, value in item.items() if key != "name"} for item in config}
    if isinstance(config, dict) and config:
        found: dict[str, str] = {}
        for key, value in config.items():
            found |= settings(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: config if isinstance(config, str) else json.dumps(config)} if prefix else {}


def _outcomes(results: Results) -> dict[str, str]:
    return {
        entry.name: f"failed with seeds {', '.join(entry.failures)}" if entry.failures else "measured"
        for entry in results.entries
    }


def _changes(title: str, what: str, first: dict[str, str], second: dict[str, str]) -> Table:
    rows = tuple(
        (name, _short(first.get(name, MISSING)), _short(second.get(name, MISSING)))
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    )
    return Table(title, (what, "first", "second"), rows, num_labels=3)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _numbers(first: Results, second: Results) -> Table:
    """The main table's numbers of policies that both runs have, where they are not the same."""
    columns = {column.title: column for column in main_columns(second)}
    others = {entry.name: entry for entry in second.entries}
    rows = []
    for entry in (entry for entry in first.entries if entry.name in others):
        for column in main_columns(first):
            one = column.value(first, entry)
            other = columns[column.title].value(second, others[entry.name]) if column.title in columns else None
            if one is None or other is None or one.mean == other.mean:
                continue
            known = [value.stderr for value in (one, other) if value.stderr is not None]
            stderr = math.hypot(*known) if len(known) == 2 else None
            change = Aggregate(other.mean - one.mean, stderr, 0, False)
            clear = {True: "yes", False: "no", None: MISSING}[is_clear(change)]
            cells = (plus_minus(value, column.digits) for value in (one, other, change))
            rows.append((entry.name, column.title, *cells, clear))
    header = ("policy", "number", "first", "second", "second − first", "clear")
    caption = (
        "The error of a difference is the root of the sum of both runs' squared errors, as if the runs were "
        "independent. Clear: a difference of more than two such errors."
    )
    return Table("Numbers that differ", header, tuple(rows), caption, 2)
