"""Prediction of how much of a worker's memory a job will take, made before its first step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prefarena.config import Optimisation
from prefarena.data.plan import LARGEST_PASS
from prefarena.modeling.memory import MemoryNeed, size_of, training_memory, with_models
from prefarena.modeling.room import SMALLEST_PASS
from prefarena.stage_files import MEMORY
from prefarena.stages import write_json
from prefarena.training.process_memory import kept_share
from prefarena.training.terms import Term
from prefarena.training.worker import Worker

#: Stands for what a process holds beside the model, so that the choice does not depend on what it did before.
_PROCESS_MIB = 800.0


def predict_memory(module: nn.Module, terms: list[Term], training: Optimisation, worker: Worker) -> float | None:
    """MiB of this worker at its peak; rank 0 writes them to the job's folder.

    Where `training.micro_batch_tokens` is auto, the plans of `terms` are cut to the largest passes that are predicted
    to fit the smallest share of memory among the workers. On a CPU the prediction has what the process holds beside the
    model, and what its allocator keeps of what is freed; on a GPU it is what will be allocated there. `module` is not
    wrapped yet, and on the CPU. None, and the smallest passes, where it cannot be told before the model runs.
    """
    if training.micro_batch_tokens != "auto":
        return write_prediction(_parts(module, terms, training, worker), {}, worker)
    room = min(worker.gathered(worker.memory_share_mib()))
    tokens, parts = LARGEST_PASS, None
    while True:
        for term in terms:
            term.plan = replace(term.plan, micro_batch_tokens=tokens)
        parts = _parts(module, terms, training, worker)
        if all(worker.gathered(fits(parts, room))) or tokens <= SMALLEST_PASS:
            break
        tokens //= 2
    return write_prediction(parts, {"share_mib": room, "micro_batch_tokens": tokens}, worker)


def fits(parts: dict[str, float] | None, room: float) -> bool:
    """Whether the prediction fits into `room` MiB, whatever else the process holds besides the model at the moment."""
    return parts is not None and sum(parts.values()) - parts["process"] + _PROCESS_MIB <= room


def required_mib(need: MemoryNeed, *, on_cpu: bool, spares: bool) -> float:
    """The MiB that `fits` compares with a worker's share, for a job whose models do not exist yet."""
    return (need.total + (_kept(need, spares) if on_cpu else 0)) / 2**20 + _PROCESS_MIB


def _kept(need: MemoryNeed, spares: bool) -> float:
    """Bytes that the allocator of a CPU keeps of what is freed. Weights and moments stay; the rest comes and goes."""
    return kept_share(at_once=spares) * (need.gradients + need.activations)


def write_prediction(parts: dict[str, float] | None, chosen: dict[str, float], worker: Worker) -> float | None:
    """Write the parts, with what was `chosen` because of them, and return their sum."""
    sizes = {} if parts is None else {**parts, "predicted": sum(parts.values())}
    if worker.rank == 0 and (sizes or chosen):
        rounded = {f"{name}_mib": round(mib, 1) for name, mib in sizes.items()}
        write_json(worker.stage_dir / MEMORY, rounded | {name: round(value) for name, value in chosen.items()})
    return sizes.get("predicted")


def _parts(module: nn.Module, terms: list[Term], training: Optimisation, worker: Worker) -> dict[str, float] | None:
    """MiB of each part of what this worker will hold."""
    largest = [(term, term.plan.largest_micro_batch()) for term in terms]
    share = training.batch_size // worker.world_size
    need = training_memory(
        module,
        [partial(_loss, term, rows) for term, rows in largest],
        bfloat16=training.precision == "bfloat16",
        accumulates=len(terms) > 1 or any(len(rows) < share for _, rows in largest),
        spread=worker.spread,
    )
    if need is None:
        return None
    need = with_models(need, module, sum(term.num_models_beside() for term in terms), worker.spread)
    return parts_of(need, [module], worker.spares(training), worker)


def parts_of(need: MemoryNeed, on_cpu: list[nn.Module], spares: bool, worker: Worker) -> dict[str, float]:
    """MiB by part: what a job needs, what the process holds beside it, and what its allocator keeps of what is freed.

    on_cpu: modules of the job that this process holds already, but for weights that are awaited. spares: freed tensors
    go back to the system at once.
    """
    beside, kept = worker.memory_in_use_mib(), 0.0
    if worker.device.type == "cpu":
        for module in on_cpu:
            there = [one for one in [*module.parameters(), *module.buffers()] if not one.is_meta]
            beside -= size_of(there) / 2**20
        kept = _kept(need, spares) / 2**20
    names = ["weights", "gradients", "optimizer", "activations"]
    names += ["host"] if worker.device.type == "cpu" and need.host else []  # which is the same memory then
    parts = {name: getattr(need, name) / 2**20 for name in names}
    return parts | {"process": beside, "allocator": kept}


def _loss(term: Term, rows: NDArray[np.int64], module: nn.Module) -> Tensor:
    return term(module, rows, next(module.parameters()).device).loss.total
