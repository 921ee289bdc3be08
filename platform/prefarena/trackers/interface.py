"""What a tracker does: it shows runs, and makes each of them equal to the rows of a training run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: A line of metrics.jsonl.
Row = Mapping[str, Any]
#: Of a row, what is no metric.
_PLACE = ("step", "num_steps")


@dataclass(frozen=True)
class Run:
    """One training of a comparison, or one policy that needs none, as trackers show it.

    comparison: the name of its run folder. entry: whose training it is; what entries share has its own name. seed: None
    where seeds share it. kind: a method's, `reference`, `judge` or `reward_model`. stage: its address.
    """

    comparison: str
    entry: str
    seed: int | None
    kind: str
    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """ENTRY-s0, or ENTRY-KIND-s0 of what comes before an entry's own training."""
        return "-".join([*self.path[:-1], f"s{self.seed}"] if self.seed is not None else self.path)

    @property
    def path(self) -> tuple[str, ...]:
        """Folders of a tracker that keeps some, below that of the comparison."""
        prior = (self.kind,) if self.kind == "reward_model" else ()
        return (self.entry, *prior, *(() if self.seed is None else (f"seed-{self.seed}",)))

    @property
    def id(self) -> str:
        """The run's id, which does not depend on who writes the run, or when."""
        text = "\n".join([self.comparison, self.entry, str(self.seed), self.stage])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class OpenRun(Protocol):
    """A run that is being written."""

    def log(self, rows: Sequence[Row]) -> None:
        """Add rows, whose steps are later than all that the run has."""

    def summarise(self, numbers: Mapping[str, float]) -> None:
        """Make the run show its final numbers, replacing any that it has."""

    def close(self) -> None:
        """Close the run; nothing more is written."""


class Tracker(Protocol):
    """A place where runs are shown. What it raises is counted and said, and ends no training."""

    def open(self, run: Run, rows: Sequence[Row]) -> OpenRun:
        """The run of this id, which then shows exactly `rows`, each step once, whatever an earlier process left of it.

        Rows are those that no later attempt of the training does again.
        """


def metrics_of(row: Row) -> dict[str, float]:
    """The measurements of a row, by name."""
    return {name: float(value) for name, value in row.items() if name not in _PLACE and isinstance(value, int | float)}


def described(run: Run) -> dict[str, Any]:
    """The properties that distinguish runs, for a tracker's own filters."""
    return {"comparison": run.comparison, "entry": run.entry, "seed": run.seed, "kind": run.kind, "stage": run.stage}
