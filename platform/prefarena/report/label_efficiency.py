"""How many labelled pairs each method needs: its measures over the number of pairs, and what it takes to reach a level.

A curve is an entry at several numbers of pairs (`num_pairs`, of the method or of its reward model). Between two numbers
it is taken to be straight in the logarithm of the number; beyond the ends nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from prefarena.report.results import Aggregate, EntryResult, Results, aggregate, gained, kl_key
from prefarena.report.tables import Table, number, plus_minus

NOT_REACHED = "not reached"


class Measure(NamedTuple):
    """A measure: its name, its key in evaluation rows, and whether more or less is better; None: neither."""

    name: str
    key: str
    more_is_better: bool | None


class LabelCurve(NamedTuple):
    """A group's entries by their number of pairs, ascending."""

    group: str
    entries: tuple[tuple[int, EntryResult], ...]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.entries]

    def means(self, key: str, seeds: Sequence[str]) -> list[float]:
        """The mean over these seeds at each number of pairs."""
        return [math.fsum(entry.seeds[seed][key] for seed in seeds) / len(seeds) for _, entry in self.entries]


class Needed(NamedTuple):
    """The fewest pairs that reach a level. pairs None: it is not reached; at_most: the fewest that were tried do."""

    pairs: float | None
    at_most: bool = False

    def __str__(self) -> str:
        if self.pairs is None:
            return NOT_REACHED
        return f"{'≤ ' if self.at_most else ''}{number(two_digits(self.pairs), 0)}"


class Need(NamedTuple):
    """The pairs that a method needs for a level: from the means over seeds, and from each single seed."""

    mean: Needed
    seeds: tuple[Needed, ...]

    def __str__(self) -> str:
        """The means' number, and the least and the most of the seeds where they are not all as the means."""
        ordered = sorted(self.seeds, key=lambda one: math.inf if one.pairs is None else one.pairs)
        low, high = str(ordered[0]), str(ordered[-1])
        if {low, high} == {str(self.mean)}:
            return str(self.mean)
        return f"{self.mean} ({low if low == high else f'{low} to {high}'})"


class Level(NamedTuple):
    """The level that a method reaches with the most pairs that it had, and how many each method needs to reach it."""

    measure: Measure
    group: str
    pairs: int
    value: float
    needs: dict[str, Need]


# ------------------------------------------------------------------------------------------- what is found


def num_pairs(entry: EntryResult) -> int | None:
    """The number of labelled pairs that an entry is limited to; None if it is not limited."""
    found = entry.settings.get("num_pairs") or (entry.settings.get("reward") or {}).get("num_pairs")
    return int(found) if found else None


def label_curves(results: Results) -> list[LabelCurve]:
    """The curves of all groups that have entries at two or more numbers of pairs; failed entries are left out."""
    found = []
    for group, entries in results.groups().items():
        by_number = {number: entry for entry in entries if entry.seeds and (number := num_pairs(entry)) is not None}
        if len(by_number) > 1:
            found.append(LabelCurve(group, tuple(sorted(by_number.items(), key=lambda one: one[0]))))
    return found


def measures(results: Results) -> list[Measure]:
    """The measures shown over the number of pairs, as far as they are known."""
    regret, kl = ("regret/covered", "kl/covered") if results.exact else ("regret", kl_key(results))
    possible = [Measure(*gained(results), True), Measure("regret", regret, False), Measure("KL", kl, None)]
    curves = label_curves(results)
    return [one for one in possible if any(aggregate(entry, one.key) for c in curves for _, entry in c.entries)]


def pairs_needed(numbers: Sequence[int], values: Sequence[float], level: float) -> Needed:
    """Where the curve first reaches `level`: straight lines in the logarithm of the number, which ascends.

    More is better; nothing is said below the first number or above the last one.
    """
    if values[0] >= level:
        return Needed(float(numbers[0]), at_most=True)
    for place in range(1, len(numbers)):
        before, after = values[place - 1], values[place]
        if after >= level:
            share = (level - before) / (after - before)
            low, high = math.log(numbers[place - 1]), math.log(numbers[place])
            return Needed(math.exp(low + share * (high - low)))
    return Needed(None)


def levels(results: Results, measure: Measure) -> list[Level]:
    """The level that each method reaches with the most pairs, the easiest first, and what others need for it.

    Means are over the seeds that all entries of all curves have; by a seed alone the level is that method's with that
    seed. Empty where there are fewer than two curves.
    """
    curves = [c for c in label_curves(results) if all(aggregate(entry, measure.key) for _, entry in c.entries)]
    rows = [entry.seeds for curve in curves for _, entry in curve.entries]
    seeds = [str(s) for s in results.seeds if all(measure.key in row.get(str(s), {}) for row in rows)]
    if len(curves) < 2 or not seeds or measure.more_is_better is None:
        return []
    sign = 1.0 if measure.more_is_better else -1.0

    def reached(curve: LabelCurve, among: Sequence[str]) -> list[float]:
        return [sign * value for value in curve.means(measure.key, among)]

    found = []
    for target in curves:
        needs = {
            curve.group: Need(
                _needed(curve, target, reached, seeds), tuple(_needed(curve, target, reached, [s]) for s in seeds)
            )
            for curve in curves
        }
        best = reached(target, seeds)[-1]
        found.append(Level(measure, target.group, target.numbers[-1], sign * best, needs))
    return sorted(found, key=lambda one: sign * one.value)


def _needed(
    curve: LabelCurve,
    target: LabelCurve,
    reached: Callable[[LabelCurve, Sequence[str]], list[float]],
    seeds: Sequence[str],
) -> Needed:
    return pairs_needed(curve.numbers, reached(curve, seeds), reached(target, seeds)[-1])


def two_digits(value: float) -> float:
    """Rounded to two significant digits, which is more than such a curve tells."""
    return float(f"{value:.2g}")


# -------------------------------------------------------------------------------------------- what is shown


def measured_table(results: Results) -> Table | None:
    """Each method's measures at each number of pairs; None where no entry stands there at several."""
    curves, shown = label_curves(results), measures(results)
    if not curves:
        return None
    numbers = sorted({number for curve in curves for number in curve.numbers})
    rows = tuple(
        (curve.group, one.name, *(plus_minus(_at(curve, number, one.key), 3) for number in numbers))
        for one in shown
        for curve in curves
    )
    header = ("method", "measure", *(number(value, 0) for value in numbers))
    return Table("Measures by number of labelled pairs", header, rows, _measured_caption(results, curves), 2)


def _at(curve: LabelCurve, pairs: int, key: str) -> Aggregate | None:
    entry = dict(curve.entries).get(pairs)
    return None if entry is None else aggregate(entry, key)


def _measured_caption(results: Results, curves: list[LabelCurve]) -> str:
    where = "on prompts with pairs, exact" if results.exact else "on held-out prompts"
    text = (
        f"Columns: number of labelled pairs that a method, or its reward model, learns from; smaller sets are subsets "
        f"of larger ones. Measures are {where}."
    )
    if any(_leaves_some(pairs, entry) for curve in curves for pairs, entry in curve.entries):
        text += (
            " Some training runs end before they have seen all of their pairs; results.json says how many they saw "
            "(`data_labels`)."
        )
    trainings = [_training(entry) for curve in curves for _, entry in curve.entries]
    if all(one.get("num_steps") for one in trainings):
        return (
            f"{text} Training on pairs takes the same number of steps however many pairs there are, so each pair "
            "is seen more often if there are few."
        )
    if any(one.get("num_steps") for one in trainings):
        return (
            f"{text} Training runs with num_epochs take fewer steps on fewer pairs; those with num_steps take the "
            "same number."
        )
    return (
        f"{text} Training runs make a fixed number of passes over their pairs (num_epochs), so they take fewer steps "
        f"on fewer pairs: the curves show the effect of labels and of steps together."
    )


def _leaves_some(pairs: int, entry: EntryResult) -> bool:
    seen = aggregate(entry, "data_labels")
    return seen is not None and seen.mean < pairs


def _training(entry: EntryResult) -> dict[str, object]:
    """Settings of what is trained on pairs: the reward model's, where there is one."""
    reward = entry.settings.get("reward") or {}
    found: dict[str, object] = (reward if "num_pairs" in reward else entry.settings).get("training") or {}
    return found


def needed_table(results: Results) -> Table | None:
    """How many pairs each method needs for what another one reaches with all of its own; None for fewer than two."""
    found = [level for one in measures(results) for level in levels(results, one)]
    if not found:
        return None
    groups = list(found[0].needs)
    rows = tuple(
        (
            one.measure.name,
            f"{one.group} with {number(one.pairs, 0)}: {number(one.value, 3)}",
            *(str(one.needs[group]) if group in one.needs else NOT_REACHED for group in groups),
        )
        for one in found
    )
    caption = (
        "The fewest labelled pairs with which a method reaches what another one has with its largest number of pairs, "
        "interpolated linearly in the logarithm of that number and rounded to two digits. ≤: the smallest number "
        "tried is enough; not reached: none of the numbers tried is enough."
    )
    if len(results.seeds) > 1:
        caption += (
            " Computed from the means over seeds; in brackets, unless all agree, the lowest and highest number from "
            "single seeds, with that seed's own level."
        )
    if any(one.measure.name == "regret" for one in found):
        caption += (
            " Policies with equal reward may differ in KL. Regret is what could still be gained at a policy's own KL, "
            "so it can compare methods at unequal KL."
        )
    else:
        caption += " Policies with equal reward may differ in KL, which this table does not show."
    return Table("Labelled pairs needed for the same result", ("measure", "level", *groups), rows, caption, 2)


def label_finding(results: Results) -> list[str]:
    """The easiest level of the first measure, in a sentence; none where there are fewer than two curves."""
    shown = measures(results)
    found = levels(results, shown[0]) if label_curves(results) and shown else []
    if not found:
        return []
    one = found[0]
    others = [f"{group} {_in_words(need)}" for group, need in one.needs.items() if group != one.group]
    return [
        f"**Labels:** the {one.measure.name} that {one.group} has with {number(one.pairs, 0)} labelled pairs "
        f"({number(one.value, 3)}) takes {', '.join(others)}."
    ]


def _in_words(need: Need) -> str:
    if need.mean.pairs is None:
        return "more than it was given"
    return f"{'' if need.mean.at_most else 'about '}{need}"
