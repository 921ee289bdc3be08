"""Compares tree attention on a device, forward and backward, with the same on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prefarena.modeling.packing import pack
from prefarena.modeling.tree_attention import tree_attention

#: Largest difference from the CPU's values, relative to the largest of them.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}  # float32 products may be rounded to TF32


@dataclass(frozen=True)
class Heads:
    """A model's attention heads, which decide what is compiled: how wide they are, and how many of each kind."""

    size: int
    queries: int
    keys: int


def attention_heads(settings: PretrainedConfig) -> Heads | None:
    """The attention heads of a model, from its configuration; None if it has none."""
    text = settings.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    if queries is None:
        return None
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return Heads(size, queries, getattr(text, "num_key_value_heads", None) or queries)


def difference(
    heads: Heads, dtype: torch.dtype, device: str, *, exact: bool = False, in_blocks: bool | None = None
) -> float:
    """The largest relative difference between attention on `device` and on the CPU, gradients included.

    exact: the CPU computes in float64, with the same inputs. in_blocks: as `pack` has it, on `device`; FlexAttention
    has no backward pass on CPUs.
    """
    backward = not (in_blocks and device == "cpu")
    ours = attend(heads, dtype, device, in_blocks=in_blocks, backward=backward)
    theirs = attend(heads, dtype, "cpu", computed_in=torch.float64 if exact else None, backward=backward)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True))


def attend(
    heads: Heads,
    dtype: torch.dtype,
    device: str,
    *,
    computed_in: torch.dtype | None = None,
    in_blocks: bool | None = None,
    backward: bool = True,
) -> list[Tensor]:
    """Attention in a packed row, as training computes it: its output and the gradients of its inputs, on the CPU.

    The row holds a tree of two responses that is longer than a block of FlexAttention, and a short one. Inputs are
    numbers of `dtype`. backward: without it the output alone.
    """
    batch = pack([[1] * 100, [1] * 3], [[[1] * 60, [1] * 40], [[1] * 5]], device=device, in_blocks=in_blocks)
    size, length = 208, batch.input_ids.shape[1]  # rows of blocks are padded
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for count in (heads.queries, heads.keys, heads.keys):
        values = torch.zeros(1, count, length, heads.size)
        values[:, :, :size] = torch.randn(1, count, size, heads.size, generator=generator)
        inputs.append(values.to(dtype).to(device, computed_in or dtype).requires_grad_(backward))
    query, key, value = inputs
    out, _ = tree_attention(torch.nn.Identity(), query, key, value, None, scaling=heads.size**-0.5, trees=batch.trees)
    wide = torch.promote_types(out.dtype, torch.float32)
    if backward:
        out[:, :size].to(wide).square().sum().backward()
    gradients = [values.grad[:, :, :size] for values in inputs if values.grad is not None]
    return [values.detach().to("cpu", wide) for values in (out[:, :size], *gradients)]
