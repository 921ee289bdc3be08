"""Tree attention on CUDA: one FlexAttention call for a whole row, and what that kernel needs from the card.

Which blocks of 128 x 128 tokens hold a pair that attends, and which hold nothing else, follows from where prompts and
responses begin: it is counted on the host, segment by segment, instead of asking the mask about every pair of tokens on
the device. Inside a block that is only partly visible the kernel asks the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from prefarena.modeling.transfer import moved

#: Rows are padded to a multiple of FlexAttention's block.
BLOCK = 128
#: Graphs that one process may need: the kinds of numbers, head counts, and whether there is a backward pass.
_MOST_VARIANTS = 64

Ints = NDArray[np.int64]


def mask_arrays(tree_of: Ints, branch_of: Ints, lengths: list[list[int]]) -> list[NDArray[np.int32]]:
    """Arrays that `mask_of` needs for a row of a multiple of BLOCK tokens, on the host.

    tree_of, branch_of: [N] the tree of each token, -1 in padding, and 0 in its prompt, j in its j-th response. lengths:
    of each tree's prompt and responses, in the row's order. Padding attends to itself.
    """
    counts = visible_pairs(lengths, len(tree_of))
    partial, full = (counts > 0) & (counts < BLOCK * BLOCK), counts == BLOCK * BLOCK
    listed = [array for blocks in (partial, full, partial.T, full.T) for array in _listed(blocks)]
    return [tree_of.astype(np.int32), branch_of.astype(np.int32), *listed]


def mask_of(arrays: Sequence[Tensor]) -> BlockMask:
    """The mask of a row, from its `mask_arrays` on the row's device."""
    tree_of, branch_of, *listed = arrays
    (a, b, c, d, e, f, g, h) = (tensor[None, None] for tensor in listed)
    size = len(tree_of)
    return BlockMask((size, size), a, b, c, d, e, f, g, h, (BLOCK, BLOCK), visible_to(tree_of, branch_of))


def visible_pairs(lengths: list[list[int]], num_tokens: int) -> Ints:
    """How many of the pairs (query, key) of two blocks attend, [blocks of queries, blocks of keys]."""
    sizes = np.array([size for segments in lengths for size in segments], np.int64)
    prompt_of = np.concatenate([np.full(len(own), at) for own, at in zip(lengths, _firsts(lengths), strict=True)])
    is_response = np.arange(len(sizes)) != prompt_of
    stops = np.cumsum(sizes)
    edges = np.arange(0, num_tokens + 1, BLOCK)
    # Tokens of each segment in each block, [segments, blocks].
    inside = np.minimum(stops[:, None], edges[None, 1:]) - np.maximum((stops - sizes)[:, None], edges[None, :-1])
    inside = np.maximum(inside, 0)
    own = np.tril(inside.T @ inside, -1) + np.diag((inside * (inside + 1) // 2).sum(0))  # causal, in its own segment
    behind_prompts = inside[is_response].T @ inside[prompt_of[is_response]]
    padding = np.maximum(edges[1:] - np.maximum(edges[:-1], stops[-1]), 0)  # each of these tokens sees itself
    counts: Ints = own + behind_prompts + np.diag(padding)
    return counts


def _firsts(lengths: list[list[int]]) -> Ints:
    """The number of each tree's prompt among all segments."""
    return np.cumsum([0, *(len(segments) for segments in lengths[:-1])])


def _listed(blocks: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many blocks of each row are set, [rows], and which, those first, [rows, columns]."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    return blocks.sum(1).astype(np.int32), order.astype(np.int32)


def visible_to(tree_of: Tensor, branch_of: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query attends to a key: an earlier token of its tree, in its prompt or in the same response."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_tree = tree_of[query] == tree_of[key]
        on_path = (branch_of[key] == 0) | (branch_of[key] == branch_of[query])
        return (query == key) | (same_tree & on_path & (key < query) & (tree_of[query] >= 0))

    return visible


def kernel_options(query: Tensor) -> dict[str, Any]:
    """The kernel's options for these queries on their card."""
    return options_for(query.dtype, query.shape[-1], *_card(query.device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _card(device: torch.device) -> tuple[tuple[int, int], int]:
    """The card's compute capability, and the bytes of shared memory that a block may ask for."""
    card: Any = torch.cuda.get_device_properties(device)  # its type does not know all that it has
    return (card.major, card.minor), card.shared_memory_per_block_optin


def options_for(kind: torch.dtype, head_dim: int, capability: tuple[int, int], shared_memory: int) -> dict[str, Any]:
    """The kernel's options on a card of this compute capability, `shared_memory` bytes of which a block may ask for.

    It may rely on rows being whole blocks. It may not rely on `ROWS_GUARANTEED_SAFE`, although every token attends to
    itself: the kernel then takes it that a token sees something in the first tile of keys that it looks at, and gives
    NaN to the second tree of a block, which sees nothing of the first. Tiles are torch's own where they fit and a
    thread's registers hold them; eight warps a block share them out further. What comes of it is compiled for several
    cards by benchmarks/attention_kernels.py.
    """
    options: dict[str, Any] = {"IS_DIVISIBLE": True}
    options |= {"fwd_num_warps": 8, "bwd_num_warps": 8}
    if kind == torch.float32:
        rows, columns = (64, 32) if head_dim <= 128 else (32, 16)
        options |= {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": columns, "fwd_num_stages": 2}
    elif head_dim > 128 and capability < (9, 0):
        options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2}
        options |= {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32}
        options |= {"bwd_num_stages": 1}
    return options


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float | None) -> Tensor:
    """query [1, H, N, d], key and value [1, H_kv, N, d] to [1, H, N, d]."""
    on_gpu = _on_gpu(query)
    call = _compiled() if on_gpu and not torch.compiler.is_compiling() else flex_attention
    options = kernel_options(query) if on_gpu else None
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = call(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped, kernel_options=options)
    return out


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@cache
def why_not(
    device: torch.device,
    kind: torch.dtype,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    rounding: str = "highest",
) -> str | None:
    """Say why this card, or its machine, cannot run the kernel forward and backward; None where it can.

    rounding: what `torch.get_float32_matmul_precision` gives now; another one makes another kernel.

    It is tried, on a short row: what a card lacks (shared memory for this head size and kind of numbers), or a machine
    (a C compiler, Python's headers, a driver that is new enough), shows only when the kernel is compiled and run. The
    row has padding behind a tree, which sees as little of it as a second tree would.
    """
    lengths, size = [[3, 5, 4]], BLOCK
    tree = np.repeat([0, -1], [12, size - 12])
    branch = np.repeat([0, 1, 2, 0], [3, 5, 4, size - 12])
    heads = (num_heads, num_key_value_heads, num_key_value_heads)
    query, key, value = (
        torch.zeros(1, count, size, head_dim, dtype=kind, device=device, requires_grad=True) for count in heads
    )
    try:
        blocks = mask_of(moved(mask_arrays(tree, branch, lengths), device))
        out = attend(query, key, value, blocks, None)
        out.sum().backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # whatever goes wrong in compiling arrives as one
        return str(error).strip().splitlines()[0]
    finite = [bool(each.isfinite().all()) for each in (out, query.grad, key.grad, value.grad) if each is not None]
    return None if all(finite) else "its kernel gives values that are not finite numbers"


@cache
def _compiled() -> Any:
    """Compile FlexAttention where its layer is not compiled: only then is it fast and sparing of memory."""
    return compiled_whole(flex_attention)


def compiled_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the function as one graph, for rows of any length.

    What cannot be compiled whole is an error: by default, beyond eight variants, torch goes on without compiling, and
    the scores of all pairs of tokens are then held in memory.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    return torch.compile(function, dynamic=True, fullgraph=True)
