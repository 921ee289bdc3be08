"""The whole cost of each method: labels, judgements, tokens, FLOPs, device-seconds, memory; and reward against each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from prefarena.report.results import EntryResult, Results, aggregate, gained
from prefarena.report.tables import MISSING, Table, number

#: What an entry spends per seed; None if that is not known or if it spends none.
Spent = Callable[[Results, EntryResult], float | None]


@dataclass(frozen=True)
class Expense:
    """One thing that a method costs. axis: its name on a chart; without one it is only in the table."""

    name: str
    spent: Spent
    axis: str | None = None


def _total(field: str, results: Results, entry: EntryResult) -> float | None:
    """The total over the entry's own stages, each a mean over its seeds."""
    stages: dict[str, list[float]] = {}
    for cost in results.own_costs(entry):
        stages.setdefault(cost.stage, []).append(float(getattr(cost, field)))
    return sum(sum(found) / len(found) for found in stages.values()) or None


def _labels(results: Results, entry: EntryResult) -> float | None:
    found = [value.mean for key in ("data_labels", "own_labels") if (value := aggregate(entry, key)) is not None]
    return sum(found) or None


def _judged(results: Results, entry: EntryResult) -> float | None:
    pairs = aggregate(entry, "responses_judged")
    return ((_total("num_rewards", results, entry) or 0.0) + (pairs.mean if pairs else 0.0)) or None


def _peak(results: Results, entry: EntryResult) -> float | None:
    peaks = [cost.peak_memory_mib for cost in results.own_costs(entry) if cost.peak_memory_mib is not None]
    return max(peaks, default=None)


EXPENSES = (
    Expense("labels", _labels, "labelled pairs"),
    Expense("responses judged", _judged),
    Expense("tokens trained", partial(_total, "num_tokens_trained")),
    Expense("tokens generated", partial(_total, "num_tokens_generated")),
    Expense("FLOPs", partial(_total, "num_flops"), "FLOPs"),
    Expense("device, s", partial(_total, "device_seconds"), "device-seconds"),
    Expense("peak memory, MiB", _peak, "peak memory per worker, MiB"),
)


def whole_cost_table(results: Results) -> Table | None:
    """One row per trained entry; None if no stage has recorded its costs."""
    told = [entry for entry in results.trained() if entry.seeds and results.own_costs(entry)]
    rows = tuple((entry.shown_name, *(_cell(one, results, entry) for one in EXPENSES)) for entry in told)
    caption = (
        "Cost per seed, averaged over seeds. It includes the entry's own stages and its reward model's, but not what "
        "entries share (the reference, pairs and their log-probs) or evaluation. Labels: distinct pairs that the entry "
        "or its reward model was trained on. Responses judged: rewards for rollouts and for pairs that were drawn "
        "during training. FLOPs: matrix products, counted from the models' shapes and the lengths that went through "
        "them, including generation and models that only score. Device seconds: those of workers and generation "
        "actors. Peak memory: that of the worker that held the most, with all of its models."
    )
    header = ("policy", *(expense.name for expense in EXPENSES))
    return Table(f"{results.name}: what each method cost", header, rows, caption, 1) if rows else None


def _cell(expense: Expense, results: Results, entry: EntryResult) -> str:
    value = expense.spent(results, entry)
    if value is None:
        return MISSING
    return scientific(value) if expense.name == "FLOPs" else number(value, 0)


def scientific(value: float) -> str:
    """A number above one as 8.84e9."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Priced:
    """An entry with its cost, the value of its measure, and that value's standard error if there is one."""

    entry: EntryResult
    cost: float
    value: float
    error: float | None


def against_costs(results: Results) -> tuple[str, list[tuple[str, list[Priced]]]]:
    """The measure's name and, for each expense with an axis, every entry with what it spent.

    Expenses that are the same for all entries, or that fewer than two entries have, are left out.
    """
    name, key = gained(results)
    found = []
    for expense in EXPENSES:
        points = []
        for entry in results.trained():
            cost, value = expense.spent(results, entry), aggregate(entry, key)
            if cost is not None and value is not None:
                points.append(Priced(entry, cost, value.mean, value.stderr))
        if expense.axis is not None and len({point.cost for point in points}) > 1:
            found.append((expense.axis, points))
    return name, found
