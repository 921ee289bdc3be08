"""What a job will take of a worker's memory, said before its first step."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prefarena.config import Optimisation
from prefarena.modeling.memory import size_of, training_memory
from prefarena.stages import write_json
from prefarena.training.process_memory import kept_share
from prefarena.training.terms import Term
from prefarena.training.worker import Worker

#: In the job's folder; what the terminal shows is read from it.
FILE = "memory.json"


def predict_memory(module: nn.Module, terms: list[Term], training: Optimisation, worker: Worker) -> float | None:
    """MiB of this worker at its peak; rank 0 writes them to the job's folder.

    On a CPU with what the process holds beside the model, and what its allocator keeps of what is freed; on a GPU what
    will be allocated there. `module` is not wrapped yet, and on the CPU. None where it cannot be told before the model
    runs.
    """
    largest = [(term, term.plan.largest_micro_batch()) for term in terms]
    share = training.batch_size // worker.world_size
    need = training_memory(
        module,
        [partial(_loss, term, rows) for term, rows in largest],
        bfloat16=training.precision == "bfloat16",
        accumulates=len(terms) > 1 or any(len(rows) < share for _, rows in largest),
        num_shards=worker.world_size if worker.sharding == "fsdp" else 1,
    )
    if need is None:
        return None
    beside, kept = worker.memory_in_use_mib(), 0.0
    if worker.device.type == "cpu":
        beside -= size_of([*module.parameters(), *module.buffers()]) / 2**20
        kept = kept_share(at_once=training.activation_checkpointing) * need.total / 2**20
    parts = {name: getattr(need, name) / 2**20 for name in ("weights", "gradients", "optimizer", "activations")}
    parts |= {"process": beside, "allocator": kept}
    predicted = sum(parts.values())
    if worker.rank == 0:
        rounded = {f"{name}_mib": round(mib, 1) for name, mib in {**parts, "predicted": predicted}.items()}
        write_json(worker.stage_dir / FILE, rounded)
    return predicted


def _loss(term: Term, rows: NDArray[np.int64], module: nn.Module) -> Tensor:
    return term(module, rows, next(module.parameters()).device).loss.total
