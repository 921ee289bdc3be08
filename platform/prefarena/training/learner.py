"""A trained model with its optimizer: one optimizer step, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prefarena.objectives.output import Mean, ObjectiveOutput
from prefarena.training.guard import GuardedOptimizer
from prefarena.training.on_policy_batch import Batch
from prefarena.training.worker import Worker, load_optimizer_tensors, optimizer_tensors

#: A micro-batch to a sum of losses.
Term = Callable[[Batch], ObjectiveOutput]
#: Of each micro-batch, by name.
Metrics = list[dict[str, Mean]]


class Learner:
    """A module, its AdamW and its largest gradient norm. `wrapped` runs forward in training (DDP where shared)."""

    def __init__(
        self,
        name: str,
        norm_name: str,
        module: nn.Module,
        worker: Worker,
        *,
        betas: tuple[float, float],
        max_grad_norm: float,
    ) -> None:
        self.name = name
        self.norm_name = norm_name  # of the metric
        self.module = module
        self.wrapped = worker.wrap(module)
        self._worker = worker
        self._max_grad_norm = max_grad_norm
        # One fused pass: on small models the time of a step is that of its many small operations.
        self._optimizer = torch.optim.AdamW(module.parameters(), betas=betas, weight_decay=0.0, fused=True)
        self.guard = GuardedOptimizer(self._optimizer, worker)
        self._loss = torch.zeros((), device=worker.device)

    def accumulate(self, parts: list[Batch], term: Term, count: Tensor, autocast: Callable[[], Any]) -> Metrics:
        """Set the gradient to that of the summed losses of all workers' `parts`, divided by `count` [].

        Returns the metrics of each part. `count` is that of the whole optimizer step, so neither the number of parts
        nor that of workers changes the gradient.
        """
        self._optimizer.zero_grad(set_to_none=True)
        metrics: Metrics = []
        self._loss = torch.zeros_like(self._loss)
        for position, part in enumerate(parts):
            with self._worker.no_sync(self.wrapped, enabled=position < len(parts) - 1):
                with autocast():
                    output = term(part)
                # DDP averages gradients over workers; the step's loss is their sum.
                (output.loss.total * (self._worker.world_size / count)).backward()
            self._loss = self._loss + output.loss.total.detach()
            metrics.append(output.metrics)
        return metrics

    def apply(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip the gradient and move along it. Returns its norm [] before clipping, and whether it was skipped []."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm)
        return norm, self.guard.step(self._loss, norm)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state, by name."""
        weights = {f"{self.name}.{name}": value for name, value in self.module.named_parameters()}
        return weights | optimizer_tensors(self._optimizer, f"{self.name}_optimizer")

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[f"{self.name}.{name}"])
        load_optimizer_tensors(self._optimizer, tensors, f"{self.name}_optimizer")
