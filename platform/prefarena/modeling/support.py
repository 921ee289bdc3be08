"""Which models can be packed, and which have a plain head: found out by what they compute, not by their names.

A model that has shapes in place of weights (memory.py) computes nothing: it is taken to be what most models are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefarena.modeling import flex_trees, tree_attention
from prefarena.modeling.arithmetic import products_of
from prefarena.modeling.attention_trial import attention_heads
from prefarena.modeling.packing import PackedBatch, pack

#: Largest difference, relative to the largest value, that rounding alone makes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2


def why_not_packed(
    model: PreTrainedModel,
    max_length: int | None = None,
    device: torch.device | None = None,
    attends_in: torch.dtype | None = None,
) -> str | None:
    """Say why prompts cannot be shared between responses and rows cannot be packed; None where they can.

    Sets the attention implementation that packing needs, where it is exact. max_length: most tokens of a prompt and its
    response; where it is not known, a model whose attention reaches only so far back cannot be packed. device,
    attends_in: where the model will run, and in which kind of numbers it attends there; by default as it is.
    """
    return (
        _windowed(model, max_length)
        or _kernel_missing(model, device or model.device, attends_in or model.dtype)
        or _packing_differs(model)
    )


def body_keywords(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments of a model's forward for this batch.

    In padded rows attention is causal and padding is on the right, so no attention mask is needed: no token of a
    sequence sees it, and positions are what they are without it.
    """
    if batch.trees is None:
        return {"input_ids": batch.input_ids, "use_cache": False}
    # A mask of four dimensions is taken as it is; the attention function goes by `trees` alone.
    unused = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device)
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": unused,
        "use_cache": False,
        "trees": batch.trees,
    }


def body_output(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The last hidden states [rows * T, D] of the model without its head."""
    hidden: Tensor = model.base_model(**body_keywords(batch)).last_hidden_state
    return hidden.flatten(0, 1)


@torch.no_grad()
@products_of("float32")  # TF32 rounds by more than what is tolerated here
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are one linear map of the body's last hidden states."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    if head.weight.is_meta:
        return True
    ids = torch.tensor([_numbers(model.config.get_text_config().vocab_size, 8)], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    ours = torch.nn.functional.linear(hidden, head.weight, head.bias)
    return ours.shape == logits.shape and _close(ours, logits)


def _windowed(model: PreTrainedModel, max_length: int | None) -> str | None:
    """Say why attention of limited reach cannot be packed; None where it reaches far enough or is unlimited."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        window = None
    chunk = getattr(config, "attention_chunk_size", None) if "chunked_attention" in kinds else None
    local = getattr(config, "window_size", None) if "local" in str(getattr(config, "attention_types", "")) else None
    reaches = [size for size in (window, chunk, local) if size is not None]
    narrow = [size for size in reaches if max_length is None or size < max_length]
    return f"its attention reaches {min(narrow)} tokens back" if narrow else None


def _kernel_missing(model: PreTrainedModel, device: torch.device, attends_in: torch.dtype) -> str | None:
    """Say why a GPU cannot attend in trees; None where it can. On a CPU no kernel has to be compiled."""
    if device.type != "cuda":
        return None
    heads = attention_heads(model.config)
    if heads is None:
        return None
    rounding = torch.get_float32_matmul_precision()
    reason = flex_trees.why_not(device, attends_in, heads.queries, heads.keys, heads.size, rounding)
    return f"its attention kernel cannot be made for {device} ({reason})" if reason else None


@torch.no_grad()
@products_of("float32")
def _packing_differs(model: PreTrainedModel) -> str | None:
    """Say why packing is not exact; None where it is."""
    if getattr(model, "_is_stateful", False):
        return "it is recurrent: a response's tokens change the state for those after them"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    before = model.config._attn_implementation
    model.set_attn_implementation(tree_attention.NAME)
    if next(model.parameters()).is_meta:
        return None
    # Both ways of attending on CPU: two short trees, and a long one; no position above 4, which every model has.
    vocabulary = model.config.get_text_config().vocab_size
    sizes = [(3, [2, 1]), (2, [3, 1]), (2, [3] * 22)]
    ids = iter(_numbers(vocabulary, sum(prompt + sum(answers) for prompt, answers in sizes)))
    prompts = [[next(ids) for _ in range(prompt)] for prompt, _ in sizes]
    responses = [[[next(ids) for _ in range(size)] for size in answers] for _, answers in sizes]
    try:
        packed, padded = (
            (body_output(model, batch)[batch.sources], body_output(model, batch)[batch.last])
            for batch in (pack(prompts, responses, shared=shared, device=model.device) for shared in (True, False))
        )
        same = all(_close(ours, theirs) for ours, theirs in zip(packed, padded, strict=True))
    except TypeError as error:  # a forward that does not take position ids or hand keywords on
        same, reason = False, f"its forward pass does not take them ({error})"
    else:
        reason = "it gives different values when they are, because it has its own kind of attention"
    if same:
        return None
    model.set_attn_implementation(before)
    return reason


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = _TOLERANCE.get(ours.dtype, _HALF_TOLERANCE)
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _numbers(vocabulary: int, count: int) -> list[int]:
    """Different tokens where there are enough of them; always the same ones."""
    return [(7 + 5 * i * i) % vocabulary for i in range(1, count + 1)]
