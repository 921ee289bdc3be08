"""The cost of a comparison, by stage and by entry: the numbers, and the rows that are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefarena.errors import UserError
from prefarena.estimate.interval import Interval, total
from prefarena.estimate.memory import Held
from prefarena.estimate.speeds import Speeds, stage_seconds
from prefarena.estimate.stages import Planned

_HOUR = 3600.0
#: What the name of a stage begins with that belongs to the trials of a tuning.
OF_TRIALS = "trials: "


@dataclass(frozen=True)
class Estimated:
    """A stage, done once. devices: cards, or processes on CPUs, that it holds all the while."""

    stage: str
    entry: str | None
    seconds: Interval
    devices: float
    times: int
    flops: float
    trained: float
    generated: float
    memory: Held | None

    @property
    def device_seconds(self) -> Interval:
        """The device-seconds of all its repetitions."""
        return self.seconds.times(self.devices * self.times)

    @property
    def is_evaluation(self) -> bool:
        return self.stage.removeprefix(OF_TRIALS).startswith("eval")


def estimate(planned: Sequence[Planned], speeds: Speeds, memory: Mapping[str, Held]) -> list[Estimated]:
    """Estimate the cost of every stage."""
    return [
        Estimated(
            one.stage,
            one.entry,
            stage_seconds(one.work, speeds),
            one.work.workers + one.work.beside,
            one.times,
            one.work.flops,
            one.work.trained,
            one.work.generated,
            memory.get(one.work.memory) if one.work.memory else None,
        )
        for one in planned
    ]


@dataclass(frozen=True)
class EntryCost:
    """An entry's own stages without evaluation, all seeds together. ratio: to the cheapest entry's device-seconds."""

    entry: str
    seconds: Interval
    device_seconds: Interval
    ratio: float
    flops: float
    trained: float
    generated: float
    mib: float | None


def by_entry(stages: Sequence[Estimated]) -> list[EntryCost]:
    """The cost of each entry, in the comparison's order; one that trains nothing has only its other stages."""
    own = {one.entry: [other for other in stages if other.entry == one.entry] for one in stages if one.entry}
    found = {entry: [one for one in its if not one.is_evaluation] for entry, its in own.items()}
    costs = {entry: total(one.device_seconds for one in its).middle for entry, its in found.items()}
    least = min((cost for cost in costs.values() if cost > 0), default=1.0)
    return [
        EntryCost(
            str(entry),
            total(one.seconds.times(one.times) for one in its),
            total(one.device_seconds for one in its),
            costs[entry] / least,
            sum(one.flops * one.times for one in its),
            sum(one.trained * one.times for one in its),
            sum(one.generated * one.times for one in its),
            max((one.memory.mib for one in its if one.memory and one.memory.mib is not None), default=None),
        )
        for entry, its in found.items()
    ]


def together(stages: Sequence[Estimated]) -> Interval:
    """Add up the device-seconds of all stages."""
    return total(one.device_seconds for one in stages)


def device_hours(seconds: Interval) -> Interval:
    return seconds.times(1 / _HOUR)


def price_of(device_seconds: Interval, per_hour: float) -> Interval:
    """The price. per_hour: what one device costs for an hour, in any currency. Raises UserError for a negative one."""
    if per_hour < 0:
        raise UserError(f"--price: an hour cannot cost {per_hour:g}; give what one device costs for an hour")
    return device_hours(device_seconds).times(per_hour)
