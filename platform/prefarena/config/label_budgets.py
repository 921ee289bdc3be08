"""Entries at several numbers of labelled pairs: what `label_budgets` of a comparison makes of each entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefarena.config.best_of_n import BestOfN
from prefarena.settings.judges import RewardModel
from prefarena.settings.off_policy import OffPolicy, Pairwise
from prefarena.settings.on_policy import OnPolicy
from prefarena.settings.section import Section

if TYPE_CHECKING:
    from prefarena.config.comparison import Entry


def at_budgets(entries: tuple[Entry, ...], budgets: tuple[int, ...]) -> tuple[Entry, ...]:
    """Each entry once for each number of pairs, named `NAME-NUMBER`, in a group that has the entry's name.

    One that learns from no labels, or that has a `num_pairs` of its own, is left as it is: so entries that were made
    here are not multiplied again. Raises ValueError for one that has labels made while it trains.
    """
    found: list[Entry] = []
    for entry in entries:
        method = entry.method
        if not budgets or not uses_labels(method) or num_pairs_of(method) is not None:
            found.append(entry)
            continue
        if isinstance(method, Pairwise) and (method.online is not None or method.replay is not None):
            raise ValueError(
                f"label_budgets: entry {entry.name!r} learns from pairs drawn online, whose labels no budget counts; "
                f"remove the entry"
            )
        for number in budgets:
            changed = {"name": f"{entry.name}-{number}", "group": entry.name, "method": _limited(method, number)}
            found.append(entry.model_copy(update=changed))
    return tuple(found)


def uses_labels(method: Section) -> bool:
    """Whether it learns from the labels of the data's pairs, itself or by a reward model."""
    if isinstance(method, OnPolicy | BestOfN):
        return isinstance(method.reward, RewardModel)
    return isinstance(method, OffPolicy)


def num_pairs_of(method: Section) -> int | None:
    """The pairs that it is limited to; None: it has all, or learns from none."""
    if isinstance(method, OnPolicy | BestOfN):
        return method.reward.num_pairs if isinstance(method.reward, RewardModel) else None
    return method.num_pairs if isinstance(method, OffPolicy) else None


def all_limits(method: Section) -> list[int]:
    """Every number of pairs that it, or a reward model of its own, is limited to."""
    rewards = [method.reward] if isinstance(method, OnPolicy | BestOfN) else []
    if isinstance(method, Pairwise) and method.online is not None:
        rewards.append(method.online.reward)
    learned = [reward.num_pairs for reward in rewards if isinstance(reward, RewardModel)]
    own = [method.num_pairs] if isinstance(method, OffPolicy) else []
    return [number for number in [*own, *learned] if number is not None]


def _limited(method: Section, number: int) -> Section:
    if isinstance(method, OnPolicy | BestOfN):
        return method.model_copy(update={"reward": method.reward.model_copy(update={"num_pairs": number})})
    return method.model_copy(update={"num_pairs": number})
