"""How the entries' settings were chosen: what each trial counts, the expected best of k of them, and who was tuned.

A trial counts its value, but at least 0, which is the reference's: whoever tunes has the reference without any trial,
and it is all that a failed trial leaves. A trial that was stopped has a value of the first seed alone; it counts that,
and at most as much as the winner, since it could not have won.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from prefarena.report.expected_best import ExpectedBest, best_so_far, expected_best_with_interval
from prefarena.report.results import Aggregate, EntryResult, Results, mean_and_error
from prefarena.report.tables import number
from prefarena.report.tuning_results import TrialResult, TunedEntry, TuningResults
from prefarena.settings.search import Value

REFERENCE = 0.0


class TunedCurve(NamedTuple):
    """An entry's trials in order, what each counts [n], the expected best of k, and the best of the first k [n].

    seconds: device-seconds of a trial, on average.
    """

    entry: EntryResult
    trials: list[TrialResult]
    counted: np.ndarray
    expected: ExpectedBest
    so_far: np.ndarray
    seconds: float


def tuned_curves(results: Results) -> list[TunedCurve]:
    """One for each entry of the comparison that was tuned, in its order; none where nothing was."""
    tuning = results.tuning
    if tuning is None:
        return []
    found = []
    for entry in results.trained():
        trials = tuning.of(entry.name)
        if trials:
            values = counted(tuning, entry.name)
            expected = expected_best_with_interval(values, tuning.seed)
            seconds = math.fsum(trial.device_seconds for trial in trials) / len(trials)
            found.append(TunedCurve(entry, trials, values, expected, best_so_far(values), seconds))
    return found


def counted(tuning: TuningResults, entry: str) -> np.ndarray:
    """The value that each of the entry's trials counts, in order, [n]."""
    winner = best_trial(tuning, entry)
    most = math.inf if winner is None or winner.value is None else winner.value
    values = []
    for trial in tuning.of(entry):
        value = REFERENCE if trial.value is None else trial.value
        values.append(max(REFERENCE, min(value, most) if trial.state == "stopped" else value))
    return np.array(values)


def best_trial(tuning: TuningResults, entry: str) -> TrialResult | None:
    """The trial whose settings were chosen; None where all failed, or the entry was not tuned."""
    tuned = tuning.entry(entry)
    if tuned is None or tuned.best is None:
        return None
    return next((trial for trial in tuning.of(entry) if trial.number == tuned.best), None)


def over_seeds(by_seed: dict[str, float]) -> Aggregate | None:
    """The mean over the selection's seeds, with its standard error where there are several."""
    if not by_seed:
        return None
    mean, error = mean_and_error(list(by_seed.values()))
    return Aggregate(mean, error, len(by_seed), error is not None)


# ------------------------------------------------------------------------------------ what an entry ran with


def changed_since(tuned: TunedEntry, entry: EntryResult) -> dict[str, tuple[Any, Any]]:
    """Settings, by dotted name, in which the entry differs from what its tuning chose: (chosen, what it ran with)."""
    chosen = {"kind": tuned.kind, **tuned.settings, **_leaves(tuned.method)}
    ran = {"kind": entry.kind, **_leaves(entry.settings)}
    return {name: (value, ran.get(name)) for name, value in chosen.items() if not _same(value, ran.get(name))}


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; numbers may differ as much as a text file rounds them."""
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def shown_value(value: Any, digits: int = 3) -> str:
    """A setting as text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def shown_settings(settings: Mapping[str, Value], digits: int = 3) -> str:
    """Write settings like `beta 0.1, training.learning_rate 0.001`."""
    return ", ".join(f"{name} {shown_value(value, digits)}" for name, value in settings.items())


# ------------------------------------------------------------------------------------------------ sentences


def tuning_text(results: Results) -> str:
    """What was tuned, with which budget, by which criterion, and on what; empty if nothing was."""
    tuning = results.tuning
    if tuning is None:
        return ""
    how = {
        "tpe": " Trials were proposed by a search that learns from earlier ones (TPE).",
        "random": " Trials were drawn at random.",
    }
    fresh = "" if _seen_before(results, tuning) else " No number measured there is in this report."
    return (
        f"{_who_was_tuned(results, tuning)}.{how.get(tuning.sampler or '', '')} Settings were selected on "
        f"{tuning.selection.rstrip('.')}, by {tuning.criterion.rstrip('.')}.{fresh}"
    )


def expected_best_text(results: Results) -> str:
    """What the curves of expected best trials show, and what they do not."""
    learned = (
        " Trials were proposed on the basis of earlier ones, so they are not independent draws. A shorter search "
        "would have had worse ones, so the curves are likely to be too high at few trials."
        if results.tuning is not None and results.tuning.sampler == "tpe"
        else ""
    )
    return (
        "the best of k of an entry's trials, averaged over all choices of k, in the units of a trial's value. Bands: "
        "95 % bootstrap intervals over trials, up to half of their number; beyond that, resampling cannot say what a "
        "luckier search would find. A trial counts as at least 0, the reference's value, and so does one that failed; "
        f"one that was stopped counts with its first seed's value, but at most that of the chosen trial.{learned}"
    )


def tuning_warnings(results: Results) -> list[str]:
    """What a reader must know before comparing: unequal budgets, settings that no tuning chose, seeds seen before."""
    tuning = results.tuning
    if tuning is None:
        return []
    found = []
    if len(set(budgets(results).values())) > 1:
        found.append(
            f"**Budgets of tuning differ**: {_listed_budgets(results)}{_limit(tuning)}. Differences between such "
            f"entries may be due to the budget."
        )
    for entry in results.trained():
        tuned = tuning.entry(entry.name)
        if tuned is None or not tuned.num_trials:
            continue
        if tuned.best is None:
            found.append(
                f"**All {tuned.num_trials} trials of {entry.name} failed**, so tuning chose no settings for it."
            )
        elif changed := changed_since(tuned, entry):
            found.append(
                f"**{entry.name} does not have the settings that its tuning chose**: {_listed_changes(changed)}."
            )
    return [*found, *_seen_before(results, tuning)]


def tuning_note(results: Results) -> list[str]:
    """A note on the budget, where every entry had the same."""
    tuning, different = results.tuning, set(budgets(results).values())
    if tuning is None or len(different) > 1 or different == {0}:
        return []
    return [f"{_who_was_tuned(results, tuning)}, selected on {tuning.selection.rstrip('.')}."]


def budgets(results: Results) -> dict[str, int]:
    """The number of trials of each entry of the comparison; 0 if it was not tuned."""
    tuning = results.tuning
    found = {entry.name: tuning.entry(entry.name) if tuning else None for entry in results.trained()}
    return {name: tuned.num_trials if tuned else 0 for name, tuned in found.items()}


def _who_was_tuned(results: Results, tuning: TuningResults) -> str:
    numbers = budgets(results)
    if len(set(numbers.values())) == 1:
        trials = next(iter(numbers.values()))
        return f"Every entry was tuned with {trials} trial{'s' if trials != 1 else ''}{_limit(tuning)}"
    return f"Entries were tuned with unequal budgets: {_listed_budgets(results)}{_limit(tuning)}"


def _limit(tuning: TuningResults) -> str:
    seconds = tuning.device_seconds
    return "" if seconds is None else f", and no new ones after {number(seconds, 0)} device-seconds"


def _listed_budgets(results: Results) -> str:
    by_number: dict[int, list[str]] = {}
    for name, trials in budgets(results).items():
        by_number.setdefault(trials, []).append(name)
    parts = []
    for trials, names in sorted(by_number.items(), reverse=True):
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        each = " each" if len(names) > 1 else ""
        told = f"{trials} trial{'s' if trials > 1 else ''}{each}" if trials else "no tuning"
        parts.append(f"{listed} with {told}")
    return ", ".join(parts)


def _listed_changes(changed: dict[str, tuple[Any, Any]]) -> str:
    """List at most three of the changes."""
    parts = [
        f"`{name}` is {shown_value(ran, 6)}, but tuning chose {shown_value(chosen, 6)}"
        for name, (chosen, ran) in changed.items()
    ]
    return "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more" if len(parts) > 3 else "")


def _seen_before(results: Results, tuning: TuningResults) -> list[str]:
    """Languages that were selected on and are reported; on text, rows are kept apart by the split."""
    if not results.exact:
        return []
    languages = results.seeds if results.config.get("seeds_vary") == "task" else [0]  # counted from the task's seed
    both = sorted(set(languages) & set(tuning.selection_seeds))
    if not both:
        return []
    listed = ", ".join(str(seed) for seed in both)
    return [
        f"**Settings were selected on what is reported here**: the language{'s' if len(both) > 1 else ''} of seed"
        f"{'s' if len(both) > 1 else ''} {listed}. Its numbers favour whatever was tuned; compare on other seeds."
    ]
