"""The one training loop of everything that learns from a fixed table: SFT, MPO, DPO, KTO, the reward model.

An optimizer step is a sum of terms (see terms.py), each cut into micro-batches. The step's counts are known from
the batch plan, and what a loss needs of the whole step is found before its first gradient (`Term.begin`), so gradient
accumulation and the number of workers change nothing but the order of additions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from prefarena.config import Optimisation
from prefarena.objectives.output import Mean, ObjectiveOutput
from prefarena.training.guard import stop_if_diverged
from prefarena.training.learner import Learner, Pass, prepare
from prefarena.training.prediction import predict_memory
from prefarena.training.saving import snapshot_steps
from prefarena.training.schedule import warmed_up
from prefarena.training.tally import Tally
from prefarena.training.terms import Rows, Term
from prefarena.training.window import Window
from prefarena.training.worker import Worker


def train(
    module: nn.Module,
    terms: list[Term],
    training: Optimisation,
    worker: Worker,
    keep: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Run all steps from the last checkpoint on. Returns the numbers of steps, tokens trained and
    FLOPs, and predicted memory.

    `module` holds the parameters in float32; those that require a gradient are trained (see `Learner`). A step whose
    loss or gradient is not a number is skipped; raises TrainingDivergedError when a metric row is due and more than
    `training.max_bad_steps` in a row were. keep: called with the steps done where a snapshot is due.
    """
    prepare(module, training, worker)
    predicted = predict_memory(module, terms, training, worker)
    learner, tally = Learner("model", module, training, worker), Tally([module], training, worker)
    num_steps = training.num_steps or terms[0].plan.num_steps(training.num_epochs)
    snapshots = snapshot_steps(num_steps, training.num_snapshots)
    done = _restore(learner, worker)
    window, started, first = Window(), time.perf_counter(), done
    for step in range(done, num_steps):
        rate = warmed_up(training.learning_rate, training.schedule, step, num_steps, training.warmup_steps)
        gradient_norm = optimizer_step(learner, terms, step, rate, worker, window)
        done = step + 1
        if done % training.log_every == 0 or done in (1, num_steps):
            row = {"step": done, "num_steps": num_steps, "learning_rate": rate, "grad_norm": float(gradient_norm)}
            row |= window.reduce(worker) | {"steps_skipped": learner.guard.num_skipped}
            row["steps_per_second"] = (done - first) / (time.perf_counter() - started)
            worker.log(row)
            stop_if_diverged(learner.guard.longest_streak(), training.max_bad_steps, f"steps up to step {done}")
        if keep is not None and done in snapshots:
            keep(done)
        if done % training.checkpoint_every == 0 and done < num_steps:
            worker.save(done, learner.tensors(), learner.guard.state())
    return {
        **({"predicted_memory_mib": predicted} if predicted is not None else {}),
        "num_steps": num_steps,
        "micro_batch_tokens": terms[0].plan.micro_batch_tokens,
        "num_flops": tally.take(),
        "num_tokens_trained": sum(term.num_tokens(step) for term in terms for step in range(first, num_steps)),
    }


def optimizer_step(
    learner: Learner, terms: list[Term], step: int, learning_rate: float, worker: Worker, window: Window
) -> Tensor:
    """One update. Adds to `window` and returns the gradient's norm before clipping, []."""
    for term in terms:
        term.begin(step, learner, worker)
    work = [
        (term, Pass(partial(_forward, term=term, rows=rows, device=worker.device), term.weight / term.count(step)))
        for term in terms
        for rows in term.plan.micro_batches(step, worker.rank)
    ]
    one = torch.ones((), device=worker.device) / worker.world_size / len(work)
    outputs = learner.accumulate([micro for _, micro in work])
    for (term, micro), output in zip(work, outputs, strict=True):
        window.add("loss", Mean(output.loss.total * micro.scale, one))
        window.add(f"loss/{term.name}", output.loss)
        for name, mean in output.metrics.items():
            window.add(name, mean)
    gradient_norm, skipped = learner.apply(learning_rate)
    window.close(skipped)
    return gradient_norm


def _forward(module: nn.Module, *, term: Term, rows: Rows, device: torch.device) -> ObjectiveOutput:
    return term(module, rows, device)


def _restore(learner: Learner, worker: Worker) -> int:
    """Load the job's last checkpoint, if there is one. Returns the steps already done."""
    checkpoint = worker.restore()
    worker.stage_log.forget_rows_after(checkpoint.step if checkpoint else 0)
    if checkpoint is None:
        return 0
    learner.restore(checkpoint.tensors)
    learner.guard.restore(checkpoint.state)
    return checkpoint.step
