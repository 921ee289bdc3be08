"""The eta and gamma terms, which any method's loss may have beside it: what they are over."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

#: What the eta term is a mean over (D_ref of MPO's paper). docs/methods.md says what each holds.
DemonstrationSource = Literal["data", "chosen", "samples", "file"]


def is_as_ever(value: object) -> bool:
    """`exclude_if` of the source of demonstrations, which came later: the one that there was is in no address."""
    return value == "data"


def is_zero(value: object) -> bool:
    """`exclude_if` of numbers that came later, and are 0 by default."""
    return value == 0


DEMONSTRATION_SOURCE: Any = Field(
    "data",
    exclude_if=is_as_ever,
    description="What the eta term is over: demonstrations of the data (data), chosen responses of the training pairs "
    "(chosen), samples of the reference (samples), or rows of task.demonstration_data (file).",
)
