"""Optimizer steps whose loss or gradient is not finite are skipped, on all workers in the same way.

Where the optimizer is a fused one this is decided on the device, and nothing is copied to the host: its kernels take a
flag (`found_inf`, which torch made for loss scaling) and change neither weights nor moments when it is set. A step that
is taken is the same, bit for bit, as without the flag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefarena.training.worker import Worker


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not a number."""


class GuardedOptimizer:
    """An optimizer that skips what it cannot use, and counts it, on the device."""

    def __init__(self, optimizer: torch.optim.Optimizer, worker: Worker) -> None:
        self.optimizer, self._worker = optimizer, worker
        self._moves_on = optimizer.param_groups[0]["params"][0].device
        self._fused = all(group.get("fused") for group in optimizer.param_groups)
        zero = torch.zeros((), device=worker.device)
        self._skipped, self._streak, self._longest = zero, zero.clone(), zero.clone()

    def step(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Move along the gradient, unless loss [] or norm [] is not finite on some worker. Returns whether not, []."""
        finite = torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm)
        flag = self._worker.sum((~finite).float()).clamp(max=1)
        if self._fused:
            # On the host where the weights are there; optimizers copy it without waiting for it to arrive.
            self.optimizer.found_inf = flag.to(self._moves_on)  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(flag):
            self.optimizer.step()
        self._skipped = self._skipped + flag
        self._streak = (self._streak + 1) * flag
        self._longest = torch.maximum(self._longest, self._streak)
        return flag.bool()

    @property
    def num_skipped(self) -> int:
        """Steps left out since the job began. Copies from the device."""
        return int(self._skipped)

    def longest_streak(self) -> int:
        """Most steps in a row that were left out since this was last asked for. Copies from the device."""
        longest, self._longest = int(self._longest), self._streak
        return longest

    def state(self) -> dict[str, Any]:
        """Return the counts for a checkpoint. Copies from the device."""
        return {"steps_skipped": self.num_skipped, "skipped_in_a_row": int(self._streak)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._skipped = torch.full_like(self._skipped, state["steps_skipped"])
        self._streak = torch.full_like(self._streak, state["skipped_in_a_row"])
        self._longest = self._streak


def stop_if_diverged(in_a_row: int, limit: int, what: str) -> None:
    """Raise TrainingDivergedError where more than `limit` of `what` in a row came to nothing."""
    if in_a_row > limit:
        raise TrainingDivergedError(
            f"the loss or the gradient was not finite in {in_a_row} {what} in a row, but only {limit} are allowed; a "
            f"lower learning rate may help"
        )
