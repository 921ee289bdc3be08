"""The one engine of every training: a module with its optimizer, spread over the workers.

Off-policy methods, the reference, the reward model, an on-policy policy and its critic are all moved by a `Learner`. It
distributes the module, adds up the gradients of a step's micro-batches, reduces them over the workers once, clips them,
leaves out a step whose loss or gradient is not a number, and knows what of it belongs in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.layers import recompute_layers
from prefarena.modeling.parts import own_part, whole
from prefarena.modeling.roles import Role
from prefarena.objectives.output import Mean, ObjectiveOutput
from prefarena.settings.optimisation import LearnerSettings
from prefarena.training.guard import GuardedOptimizer
from prefarena.training.sharding import clip_parts, is_sharded
from prefarena.training.worker import Worker, load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True)
class Pass:
    """One micro-batch of a step.

    compute: from the module in training (DDP's wrapper where there is one) to a sum of losses and metrics. scale: what
    the sum is multiplied with, so that all passes of all workers add up to the step's loss.
    """

    compute: Callable[[nn.Module], ObjectiveOutput]
    scale: float | Tensor


def prepare(module: nn.Module, settings: LearnerSettings, worker: Worker) -> None:
    """Switch dropout off, have the module compute in halves and layers be recomputed; before memory is predicted.

    Without dropout policy and reference agree at the start, and runs repeat. FSDP makes halved copies itself.
    """
    module.eval()
    if settings.precision == "bfloat16" and not worker.shards:
        compute_in_halves(module)
    if settings.activation_checkpointing:
        recompute_layers(module)
    if worker.spares(settings):
        worker.spare_memory()


class Learner:
    """A module, its AdamW over the parameters that require a gradient, and its largest gradient norm.

    `module`, which is prepared, holds its parameters in float32 (master weights), whatever it computes in. A role on a
    shared body, which somebody has distributed, trains its own adapters and head alone. name: prefixes its tensors in a
    checkpoint.
    """

    def __init__(
        self, name: str, module: nn.Module, settings: LearnerSettings, worker: Worker, *, fused: bool = True
    ) -> None:
        """fused: one pass of the optimizer over all parameters; off, for a benchmark of what it is worth."""
        self.name = name
        self._worker, self._settings = worker, settings
        # `_called` is what losses pass batches to, `_root` the module that is reduced over workers.
        self._called: nn.Module = module if isinstance(module, Role) else worker.distribute(module, settings.precision)
        self._root: nn.Module = module.body if isinstance(module, Role) else self._called
        self.module = module.module if isinstance(module, Role) else module
        self.trained = module.trained() if isinstance(module, Role) else _trained(module)
        self._optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=fused,  # on small models the time of a step is that of its many small operations
        )
        self.guard = GuardedOptimizer(self._optimizer, worker)
        self._loss = torch.zeros((), device=worker.device)

    def accumulate(self, passes: Iterable[Pass]) -> list[ObjectiveOutput]:
        """Set the gradient to that of the scaled losses of all workers' passes. Returns each pass's output, detached.

        Scales are those of the whole step, so neither the number of passes nor that of workers changes the gradient.
        """
        self._optimizer.zero_grad(set_to_none=True)
        self._loss = torch.zeros_like(self._loss)
        outputs: list[ObjectiveOutput] = []
        work = list(passes)
        for position, one in enumerate(work):
            self._worker.give_back_freed(self._settings)
            with self._worker.no_sync(self._root, enabled=position < len(work) - 1):
                output = one.compute(self._called)
                # DDP and FSDP average gradients over workers; the step's loss is their sum.
                (output.loss.total * (one.scale * self._worker.world_size)).backward()
            loss = Mean(output.loss.total.detach(), output.loss.count.detach())
            self._loss = self._loss + loss.total * one.scale
            outputs.append(ObjectiveOutput(loss, output.metrics))
        if isinstance(self._called, Role) and not self.sharded:
            # Two roles on one body: DDP would wait in the backward pass of one for gradients of the other.
            self._worker.average_gradients(self.trained.values())
        return outputs

    @torch.no_grad()
    def without_gradient(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what `compute` gets from the module as it is now, without tracking gradients."""
        return compute(self.module)

    def apply(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip the gradient and move along it. Returns its norm [] before clipping, and whether it was skipped []."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        worker, most = self._worker, self._settings.max_grad_norm
        if worker.offloads:
            norm = clip_parts(self.trained.values(), most, lambda one: worker.sum(one.to(worker.device)))
            norm = norm.to(worker.device)
        else:
            norm = whole(nn.utils.clip_grad_norm_(self.trained.values(), most))
        return norm, self.guard.step(self._loss, norm)

    def drop_gradients(self) -> None:
        """Free the gradients of the last step, which the next one would replace."""
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def sharded(self) -> bool:
        """Whether each worker holds a part of the module."""
        return is_sharded(self._root)

    def tensors(self) -> dict[str, Tensor]:
        """This worker's part of what is trained and of the optimizer's state, by name."""
        weights = {f"{self.name}.{name}": own_part(parameter) for name, parameter in self.trained.items()}
        return weights | optimizer_tensors(self._optimizer, f"{self.name}_optimizer")

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, parameter in self.trained.items():
            own_part(parameter).copy_(tensors[f"{self.name}.{name}"])
        load_optimizer_tensors(self._optimizer, tensors, f"{self.name}_optimizer")


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
