"""The arithmetics in which a model computes log-probs, one name for each.

float32: weights and products. autocast: float32 weights, products of bfloat16 copies, as `precision: bfloat16` trains
on one worker and under DDP. bfloat16: weights and everything between layers, as it trains under FSDP, which hands every
layer halved copies. The same weights give log-probs that differ between arithmetics by up to tenths of a nat a
response: a log-ratio of two policies means something only where both were computed in the same one.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

Arithmetic = Literal["float32", "autocast", "bfloat16"]


def in_weights(model: PreTrainedModel, arithmetic: Arithmetic) -> PreTrainedModel:
    """The model, its parameters in bfloat16 where that is what the arithmetic says. Buffers stay as they are.

    FSDP halves parameters alone: the frequencies of rotary embeddings keep their float32.
    """
    if arithmetic == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def attends_in(precision: Literal["float32", "bfloat16"]) -> torch.dtype:
    """The kind of numbers in which a training of that precision attends, sharded or not."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def computing(arithmetic: Arithmetic, device: torch.device) -> torch.autocast:
    """The context in which a model of `in_weights` computes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "autocast")
