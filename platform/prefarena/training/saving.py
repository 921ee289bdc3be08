"""Trained models that are spread over workers, or have adapters, as the plain transformers folders that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefarena.modeling.layers import take_off_wrappers
from prefarena.modeling.load import save_policy
from prefarena.modeling.lora import merge_adapters, merged_weights, save_adapter
from prefarena.modeling.parts import whole
from prefarena.modeling.saving import layout_of, save_by_tensors
from prefarena.stage_files import ADAPTER
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


def save_trained(
    model: PreTrainedModel,
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
    plain: Callable[[], PreTrainedModel],
    *,
    has_adapters: bool,
) -> PreTrainedModel | None:
    """What a job has trained, adapters merged and kept beside it; every worker calls this.

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
