"""A number that is not known exactly: its most likely value, and the bounds in which it is expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Interval(NamedTuple):
    """An interval with low <= middle <= high."""

    low: float
    middle: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Interval:
        return cls(value, value, value)

    def times(self, factor: float) -> Interval:
        """Multiply by a factor, which is not negative."""
        return Interval(*(factor * value for value in self))

    def under(self, amount: float) -> Interval:
        """Divide `amount` by this: the seconds of so much work at this speed."""
        return Interval(amount / self.high, amount / self.middle, amount / self.low)

    def scaled(self, other: Interval) -> Interval:
        """Multiply bounds by bounds, of numbers that are not negative."""
        return Interval(*(own * its for own, its in zip(self, other, strict=True)))

    def at_least(self, other: Interval) -> Interval:
        """The larger of the two, bound by bound: of two things that happen at the same time, the longer one."""
        return Interval(*map(max, self, other))


NOTHING = Interval.exactly(0.0)


def total(parts: Iterable[Interval]) -> Interval:
    """Add up bounds: as if all parts were fast together, or slow together, since they run on one machine."""
    found = list(parts)
    return Interval(*(sum(part[bound] for part in found) for bound in range(3)))
