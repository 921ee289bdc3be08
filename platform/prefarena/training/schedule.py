"""The schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def decay(schedule: Schedule, progress: float) -> float:
    """The share of the learning rate that is left at `progress` in [0, 1]: all of it, or down to none at 1."""
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))


def warmed_up(base: float, schedule: Schedule, position: int, length: int, warmup: int) -> float:
    """The learning rate of step `position` of `length`: a linear rise to `base` at step `warmup`, then the schedule.

    Step 0 already learns (at base / (warmup + 1)), and the decay would reach zero one step after the last.
    """
    rise = min(1.0, (position + 1) / (warmup + 1))
    progress = max(0, position - warmup) / max(1, length - warmup)
    return base * rise * decay(schedule, progress)
