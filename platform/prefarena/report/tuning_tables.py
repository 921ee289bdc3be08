"""Tables of tuning: budgets, chosen settings, and all trials."""

from __future__ import annotations

import numpy as np

from prefarena.report.results import EntryResult, Results
from prefarena.report.tables import MISSING, Table, number, plus_minus
from prefarena.report.tuning import (
    TunedCurve,
    best_trial,
    changed_since,
    over_seeds,
    shown_settings,
    shown_value,
    tuned_curves,
)
from prefarena.report.tuning_results import TrialResult, TuningResults


def budget_table(results: Results) -> Table | None:
    """Every entry's budget, and the expected best of parts of it; None if no entry was tuned."""
    tuning, curves = results.tuning, {curve.entry.name: curve for curve in tuned_curves(results)}
    if tuning is None or not curves:
        return None
    most = max(len(curve.trials) for curve in curves.values())
    sizes = [size for size in sorted({1, 4, most // 2}) if 0 < size < most]
    rows = tuple(_budget_row(tuning, entry.name, curves.get(entry.name), sizes) for entry in results.trained())
    header = (
        "policy",
        "trials",
        "complete",
        "stopped",
        "failed",
        "device, s",
        *(f"best of {size}" for size in sizes),
        "best of all",
    )
    caption = (
        "Best of k: the value of the best of k of an entry's trials, averaged over all choices of k, with a 95 % "
        "bootstrap interval. Stopped: trained with the first selection seed only, because they were among the worse "
        "ones there. Device seconds: the total of all trials."
    )
    return Table("Budgets, and what they can be expected to find", header, rows, caption)


def _budget_row(tuning: TuningResults, name: str, curve: TunedCurve | None, sizes: list[int]) -> tuple[str, ...]:
    tuned = tuning.entry(name)
    if tuned is None or curve is None:
        return (name, "0", *[MISSING] * (5 + len(sizes)))
    states = [trial.state for trial in curve.trials]
    return (
        name,
        str(tuned.num_trials),
        *(str(states.count(state)) for state in ("complete", "stopped", "failed")),
        number(tuned.device_seconds, 1),
        *(_expected(curve, size) for size in sizes),
        number(float(curve.so_far[-1]), 3),
    )


def chosen_table(results: Results) -> Table | None:
    """The settings of every entry, and what they reached in the selection; None where no entry was tuned."""
    tuning = results.tuning
    if tuning is None or not tuned_curves(results):
        return None
    rows = tuple(_chosen_row(tuning, entry) for entry in results.trained())
    caption = (
        "For the trial whose settings were chosen: the value by which it was ranked, its reward above the "
        f"reference's, and its KL in nats, {_over(tuning)}. It is the best of many noisy values, so expect the same "
        "settings to do worse on fresh seeds."
    )
    return Table("Settings chosen", ("policy", "settings", "trial", "value", "reward", "KL"), rows, caption, 2)


def _over(tuning: TuningResults) -> str:
    num_seeds = len(tuning.selection_seeds)
    return "of one seed" if num_seeds == 1 else f"± one standard error over {num_seeds} selection seeds"


def _chosen_row(tuning: TuningResults, entry: EntryResult) -> tuple[str, ...]:
    tuned, winner = tuning.entry(entry.name), best_trial(tuning, entry.name)
    if tuned is None or not tuned.num_trials:
        return (entry.name, "not tuned", *[MISSING] * 4)
    if winner is None:
        return (entry.name, "none: all trials failed", *[MISSING] * 4)
    edited = " (not what the entry ran with)" if changed_since(tuned, entry) else ""
    return (entry.name, f"{shown_settings(tuned.settings)}{edited}", str(winner.number), *_measured(winner))


def _expected(curve: TunedCurve, size: int) -> str:
    if size > len(curve.trials):
        return MISSING
    low, high = curve.expected.interval[size - 1]
    text = number(float(curve.expected.mean[size - 1]), 3)
    return text if np.isnan(low) else f"{text} [{number(float(low), 3)}, {number(float(high), 3)}]"


def _measured(trial: TrialResult) -> tuple[str, str, str]:
    """The value, reward and KL of a trial."""
    return number(trial.value, 3), plus_minus(over_seeds(trial.rewards), 3), plus_minus(over_seeds(trial.kls), 3)


def trial_tables(results: Results) -> list[Table]:
    """All trials of each entry that was tuned, in order, a column for each setting; the chosen one is strong."""
    return [_trial_table(results.tuning, curve) for curve in tuned_curves(results) if results.tuning]


def _trial_table(tuning: TuningResults, curve: TunedCurve) -> Table:
    names = list(dict.fromkeys(name for trial in curve.trials for name in trial.settings))
    rows = tuple(
        (
            str(trial.number),
            f"failed: {trial.reason}" if trial.state == "failed" and trial.reason else trial.state,
            *(shown_value(trial.settings[name], 4) if name in trial.settings else MISSING for name in names),
            *_measured(trial),
            number(trial.device_seconds, 1),
        )
        for trial in curve.trials
    )
    winner = best_trial(tuning, curve.entry.name)
    strong = frozenset(place for place, trial in enumerate(curve.trials) if trial is winner)
    header = ("trial", "state", *names, "value", "reward", "KL", "device, s")
    return Table(f"Trials of {curve.entry.name}", header, rows, "", 2, strong)
