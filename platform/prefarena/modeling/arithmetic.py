"""The arithmetics in which a model computes log-probs, one name for each.

float32: weights and products. tf32: the same, but a GPU rounds what goes into a product of matrices to TF32's 10 bits
of mantissa and adds up in float32; everything else stays. bfloat16: weights and everything between layers, as
`precision: bfloat16` trains, whether the copies of the weights are made here (`halves.py`) or by FSDP. The same weights
give log-probs that differ between arithmetics by up to tenths of a nat per response: a log-ratio of two policies means
something only where both were computed in the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from prefarena.modeling.layers import decoder_layers, is_linear

Arithmetic = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def products_of(arithmetic: Arithmetic) -> Iterator[None]:
    """A context in which float32 products, also of backward passes, are rounded to TF32 if the arithmetic says so.

    torch keeps this once for the whole process, so whoever computes in an arithmetic says which one, and whoever runs
    inside (a judge within a training, say) says its own. What was set before is set again afterwards.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_weights(model: PreTrainedModel, arithmetic: Arithmetic) -> PreTrainedModel:
    """Return the model, with its parameters in bfloat16 if the arithmetic says so. Buffers stay as they are.

    Training halves parameters alone: the frequencies of rotary embeddings keep their float32.
    """
    if arithmetic == "bfloat16":
        halve(model)
    return model


def halve(module: nn.Module) -> None:
    """Hold all parameters in bfloat16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def body_in_weights(model: PreTrainedModel, arithmetic: Arithmetic) -> PreTrainedModel:
    """Treat the body of a model with a scalar head as `in_weights` does.

    The head stays in float32, and so does what it takes: eight bits of a score would make ties of near responses.
    """
    if arithmetic == "bfloat16" and model.base_model is not model:
        halve(model.base_model)
        for part in model.children():
            if part is not model.base_model:
                part.register_forward_pre_hook(_widened)
    return model


def halve_products(module: nn.Module) -> None:
    """Hold the frozen weights of products within decoder layers in bfloat16, where the module computes in halves.

    What it computes stays, bit for bit: the copies that are made of float32 weights are these very numbers.
    Embedding, norms and head stay in float32, and so do adapters. What stays is copied out of the file that it may have
    been read from: as long as any tensor lies in a mapped file, all pages of the file count as the process's memory.
    """
    for layer in decoder_layers(module):
        for name, part in layer.named_modules():
            own = list(part.parameters(recurse=False))
            if is_linear(part) and "lora_" not in name and not any(one.requires_grad for one in own):
                for parameter in own:
                    parameter.data = parameter.data.to(torch.bfloat16)
    for parameter in module.parameters():
        if parameter.dtype != torch.bfloat16 and not parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _widened(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)


def named(arithmetic: Arithmetic) -> list[str]:
    """The part of an address that names it: nothing for float32, so that a CPU's default results have plain ones."""
    return [] if arithmetic == "float32" else [arithmetic]


def attends_in(precision: Arithmetic) -> torch.dtype:
    """The kind of numbers in which a training of that precision attends."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
