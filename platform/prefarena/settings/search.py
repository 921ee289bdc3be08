"""What may be searched: ranges of settings, which a method's file proposes and the user can replace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field, model_validator

from prefarena.settings.section import Section

Value = float | int | str | bool


class Span(Section):
    """All numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = Field(False, description="Search the logarithm evenly, as befits rates and weights.")
    integer: bool = Field(False, description="Whole numbers only.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Span:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} is not below high: {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: a logarithm needs low above 0, this is {self.low:g}")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("integer: low and high are whole numbers")
        return self

    @property
    def ends(self) -> tuple[Value, ...]:
        """The lowest and the highest value."""
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)


class OneOf(Section):
    """One of several values, none of which is nearer to another."""

    values: tuple[Value, ...] = Field(min_length=2)

    @property
    def ends(self) -> tuple[Value, ...]:
        """All of them."""
        return self.values


Dimension = Span | OneOf
#: Settings by their dotted names within a method, such as `training.learning_rate`.
Space = dict[str, Dimension]


def around(value: float, factor: float, *, integer: bool = False) -> Span:
    """A range from `value` / `factor` to `value` x `factor`, uniform in the logarithm; integers from 1 if `integer`."""
    low, high = value / factor, value * factor
    if integer:
        low, high = float(max(1, round(low))), float(max(2, round(high)))
    return Span(low=low, high=high, log=True, integer=integer)


def proposed(method: BaseModel, names: Iterable[str], factor: float) -> Space:
    """A factor to either side of the present values of these settings, of those that are at work (above 0)."""
    present = {name: float(setting(method, name)) for name in names}
    return {name: around(value, factor) for name, value in present.items() if value > 0}


def setting(method: BaseModel, name: str) -> Any:
    """The value of a setting by its dotted name. Raises AttributeError."""
    value: Any = method
    for part in name.split("."):
        value = getattr(value, part)
    return value
