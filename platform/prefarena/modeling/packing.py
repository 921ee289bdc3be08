"""Prompts with their responses, laid out for one forward pass.

Packed: all in one row, each prompt once, followed by its responses, which see it but not each other (see
`tree_attention.py`); nothing is padded. Padded: a row for each response, its prompt before it, for models that
cannot be packed. Either way `sources` and `targets` say which position scores which token, so that what comes after the
body of the model is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefarena.modeling.flex_trees import BLOCK, mask_arrays, mask_of
from prefarena.modeling.passes import Pass, passed
from prefarena.modeling.transfer import moved
from prefarena.modeling.tree_attention import Trees, plan_trees

#: Token ids: a list, or an int array [n].
Ids = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PackedBatch:
    """B prompts with R responses in all, M response tokens. Responses are in order: those of the first prompt first.

    input_ids: [rows, T]; position_ids: [1, T] in a packed row, else None. sources: [M], the position (in the flattened
    rows) whose output scores each response token; targets: [M], those tokens; response_of: [M], which response each
    belongs to; last: [R], the position of each response's last token; lengths: [R], tokens of each response; longest:
    the largest of them, on the host. passed: what one pass over the batch goes through.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    trees: Trees | None
    sources: Tensor
    targets: Tensor
    response_of: Tensor
    last: Tensor
    lengths: Tensor
    longest: int
    passed: Pass

    def sums(self, token_values: Tensor, in_rows: bool | None = None) -> Tensor:
        """Reduce [M] to [R]: the sum over each response's tokens, bit for bit the same every time.

        in_rows: whether each response's tokens get a row of their own, as they do on a GPU, where index_add adds in
        whatever order its threads come.
        """
        if token_values.is_cuda if in_rows is None else in_rows:
            return self._row_sums(token_values)
        return token_values.new_zeros(len(self.lengths)).index_add(0, self.response_of, token_values)

    def first_sums(self, token_values: Tensor, counts: Tensor) -> Tensor:
        """Reduce [M] to [R]: the sum over the first `counts` [R] tokens of each response."""
        return self.sums(torch.where(self._offsets() < counts[self.response_of], token_values, 0))

    def _row_sums(self, token_values: Tensor) -> Tensor:
        rows = token_values.new_zeros(len(self.lengths), self.longest)
        return rows.index_put((self.response_of, self._offsets()), token_values).sum(1)

    def _offsets(self) -> Tensor:
        """For each token, the number of tokens of its response before it, [M]."""
        place = torch.arange(len(self.response_of), device=self.response_of.device)
        return place - (self.lengths.cumsum(0) - self.lengths)[self.response_of]


def pack(
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    *,
    shared: bool = True,
    device: torch.device | str = "cpu",
    pad_id: int = 0,
    in_blocks: bool | None = None,
) -> PackedBatch:
    """Lay out each prompt with its responses: packed, or padded where `shared` is false. Prompts are not empty.

    in_blocks: whether a packed row is laid out for FlexAttention, as it is on a GPU.
    """
    device = torch.device(device)
    in_blocks = device.type == "cuda" if in_blocks is None else in_blocks
    lengths = [[len(prompt), *map(len, answers)] for prompt, answers in zip(prompts, responses, strict=True)]
    if not shared:
        return _padded(prompts, responses, lengths, device, pad_id)
    return _packed(prompts, responses, lengths, device, in_blocks)


def _packed(
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    lengths: list[list[int]],
    device: torch.device,
    in_blocks: bool,
) -> PackedBatch:
    segments = np.array(list(chain.from_iterable(lengths)))  # [S]: prompt, responses, next prompt, ...
    branch = np.concatenate([np.arange(len(own)) for own in lengths])  # 0: a prompt
    tree = np.repeat(np.arange(len(lengths)), [len(own) for own in lengths])
    prompt_size = segments[branch == 0][tree]  # of each segment's tree
    starts = np.cumsum(segments) - segments
    prompt_ends = (starts + segments)[branch == 0][tree]
    size = int(segments.sum())
    padding = np.zeros(-size % BLOCK if in_blocks else 0, np.int64)
    given = [ids for prompt, answers in zip(prompts, responses, strict=True) for ids in (prompt, *answers)]
    ids = np.concatenate([*(np.asarray(part, np.int64) for part in given), padding])
    positions = np.arange(size) - np.repeat(starts - np.where(branch == 0, 0, prompt_size), segments)
    is_response = branch > 0
    first, counts = starts[is_response], segments[is_response]
    tokens = _ranges(first, counts)
    sources = tokens - 1
    begins = (np.cumsum(counts) - counts)[counts > 0]
    sources[begins] = (prompt_ends[is_response] - 1)[counts > 0]
    branch_of = np.concatenate([np.repeat(branch, segments), padding])
    last = np.where(counts > 0, first + counts - 1, prompt_ends[is_response] - 1)
    arrays = {
        "input_ids": ids[None],
        "position_ids": np.concatenate([positions, padding])[None],
        "sources": sources,
        "targets": ids[tokens],
        "response_of": np.repeat(np.arange(len(counts)), counts),
        "last": last,
        "lengths": counts,
    }
    before = np.where(is_response, prompt_size, 0)  # tokens that each segment sees beside its own
    visible = segments * (segments + 1) / 2 + segments * before
    through = Pass(float(size), float(visible.sum()), float(counts.sum()))
    if not in_blocks:
        return _on(device, arrays, through, plan_trees(branch_of, lengths))
    tree_of = np.concatenate([np.repeat(tree, segments), padding - 1])
    return _on(device, arrays, through, mask_arrays(tree_of, branch_of, lengths))


def _padded(
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    lengths: list[list[int]],
    device: torch.device,
    pad_id: int,
) -> PackedBatch:
    prompt_size = np.array([own[0] for own in lengths for _ in own[1:]])
    counts = np.array([length for own in lengths for length in own[1:]])
    width = int((prompt_size + counts).max())
    present = np.arange(width)[None, :] < (prompt_size + counts)[:, None]
    rows = [(prompt, answer) for prompt, answers in zip(prompts, responses, strict=True) for answer in answers]
    ids = np.full(present.shape, pad_id, np.int64)
    ids[present] = np.concatenate([np.asarray(part, np.int64) for row in rows for part in row])
    begins = np.arange(len(counts)) * width + prompt_size  # of each response, in the flattened rows
    tokens = _ranges(begins, counts)
    arrays = {
        "input_ids": ids,
        "sources": tokens - 1,
        "targets": ids.reshape(-1)[tokens],
        "response_of": np.repeat(np.arange(len(counts)), counts),
        "last": begins + counts - 1,
        "lengths": counts,
    }
    return _on(device, arrays, passed(prompt_size, counts[:, None]))


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ... of each range, one after another."""
    return np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def _on(
    device: torch.device,
    arrays: dict[str, NDArray[np.int64]],
    through: Pass,
    layout: Trees | list[NDArray[np.int32]] | None = None,
) -> PackedBatch:
    """The batch of these arrays. through: what a pass over it goes through, without padding. layout: on a CPU the trees
    of a packed row, for FlexAttention its `mask_arrays`.
    """
    blocks = layout if isinstance(layout, list) else []
    tensors: Iterator[Tensor]
    if device.type == "cpu":
        tensors = (torch.from_numpy(array) for array in (*arrays.values(), *blocks))
    else:
        tensors = iter(moved([*arrays.values(), *blocks], device))
    named: dict[str, Any] = {"position_ids": None} | {name: next(tensors) for name in arrays}
    trees = Trees((), mask_of(list(tensors))) if isinstance(layout, list) else layout
    return PackedBatch(trees=trees, longest=int(arrays["lengths"].max()), passed=through, **named)
