"""Trained models that are spread over workers, or have adapters, as the plain transformers folders that are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefarena.modeling.layers import take_off_wrappers
from prefarena.modeling.load import save_policy
from prefarena.modeling.lora import merge_adapters, merged_weights, save_adapter
from prefarena.modeling.parts import whole
from prefarena.modeling.saving import layout_of, save_by_tensors
from prefarena.stage_files import ADAPTER, SNAPSHOTS
from prefarena.training.jobs import Job
from prefarena.training.sharding import kept_on_rank_0
from prefarena.training.worker import Worker


def save_spread(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    worker: Worker,
    plain: Callable[[], PreTrainedModel],
) -> None:
    """Weights that every worker makes whole, one by one, as a folder that rank 0 writes; every worker calls this.

    plain: makes a whole model of the same shape, in which weights are collected where the files need several at once.
    """
    layout = layout_of(model)
    if layout is not None:
        save_by_tensors(model, layout, weights, tokenizer, folder, writes=worker.rank == 0)
        return
    gathered = kept_on_rank_0(weights, worker.rank)
    if worker.rank == 0:
        collected = plain()
        collected.load_state_dict(gathered)
        save_policy(collected, tokenizer, folder)


def snapshot_steps(num_steps: int, num_snapshots: int) -> list[int]:
    """The numbers of updates after which a snapshot is kept: `num_snapshots` of them, evenly between start and end."""
    marks = {round(k * num_steps / (num_snapshots + 1)) for k in range(1, num_snapshots + 1)}
    return sorted(marks - {0, num_steps})


def keep_snapshot(stage_dir: str | Path, step: int, worker: Worker, save: Callable[[Path], None]) -> None:
    """Keep a policy in `snapshots/<updates done>`; `save` writes the folder, and every worker calls this."""
    folder = Path(stage_dir) / SNAPSHOTS / f"{step:05d}"
    partial_folder = folder.with_name(f".{folder.name}-{os.getpid()}")
    save(partial_folder)
    if worker.rank:
        return
    if folder.exists():  # of an attempt that was interrupted after it
        shutil.rmtree(folder)
    os.replace(partial_folder, folder)


def save_as_it_is(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
    plain: Callable[[], PreTrainedModel],
    base: str,
    folder: Path,
    *,
    has_adapters: bool,
) -> None:
    """Save a policy during its training, by rank 0; the model is not changed.

    With adapters these alone are saved, as those of the model at `base`, into which `load_policy` merges them: whole
    models, one for each snapshot, would take many times as much disk. Every worker calls this. plain: as in
    `save_spread`.
    """
    if has_adapters:
        save_adapter(model, base, folder, writes=worker.rank == 0)
    elif worker.shards:
        weights = ((name, whole(tensor)) for name, tensor in model.state_dict().items())
        save_spread(model, weights, tokenizer, folder, worker, plain)
    elif worker.rank == 0:
        save_policy(model, tokenizer, folder)


def save_trained(
    model: PreTrainedModel,
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
    plain: Callable[[], PreTrainedModel],
    *,
    has_adapters: bool,
) -> PreTrainedModel | None:
    """Save what a job has trained, with adapters merged, and the adapters next to it; every worker calls this.

    Returns the plain model where every worker has it whole. plain: as in `save_spread`.
    """
    folder = Path(job.stage_dir) / ADAPTER
    if worker.shards:
        if has_adapters:
            save_adapter(model, job.policy, folder, writes=worker.rank == 0)
            weights = merged_weights(model)
        else:
            weights = ((name, whole(tensor)) for name, tensor in model.state_dict().items())
        save_spread(model, weights, tokenizer, job.model_dir, worker, plain)
        return None
    take_off_wrappers(model)  # training's precision and recomputation are its own
    if has_adapters:
        if worker.rank == 0:
            save_adapter(model, job.policy, folder)
        merge_adapters(model)
    if worker.rank == 0:
        save_policy(model, tokenizer, job.model_dir)
    return model
