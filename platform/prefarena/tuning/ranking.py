"""How trials are ranked, and which are continued: the same rule for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prefarena.settings.search import Value


@dataclass(frozen=True)
class Measured:
    """A policy compared with the reference on the same prompts: reward above the reference's, and KL in nats."""

    gain: float
    kl: float

    @property
    def is_number(self) -> bool:
        """Whether both are numbers, as they are not where a policy said nothing that could be judged."""
        return math.isfinite(self.gain) and math.isfinite(self.kl)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial. value: None where it failed, for the `reason`."""

    settings: Mapping[str, Value]
    state: Literal["complete", "stopped", "failed"]
    measured: Mapping[int, Measured]  # by the seed
    value: float | None = None
    reason: str | None = None
    device_seconds: float = 0.0


def value_of(measured: Measured, kl_limit: float) -> float:
    """The reward gained where the KL is within the limit; else how far it is beyond, below zero.

    So a policy that went too far comes after every one that beats the reference, and a search is told which way lies
    the limit.
    """
    return measured.gain if measured.kl <= kl_limit else kl_limit - measured.kl


def mean_value(measured: Mapping[int, Measured], kl_limit: float) -> float:
    """The mean over seeds of `value_of`."""
    values = [value_of(one, kl_limit) for one in measured.values()]
    return math.fsum(values) / len(values)


def going_on(values: Sequence[float | None], kept_share: float) -> list[bool]:
    """The trials of a batch that are trained with the other seeds, too: the best share by value, rounded up.

    Of equals the earlier one goes on. Failed trials (None) count in the batch, and never go on.
    """
    number = math.ceil(kept_share * len(values))
    ranked = sorted((i for i, value in enumerate(values) if value is not None), key=lambda i: (-_number(values[i]), i))
    chosen = set(ranked[:number])
    return [i in chosen for i in range(len(values))]


def _number(value: float | None) -> float:
    if value is None:
        raise TypeError("a failed trial has no value")
    return value


def best_of(outcomes: Sequence[Outcome]) -> int | None:
    """The number of the trial with the highest value among complete ones; the earliest of equals; None: all failed.

    A stopped trial was behind others that went on, so it is the best only where a later seed failed for all of those.
    """
    for state in ("complete", "stopped"):
        found = [(-_number(one.value), i) for i, one in enumerate(outcomes) if one.state == state]
        if found:
            return min(found)[1]
    return None
