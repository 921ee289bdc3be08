"""The text of both pages: what was compared, what was found, what the data are, and the limits."""

from __future__ import annotations

from typing import Any

from prefarena.report.label_efficiency import label_finding
from prefarena.report.leakage import baseline_of, leakage
from prefarena.report.results import Aggregate, Results, kl_key
from prefarena.report.tables import number, plus_minus
from prefarena.report.tuning import tuning_note, tuning_warnings
from prefarena.report.verdict import verdict


def compared(results: Results) -> str:
    """What was compared on which task, and how it was measured."""
    names = ", ".join(entry.name for entry in results.trained())
    if results.is_sweep:
        names = ", ".join(f"{group} ({len(entries)} settings)" for group, entries in results.groups().items())
    seeds = "one seed" if len(results.seeds) == 1 else f"{len(results.seeds)} seeds"
    how = (
        "all responses are enumerated, so reward and KL are exact"
        if results.exact
        else "KL, scores and win rates are estimated from samples on held-out prompts"
    )
    return f"Compared on the task `{results.task.get('kind', '?')}`, {seeds}: {names}; {how}."


def findings(results: Results) -> list[str]:
    """Sentences in Markdown, the most important first: failures, unequal tuning, drift at equal gain, labels …"""
    return [
        *_failed(results),
        *tuning_warnings(results),
        *_leaks(results),
        *label_finding(results),
        *verdict(results),
        *tuning_note(results),
    ]


def _failed(results: Results) -> list[str]:
    """Which entries have no policy, and why; seeds that failed for one reason are told of together."""
    sentences = []
    for entry in results.entries:
        for reason in dict.fromkeys(entry.failures.values()):
            seeds = [seed for seed, why in entry.failures.items() if why == reason]
            listed = seeds[0] if len(seeds) == 1 else f"{', '.join(seeds[:-1])} and {seeds[-1]}"
            sentences.append(f"**{entry.name} failed** with seed{'s' if len(seeds) > 1 else ''} {listed}: {reason}.")
    return sentences


def _leaks(results: Results) -> list[str]:
    """The sweep's answer: drift without pairs at equal gain, as a ratio to the baseline."""
    found = leakage(results) if results.is_sweep else None
    if found is None:
        return []
    base = baseline_of(found)
    parts = [f"{group} {_ratio(ratios[-1])} times" for group, ratios in found.ratios(base).items() if group != base]
    return [
        f"**At equal gain** on prompts with pairs, KL on prompts without pairs, against {base}'s: {', '.join(parts)} "
        f"(geometric means over gains {found.levels[0]:.2f} to {found.levels[-1]:.2f}, paired by seed)."
    ]


def _ratio(value: tuple[float, float | None]) -> str:
    return plus_minus(Aggregate(value[0], value[1], 0, True), 2)


def data_lines(results: Results) -> list[str]:
    """The numbers of the data, one a line."""
    return [f"{_words(key)}: {_shown(value)}" for key, value in _flat(results.data)]


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}, ") if isinstance(value, dict) else [(name, value)]
    return rows


def _words(key: str) -> str:
    return key.replace("num_", "").replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(value, 0 if isinstance(value, int) else 4)


def limits(results: Results) -> list[str]:
    """The run's own notes, and what its numbers cannot tell."""
    found = list(results.notes)
    if len(results.seeds) == 1:
        found.append("One seed: the order of methods that are close together may be due to chance.")
    if not results.exact and kl_key(results) == "kl":
        found.append(
            "The KL estimate is noisy for a policy far from the reference, and may be negative for one close to it."
        )
    return found
