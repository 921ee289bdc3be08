"""Counts of the questions that a judge was asked, and of the calls that were paid for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Usage:
    """num_paid: requests that were answered; num_reused: answers that had been paid for before; num_torn: of those
    kept, how many lines were cut off by the death of a process; num_unstructured: of those paid for, the ones for
    which the server refused structured output; num_asked, num_silent: rows, and those without a verdict."""

    num_paid: int = 0
    num_reused: int = 0
    num_torn: int = 0
    num_unstructured: int = 0
    num_asked: int = 0
    num_silent: int = 0

    def costs(self) -> dict[str, int]:
        """The costs as written in a manifest."""
        return {
            "num_judge_calls": self.num_paid,
            "num_judge_calls_reused": self.num_reused,
            "num_judge_calls_torn": self.num_torn,
            "num_judge_calls_unstructured": self.num_unstructured,
        }


def total_costs(usages: Iterable[Usage | None]) -> dict[str, int]:
    """The sums of `costs`; empty where no endpoint was asked."""
    found = [usage.costs() for usage in usages if usage is not None]
    return {name: sum(costs[name] for costs in found) for name in (found[0] if found else ())}
