"""The one training loop of everything that learns from a fixed table: SFT, MPO, DPO, IPO, the reward model.

An optimizer step is a sum of terms (see terms.py), each cut into micro-batches. The step's counts are known from
the batch plan, so gradient accumulation and the number of workers change nothing but the order of additions.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefarena.config import Optimisation
from prefarena.modeling.layers import recompute_layers
from prefarena.objectives.output import Mean
from prefarena.training.guard import GuardedOptimizer, TrainingDivergedError
from prefarena.training.prediction import predict_memory
from prefarena.training.schedule import warmed_up
from prefarena.training.sharding import is_sharded, own_part, whole
from prefarena.training.terms import Term
from prefarena.training.worker import Worker, load_optimizer_tensors, optimizer_tensors


@dataclass
class Window:
    """Sums of metrics since the last logged row, on the device: nothing is copied to the host in between.

    means: of the step under way. `close` ends it, and drops what it added where the step was skipped.
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
        """The means over all workers, of what was counted at all; the window is emptied. `close` comes before."""
        totals: dict[str, Tensor] = {}
        for names, steps in self._closed.items():
            sums = torch.stack(steps).double().sum(0).view(-1, 2)
            for name, pair in zip(names, sums, strict=True):
                totals[name] = totals[name] + pair if name in totals else pair
        self._closed = {}
        order = sorted(totals)
        reduced = worker.sum(torch.stack([totals[name] for name in order]).to(worker.device)).tolist()
        return {name: total / count for name, (total, count) in zip(order, reduced, strict=True) if count}


def train(
    module: nn.Module,
    terms: list[Term],
    training: Optimisation,
    worker: Worker,
) -> dict[str, float]:
    """Run all steps from the last checkpoint on. Returns the numbers of steps and tokens trained, and predicted memory.

    `module` holds the parameters in float32; those that require a gradient are trained (master weights). `precision:
    bfloat16` computes under autocast; a sharded module makes halved copies itself. A step whose loss or gradient is not
    a number is skipped; raises TrainingDivergedError when a metric row is due and more than `training.max_bad_steps` in
    a row were.
    """
    module.eval()  # dropout off: policy and reference agree at the start, and runs repeat
    if training.activation_checkpointing:
        recompute_layers(module)
        worker.spare_memory()
    predicted = predict_memory(module, terms, training, worker)
    trained = worker.distribute(module, training.precision)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=True,
    )
    guard = GuardedOptimizer(optimizer, worker)
    num_steps = training.num_steps or terms[0].plan.num_steps(training.num_epochs)
    done = _restore(module, guard, worker)
    window, started, first = Window(), time.perf_counter(), done
    for step in range(done, num_steps):
        rate = warmed_up(training.learning_rate, training.schedule, step, num_steps, training.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        gradient_norm = optimizer_step(trained, terms, step, guard, training, worker, window)
        done = step + 1
        if done % training.log_every == 0 or done in (1, num_steps):
            row = {"step": done, "num_steps": num_steps, "learning_rate": rate, "grad_norm": float(gradient_norm)}
            row |= window.reduce(worker) | {"steps_skipped": guard.num_skipped}
            row["steps_per_second"] = (done - first) / (time.perf_counter() - started)
            worker.log(only_numbers(row))
            stop_if_diverged(guard.longest_streak(), training.max_bad_steps, f"steps up to step {done}")
        if done % training.checkpoint_every == 0 and done < num_steps:
            worker.save(done, _tensors(module, optimizer), guard.state(), sharded=is_sharded(module))
    return {
        **({"predicted_memory_mib": predicted} if predicted is not None else {}),
        "num_steps": num_steps,
        "micro_batch_tokens": terms[0].plan.micro_batch_tokens,
        "num_tokens_trained": sum(term.num_tokens(step) for term in terms for step in range(first, num_steps)),
    }


def optimizer_step(
    module: nn.Module,
    terms: list[Term],
    step: int,
    guard: GuardedOptimizer,
    training: Optimisation,
    worker: Worker,
    window: Window,
) -> Tensor:
    """One update. Adds to `window` and returns the gradient's norm before clipping, []."""
    guard.optimizer.zero_grad(set_to_none=True)
    work = [(term, micro) for term in terms for micro in term.plan.micro_batches(step, worker.rank)]
    for position, (term, micro) in enumerate(work):
        share = term.weight / term.count(step)
        halved = training.precision == "bfloat16" and not is_sharded(module)
        autocast = torch.autocast(worker.device.type, torch.bfloat16, enabled=halved)
        with worker.no_sync(module, enabled=position < len(work) - 1):
            with autocast:
                output = term(module, micro, worker.device)
            # DDP and FSDP average gradients over workers; the step's loss is their sum.
            (output.loss.total * (share * worker.world_size)).backward()
        one = torch.ones((), device=worker.device) / worker.world_size / len(work)
        window.add("loss", Mean(output.loss.total.detach() * share, one))
        window.add(f"loss/{term.name}", Mean(output.loss.total.detach(), output.loss.count.detach()))
        for name, mean in output.metrics.items():
            window.add(name, mean)
    gradient_norm = whole(nn.utils.clip_grad_norm_(module.parameters(), training.max_grad_norm))
    window.close(guard.step(window.means["loss"].total, gradient_norm))
    return gradient_norm


def only_numbers(row: dict[str, float]) -> dict[str, float]:
    """The row without what is not finite, which JSON cannot hold."""
    return {name: value for name, value in row.items() if math.isfinite(value)}


def stop_if_diverged(in_a_row: int, limit: int, what: str) -> None:
    """Raise TrainingDivergedError where more than `limit` of `what` in a row came to nothing."""
    if in_a_row > limit:
        raise TrainingDivergedError(
            f"the loss or the gradient was not a number in {in_a_row} {what} in a row, more than the {limit} that are "
            "allowed; a lower learning rate may help"
        )


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This worker's part of what is trained, and of the optimizer's state."""
    weights = {f"weights.{name}": own_part(value) for name, value in _trained(module)}
    return weights | optimizer_tensors(optimizer, "optimizer")


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _restore(module: nn.Module, guard: GuardedOptimizer, worker: Worker) -> int:
    """Load the job's last checkpoint, if there is one. Returns the steps already done."""
    checkpoint = worker.restore()
    worker.forget_rows_after(checkpoint.step if checkpoint else 0)
    if checkpoint is None:
        return 0
    with torch.no_grad():
        for name, parameter in _trained(module):
            own_part(parameter).copy_(checkpoint.tensors[f"weights.{name}"])
    load_optimizer_tensors(guard.optimizer, checkpoint.tensors, "optimizer")
    guard.restore(checkpoint.state)
    return checkpoint.step
