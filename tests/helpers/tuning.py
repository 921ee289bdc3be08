"""A tuning as `prefarena tune` leaves it: trials whose numbers can be reckoned by hand, and some that look real."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from prefarena.report.results import Results
from prefarena.report.tuning_results import TrialResult, TunedEntry, TuningResults, save_tuning
from prefarena.settings.search import Value

KL_LIMIT = 5.0
SEEDS = ["1000", "1001"]
#: By method: the best learning rate, what ten times more or less costs, the best reward, and seconds of a training.
_SHAPES = {
    "mpo": (1e-3, 0.2, 1.9, 12.0),
    "dpo": (3e-4, 0.9, 1.8, 11.0),
    "ipo": (1e-3, 0.5, 1.6, 11.5),
    "rlhf": (3e-4, 1.3, 2.0, 70.0),
}
_STRENGTHS = {"ipo": "tau", "rlhf": "training.kl_coef"}


def trial(entry: str, number: int, value: float | None, *, stopped: bool = False, **settings: Value) -> TrialResult:
    """A trial of two seeds that both reach `value` at a KL of 2, or of one where it was stopped; None: it failed."""
    seeds = [] if value is None else SEEDS[:1] if stopped else SEEDS
    return TrialResult(
        entry=entry,
        number=number,
        settings=settings or {"beta": 0.1},
        state="failed" if value is None else "stopped" if stopped else "complete",
        rewards={seed: value for seed in seeds if value is not None},
        kls=dict.fromkeys(seeds, 2.0),
        value=value,
        reason="the disk is full" if value is None else None,
        device_seconds=10.0 * max(1, len(seeds)),
    )


def tuning(trials: list[TrialResult]) -> TuningResults:
    """The results of these trials; an entry's winner is the best of those that were not stopped."""
    entries = []
    for name in dict.fromkeys(one.entry for one in trials):
        own = [one for one in trials if one.entry == name]
        best = max((one for one in own if one.state == "complete"), key=lambda one: one.value or 0.0, default=None)
        entry = TunedEntry(
            name=name, kind=name, num_trials=len(own), device_seconds=sum(one.device_seconds for one in own),
            best=best.number if best else None, settings=best.settings if best else {},
        )  # fmt: skip
        entries.append(entry)
    return TuningResults(
        name="made-up", criterion="the reward at a KL of at most 5 nats", kl_limit=KL_LIMIT,
        selection="two other languages", selection_seeds=[1000, 1001], seed=0,
        num_trials=max(entry.num_trials for entry in entries), batch_size=8, trials=trials, entries=entries,
    )  # fmt: skip


def plausible_tuning(num_trials: int = 24, names: tuple[str, ...] = tuple(_SHAPES)) -> TuningResults:
    """Trials of a learning rate, which matters, and of a strength, which does not, in batches of eight.

    The worse half of a batch is stopped, and trials at a rate above 0.006 fail.
    """
    trials = []
    for name in names:
        generator = np.random.default_rng([7, *name.encode()])
        for start in range(0, num_trials, 8):
            numbers = range(start, min(start + 8, num_trials))
            batch = [_trial(name, number, start == 0, generator) for number in numbers]
            ranked = sorted(batch, key=lambda one: -math.inf if one.value is None else one.value, reverse=True)
            kept = {one.number for one in ranked[: len(batch) // 2]}
            trials += [one if one.number in kept else _stopped(one) for one in batch]
    return tuning(trials).model_copy(update={"sampler": "tpe"})


def _trial(name: str, number: int, is_first: bool, generator: np.random.Generator) -> TrialResult:
    best_rate, cost, top, seconds = _SHAPES[name]
    exponent = generator.uniform(-5, -2) if is_first else math.log10(best_rate) + generator.normal(0, 0.5)
    settings: dict[str, Value] = {
        "training.learning_rate": float(10**exponent),
        _STRENGTHS.get(name, "beta"): float(10 ** generator.uniform(-2, 0)),
    }
    if 10**exponent > 6e-3:
        failed = {"settings": settings, "reason": "its loss was no number", "device_seconds": seconds / 3}
        return trial(name, number, None).model_copy(update=failed)
    off = exponent - math.log10(best_rate)
    reward, kl = top - cost * off**2 + generator.normal(0, 0.1), 3.0 + 2.5 * off + generator.normal(0, 0.3)
    rewards = {seed: float(reward + generator.normal(0, 0.08)) for seed in SEEDS}
    kls = {seed: float(max(0.02, kl + generator.normal(0, 0.2))) for seed in SEEDS}
    made = TrialResult(entry=name, number=number, settings=settings, state="complete", rewards=rewards, kls=kls)
    return made.model_copy(update={"value": _value(made, SEEDS), "device_seconds": 2 * seconds})


def _stopped(made: TrialResult) -> TrialResult:
    if made.state == "failed":
        return made
    first = {"rewards": {SEEDS[0]: made.rewards[SEEDS[0]]}, "kls": {SEEDS[0]: made.kls[SEEDS[0]]}}
    changed = {"state": "stopped", "value": _value(made, SEEDS[:1]), "device_seconds": made.device_seconds / 2}
    return made.model_copy(update=first | changed)


def _value(made: TrialResult, seeds: list[str]) -> float:
    values = [made.rewards[s] if made.kls[s] <= KL_LIMIT else KL_LIMIT - made.kls[s] for s in seeds]
    return sum(values) / len(values)


def with_tuning(results: Results, found: TuningResults) -> Results:
    """The results of a comparison that ran with what was found."""
    results.tuning = found
    for entry in results.trained():
        tuned = found.entry(entry.name)
        for name, value in (tuned.settings if tuned else {}).items():
            *parents, last = name.split(".")
            node = entry.settings
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
    return results


def tuned_by(folder: Path, found: TuningResults) -> str:
    """What `tuned` in a config says, of results that are written into the folder."""
    return str(save_tuning(found, folder))
