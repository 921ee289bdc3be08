"""Sums of metrics over the steps between two logged rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefarena.objectives.output import Mean
from prefarena.training.worker import Worker


@dataclass
class Window:
    """Sums of metrics since the last logged row, on the device: nothing is copied to the host in between.

    means: those of the current step. `close` ends it, and drops what it added where the step was skipped.
    """

    means: dict[str, Mean] = field(default_factory=dict)
    _closed: dict[tuple[str, ...], list[Tensor]] = field(default_factory=dict)  # names to [2 x names] of each step

    def add(self, name: str, mean: Mean) -> None:
        self.means[name] = self.means[name] + mean if name in self.means else mean

    def close(self, skipped: Tensor) -> None:
        """End a step; `skipped` [] bool."""
        names = tuple(sorted(self.means))
        parts = [part.detach().float() for name in names for part in (self.means[name].total, self.means[name].count)]
        self._closed.setdefault(names, []).append(torch.where(skipped, 0, torch.stack(parts)))
        self.means = {}

    def reduce(self, worker: Worker) -> dict[str, float]:
        """Return the means over all workers of all that was counted, and empty the window. Call `close` before."""
        totals: dict[str, Tensor] = {}
        for names, steps in self._closed.items():
            sums = torch.stack(steps).double().sum(0).view(-1, 2)
            for name, pair in zip(names, sums, strict=True):
                totals[name] = totals[name] + pair if name in totals else pair
        self._closed = {}
        order = sorted(totals)
        reduced = worker.sum(torch.stack([totals[name] for name in order]).to(worker.device)).tolist()
        return {name: total / count for name, (total, count) in zip(order, reduced, strict=True) if count}
