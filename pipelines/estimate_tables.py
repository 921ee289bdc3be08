"""An estimate as tables: by stage, by entry, and next to what a finished run took."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefarena.estimate.interval import Interval
from prefarena.estimate.memory import Held
from prefarena.estimate.result import Estimated, by_entry, device_hours, price_of
from prefarena.report.results import Cost, Results
from prefarena.report.tables import MISSING, Table, number

_SHARED = "shared by all"


def stage_table(stages: Sequence[Estimated], price: float | None) -> Table:
    """One row per stage."""
    rows = tuple(
        (
            one.entry or _SHARED,
            one.stage + (f" (x {one.times})" if one.times > 1 else ""),
            shown(one.seconds),
            shown(device_hours(one.device_seconds)),
            _memory(one.memory),
            _count(one.trained),
            _count(one.generated),
            _count(one.flops),
            *([] if price is None else [shown(price_of(one.device_seconds, price))]),
        )
        for one in stages
    )
    header = (
        "policy",
        "stage",
        "seconds",
        "device-hours",
        "memory, MiB",
        "tokens trained",
        "tokens generated",
        "FLOPs",
    )
    return Table("estimate by stage", (*header, *([] if price is None else ["price"])), rows, _CAPTION, 2)


_CAPTION = (
    "Seconds: for running the stage once, with the expected range. Device-hours: for all seeds. Memory: the peak of a "
    "training worker; ✗ marks more than it may use."
)


def entry_table(stages: Sequence[Estimated], price: float | None) -> Table:
    """One row per entry, with the ratio to the cheapest."""
    costs = by_entry(stages)
    rows = tuple(
        (
            one.entry,
            f"{one.ratio:.1f}" if one.device_seconds.middle else MISSING,
            shown(device_hours(one.device_seconds)),
            shown(one.seconds),
            number(one.mib, 0),
            _count(one.trained),
            _count(one.generated),
            _count(one.flops),
            *([] if price is None else [shown(price_of(one.device_seconds, price))]),
        )
        for one in costs
    )
    header = ("entry", "ratio", "device-hours", "seconds", "memory, MiB", "tokens trained", "tokens generated", "FLOPs")
    caption = "Each entry's own stages over all seeds, without evaluation and without the stages that all share."
    return Table("estimate by entry", (*header, *([] if price is None else ["price"])), rows, caption)


def beside_table(stages: Sequence[Estimated], results: Results) -> Table:
    """Estimated and measured seconds and memory for every stage of a finished run, and for every entry."""
    rows, strong = [], set[int]()
    for one in stages:
        own = [cost for cost in results.costs if (cost.stage, cost.entry) == (one.stage, one.entry)]
        if own:
            rows.append(_beside(one.entry or _SHARED, one.stage, one, own))
    for cost in by_entry(stages):
        its = [one for one in results.costs if one.entry == cost.entry and not one.is_evaluation]
        if its:
            strong.add(len(rows))
            measured = sum(one.wall_seconds for one in its)
            within = "yes" if cost.seconds.low <= measured <= cost.seconds.high else "no"
            ratio = _ratio(cost.seconds.middle, measured)
            cells = (cost.entry, "total", shown(cost.seconds), number(measured, 1), ratio, within)
            rows.append(cells + (MISSING,) * 3)
    header = ("policy", "stage", "seconds", "measured", "ratio", "in range", "memory, MiB", "measured", "ratio")
    caption = (
        "Ratio: estimated divided by measured. Measured seconds are means over seeds, measured memory the largest."
    )
    return Table(f"estimate compared with {results.name}", header, tuple(rows), caption, 2, frozenset(strong))


def _beside(owner: str, stage: str, one: Estimated, own: Sequence[Cost]) -> tuple[str, ...]:
    seconds = sum(cost.wall_seconds for cost in own) / len(own)
    peaks = [cost.peak_memory_mib for cost in own if cost.peak_memory_mib is not None]
    mib = one.memory.mib if one.memory else None
    cells = [owner, stage, shown(one.seconds), number(seconds, 1), _ratio(one.seconds.middle, seconds)]
    cells.append("yes" if one.seconds.low <= seconds <= one.seconds.high else "no")
    measured = max(peaks) if peaks else None
    cells += [number(mib, 0), number(measured, 0)]
    return (*cells, _ratio(mib, measured) if mib is not None and measured is not None else MISSING)


def _ratio(estimated: float, measured: float) -> str:
    return number(estimated / measured, 2) if measured else MISSING


def shown(value: Interval) -> str:
    """Three significant digits, followed by the range, if there is one, with two."""
    if value.high == 0:
        return MISSING
    middle = _digits(value.middle, 3)
    return middle if value.low == value.high else f"{middle} ({_digits(value.low, 2)}–{_digits(value.high, 2)})"


def _digits(value: float, number_of: int) -> str:
    if value == 0 or value < 1e-4:
        return f"{value:.{number_of - 1}g}"
    digits = max(0, number_of - 1 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}"


def _count(value: float) -> str:
    """A count such as 1.2M, or 3.4e15 for FLOPs."""
    for limit, letter in ((1e15, None), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value:.1e}".replace("e+", "e") if letter is None else f"{value / limit:.1f}{letter}"
    return f"{value:.0f}" if value else MISSING


def _memory(held: Held | None) -> str:
    if held is None:
        return MISSING
    return number(held.mib, 0) + ("" if held.fits else " ✗")
