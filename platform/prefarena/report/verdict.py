"""The findings in plain words. Every sentence is computed; none is written beforehand.

"Clear" means: more than two standard errors. Over few seeds that is weaker than the usual 95 %, and the text says so.
"""

from __future__ import annotations

from collections.abc import Callable

from prefarena.report.results import (
    Aggregate,
    EntryResult,
    Results,
    aggregate,
    kl_key,
    paired_difference,
    with_gains,
)
from prefarena.report.significance import significant, student_coverage
from prefarena.report.tables import number, plus_minus, wall_seconds

NEAR_FRONTIER = 0.95  # share of the possible gain
_LONGER = 1.2


def verdict(results: Results) -> list[str]:
    """Sentences for whoever must decide, most important first."""
    found = with_gains(results)
    entries = found.trained()
    if not entries:
        return ["No method was trained: there is nothing to compare."]
    sentences = _exact(found, entries) if found.exact else _judged(found, entries)
    return [sentence for sentence in [*sentences, _costs(found, entries), _strength(found)] if sentence]


def _exact(results: Results, entries: list[EntryResult]) -> list[str]:
    first = _leader(entries, "reward/covered", "the highest expected reward on prompts with pairs", True)
    if results.is_sweep:  # dozens of settings: what a sweep shows is read at equal gain, not entry by entry
        return [first, _nearest(results)]
    return [
        first,
        _efficiency(entries),
        _leader(entries, "regret/covered", "the least reward lost to the optimum at its own KL (regret)", False),
        _dominated(entries, "kl/covered", "reward/covered"),
        _drift(entries),
    ]


def _judged(results: Results, entries: list[EntryResult]) -> list[str]:
    kl = kl_key(results)
    by_score = [
        _leader(entries, "judge_score", "the highest judge score", True),
        _dominated(entries, kl, "judge_score"),
    ]
    by_wins = [
        _leader(entries, "win_rate", "the highest win rate against the reference", True),
        _dominated(entries, kl, "win_rate", "a higher win rate"),
    ]
    return [
        _against_chance(entries, "win_rate", "the reference", "responses"),
        *(by_score if any(aggregate(entry, "judge_score") for entry in entries) else by_wins),
        _against_chance(entries, "preference_accuracy", "chance", "held-out pairs"),
        _lengths(results, entries),
    ]


def is_clear(difference: Aggregate) -> bool | None:
    """Whether a difference is more than two standard errors from zero; None where no error is known."""
    return None if difference.stderr is None else abs(difference.mean) > 2 * difference.stderr


def _leader(entries: list[EntryResult], key: str, what: str, high: bool) -> str:
    """Which policy is first in `key`, and by how much it leads the second."""
    known = [(entry, value) for entry in entries if (value := aggregate(entry, key)) is not None]
    if not known:
        return ""
    known.sort(key=lambda pair: pair[1].mean, reverse=high)
    first, value = known[0]
    text = f"**{first.name}** has {what}: {plus_minus(value, 3)}"
    if len(known) < 2:
        return f"{text}."
    second = known[1][0]
    difference = paired_difference(first, second, key)
    if difference is None:
        return f"{text}; {second.name} is next ({plus_minus(known[1][1], 3)}), but they have no seed in common."
    size = plus_minus(difference._replace(mean=abs(difference.mean)), 3)
    return f"{text}; {second.name} is next, {size} behind{_clarity(difference)}."


def _clarity(difference: Aggregate) -> str:
    clear = is_clear(difference)
    if clear is None:
        return " (one run each, so another seed may change the order)"
    return " (outside two standard errors)" if clear else " (within two standard errors, so they may be equal)"


def _nearest(results: Results) -> str:
    """Each group's setting that is nearest to the frontier."""
    best = {}
    for group, entries in results.groups().items():
        shares = {entry.name: share for entry in entries if (share := _share_of_gain(entry)) is not None}
        if shares:
            name = max(shares, key=_of(shares))
            best[group] = f"{group} {shares[name]:.0%} ({name})"
    listed = ", ".join(best.values())
    return f"Largest share of the possible gain at the same KL, by method: {listed}." if listed else ""


def _efficiency(entries: list[EntryResult]) -> str:
    """Which policies are near the frontier: gain as a share of the largest gain possible at the policy's own KL."""
    shares = {entry.name: share for entry in entries if (share := _share_of_gain(entry)) is not None}
    if not shares:
        return ""
    near = [name for name, share in shares.items() if share >= NEAR_FRONTIER]
    listed = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1]))
    who = f"{_names(near)} {'is' if len(near) == 1 else 'are'}" if near else "No method is"
    return (
        f"{who} within {1 - NEAR_FRONTIER:.0%} of the optimal frontier. Share of the possible gain at the same KL: "
        f"{listed}."
    )


def _share_of_gain(entry: EntryResult) -> float | None:
    keys = ("gain/covered", "regret/covered")
    rows = [row for row in entry.seeds.values() if all(key in row for key in keys)]
    possible = sum(row["gain/covered"] + row["regret/covered"] for row in rows)
    return sum(row["gain/covered"] for row in rows) / possible if rows and possible > 0 else None


def _dominated(entries: list[EntryResult], kl: str, reward: str, more: str = "more reward") -> str:
    """Entries that another one beats on both axes: less KL and more reward, both clearly or with one run each."""
    found = []
    for entry in entries:
        better = [other for other in entries if other is not entry and _dominates(other, entry, kl, reward)]
        if better:
            found.append(f"{entry.name} by {_names([other.name for other in better])}")
    seeded = any(len(entry.seeds) > 1 for entry in entries)
    how = "by more than two standard errors in both" if seeded else "in this run"
    return f"Dominated, at lower KL and {more}, {how}: {'; '.join(found)}." if found else ""


def _dominates(other: EntryResult, entry: EntryResult, kl: str, reward: str) -> bool:
    more = paired_difference(other, entry, reward)
    less = paired_difference(other, entry, kl)
    if more is None or less is None or more.mean <= 0 or less.mean >= 0:
        return False
    return is_clear(more) is not False and is_clear(less) is not False


def _drift(entries: list[EntryResult]) -> str:
    """KL on prompts without pairs for each unit of reward gained on prompts with them."""
    rates = {}
    for entry in entries:
        gain, kl = aggregate(entry, "gain/covered"), aggregate(entry, "kl/uncovered")
        if gain is not None and kl is not None and gain.mean > 0:
            rates[entry.name] = kl.mean / gain.mean
    if not rates:
        return ""
    listed = ", ".join(f"{name} {rate:.2f}" for name, rate in sorted(rates.items(), key=lambda pair: pair[1]))
    return (
        f"Drift on prompts without pairs, in nats of KL per unit of reward gained on prompts with pairs: {listed}. KL "
        f"grows faster than gain, so this does not rank methods with unequal gains; a sweep that compares them at "
        f"equal gain does."
    )


def _against_chance(entries: list[EntryResult], key: str, rival: str, of: str) -> str:
    """Which entries' `key` is over one half, under it, or neither, at 5 % for all of them together."""
    sides: dict[str, list[str]] = {"above": [], "below": [], "not told from": []}
    known = [(entry, value) for entry in entries if (value := aggregate(entry, key)) is not None]
    for (entry, value), is_more in zip(known, significant([value for _, value in known], 0.5), strict=True):
        side = "not told from" if not is_more else "above" if value.mean > 0.5 else "below"
        sides[side].append(f"{entry.name} ({plus_minus(value, 3)})")
    if not any(sides.values()):
        return ""
    verb = "Preferred to" if key == "win_rate" else "Orders pairs better than"
    for_all = f", after Holm's correction for {len(known)} comparisons" if len(known) > 1 else ""
    parts = [
        f"{verb} {rival} on {of}, at the 5 % level{for_all}: {_names(sides['above']) or 'none'}",
        f"worse: {_names(sides['below'])}" if sides["below"] else "",
        f"not told from one half: {_names(sides['not told from'])}" if sides["not told from"] else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def _lengths(results: Results, entries: list[EntryResult]) -> str:
    reference = results.reference()
    base = aggregate(reference, "response_length") if reference is not None else None
    if base is None or base.mean <= 0:
        return ""
    lengths = {
        entry.name: value.mean for entry in entries if (value := aggregate(entry, "response_length")) is not None
    }
    odd = [
        f"{name} ({length / base.mean:.1f} times the reference's)"
        for name, length in lengths.items()
        if not 1 / _LONGER < length / base.mean < _LONGER
    ]
    return f"Response lengths differ, and judges may favour length: {_names(odd)}." if odd else ""


def _costs(results: Results, entries: list[EntryResult]) -> str:
    seconds = {entry.name: value.mean for entry in entries if (value := wall_seconds(results, entry)) is not None}
    if results.is_sweep or min(seconds.values(), default=0.0) <= 0 or len(set(seconds.values())) < 2:
        return ""
    cheap, dear = min(seconds, key=_of(seconds)), max(seconds, key=_of(seconds))
    return (
        f"Cost of each entry's own stages, for one seed: {cheap} is the cheapest ({number(seconds[cheap], 1)} s), "
        f"{dear} the dearest "
        f"({number(seconds[dear], 1)} s, {seconds[dear] / seconds[cheap]:.1f} times as much)."
    )


def _of(values: dict[str, float]) -> Callable[[str], float]:
    return lambda name: values[name]


def _strength(results: Results) -> str:
    """A sentence on how strong two standard errors are with this number of seeds."""
    num_seeds = len(results.seeds)
    if num_seeds < 2:
        return "There is only one seed, so differences may be due to chance. More seeds give standard errors."
    return (
        f"Standard errors are over {num_seeds} seeds; if the seeds' values are normal, ± two standard errors cover "
        f"the true mean in {student_coverage(2.0, num_seeds - 1):.0%} of cases."
    )


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
