"""Attention in a row of trees: each tree is a prompt and the responses that follow it, which do not see each other.

`transformers` models call the function registered here as the attention implementation "trees" once a layer, with the
row's `Trees` as a keyword. On CPU it works tree by tree, so that no attention is computed in vain: short trees of
similar length as one padded batch with a mask, a long one response by response. On CUDA it is one FlexAttention call
whose block mask says the same (`flex_trees.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefarena.modeling import flex_trees

NAME = "trees"
#: Trees of at most so many tokens are attended to as one padded batch: their padding costs less than a call each.
_SHORT = 64

Ints = NDArray[np.int64]
Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """Consecutive short trees of a row. index: [b * L] their tokens, in the row's part; kept: [n] where in [b * L] each
    of the part's n tokens stands; mask: [b, 1, L, L] bool.
    """

    size: int
    index: Tensor
    kept: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Tree:
    """One long tree. responses: tokens of each; masks: of each response after the first, [r, prompt + r] bool."""

    size: int
    prompt: int
    responses: tuple[int, ...]
    masks: tuple[Tensor, ...]


@dataclass(frozen=True)
class Trees:
    """Which tokens may attend to which in a row: its consecutive parts on CPU, one block mask on CUDA."""

    parts: tuple[Batch | Tree, ...]
    blocks: BlockMask | None = None


def plan_trees(branch_of: Ints, lengths: list[list[int]]) -> Trees:
    """The layout of a row on CPU. branch_of: [N] 0 for tokens of a prompt, j for those of its tree's j-th response.

    lengths: of each tree's prompt and responses. Trees stand in the row in their order.
    """
    sizes = [sum(segments) for segments in lengths]
    parts: list[Batch | Tree] = []
    first = start = 0
    while first < len(sizes):
        stop = first
        while stop < len(sizes) and sizes[stop] <= _SHORT:
            stop += 1
        if stop > first:
            parts.append(_batch(sizes[first:stop], branch_of[start : start + sum(sizes[first:stop])]))
        else:
            stop = first + 1
            parts.append(_tree(lengths[first]))
        start += parts[-1].size
        first = stop
    return Trees(tuple(parts))


def _batch(sizes: list[int], branch_of: Ints) -> Batch:
    longest, count = max(sizes), len(sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    offset = np.arange(longest)[None, :]
    present = offset < np.array(sizes)[:, None]
    index = np.where(present, starts[:, None] + offset, 0)
    branch = torch.from_numpy(np.where(present, branch_of[index], -1))
    key, query = branch[:, None, :], branch[:, :, None]
    mask = ((key == 0) | (key == query)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask |= torch.eye(longest, dtype=torch.bool)  # padding attends to itself: no softmax over nothing
    return Batch(
        sum(sizes),
        torch.from_numpy(index.reshape(-1)),
        torch.from_numpy(np.flatnonzero(present.reshape(-1))),
        mask.view(count, 1, longest, longest),
    )


def _tree(segments: list[int]) -> Tree:
    prompt, *responses = segments
    masks = [
        torch.cat([torch.ones(size, prompt, dtype=torch.bool), torch.ones(size, size, dtype=torch.bool).tril()], 1)
        for size in responses[1:]
    ]
    return Tree(sum(segments), prompt, tuple(responses), tuple(masks))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trees: Trees | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [1, H, N, d], key and value [1, H_kv, N, d] to [1, N, H, d].

    Without `trees` it is transformers' own SDPA, with its masks, so that the model works as ever.
    """
    if trees is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if trees.blocks is not None:
        return flex_trees.attend(query, key, value, trees.blocks, scaling).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    sizes = [part.size for part in trees.parts]
    owns = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    attended = [
        _attend_batch(part, own, scaling) if isinstance(part, Batch) else _attend_tree(part, own, scaling)
        for part, own in zip(trees.parts, owns, strict=True)
    ]
    return torch.cat(attended, 1), None


def _attend_batch(part: Batch, own: Heads, scaling: float | None) -> Tensor:
    """Attend within a part: query, key and value, [1, H, n, d] each, to [1, n, H, d]."""
    count, longest = part.mask.shape[0], part.mask.shape[-1]
    query, key, value = (
        tensor[0].index_select(1, part.index).unflatten(1, (count, longest)).transpose(0, 1) for tensor in own
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=part.mask, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, part.kept)[None]


def _attend_tree(part: Tree, own: Heads, scaling: float | None) -> Tensor:
    """Attend within a tree: the prompt with the first response, then each other response after the prompt."""
    sizes = [part.prompt + sum(part.responses[:1]), *part.responses[1:]]
    queries, keys, values = (tensor.split(sizes, 2) for tensor in own)
    outs = [F.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True, scale=scaling)]
    prompt_key, prompt_value = keys[0][:, :, : part.prompt], values[0][:, :, : part.prompt]
    for branch, mask in enumerate(part.masks, start=1):
        key, value = torch.cat([prompt_key, keys[branch]], 2), torch.cat([prompt_value, values[branch]], 2)
        outs.append(F.scaled_dot_product_attention(queries[branch], key, value, attn_mask=mask, scale=scaling))
    return torch.cat(outs, 2).transpose(1, 2)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
