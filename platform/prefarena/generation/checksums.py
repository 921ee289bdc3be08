"""Checksums of weights, of whole tensors and of the parts that an engine's ranks hold. No Ray, no vLLM."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MIX = 0x2545F4914F6CDD1D  # odd, so that multiplying by it mod 2^64 loses nothing
_BLOCK = 1 << 16  # elements mixed at once: what is computed on the way stays in a processor's cache
#: Of a matrix with at least so many columns a sample has these many or a few more.
_WIDE, _SAMPLED = 256, 16


@dataclass(frozen=True)
class ColumnSample:
    """Some columns of every wide matrix, evenly spread; the columns next to them are checked in the next update."""

    turn: int


def columns_of(sample: ColumnSample | None, width: int) -> range:
    """The columns that are summed of a matrix of so many: all without a sample, and where they are few."""
    if sample is None or width < _WIDE:
        return range(width)
    step = width // _SAMPLED
    return range(sample.turn % step, width, step)


def within(columns: range, begin: int, end: int) -> range:
    """Return those of evenly spread columns that lie in a range."""
    skipped = max(0, -(-(begin - columns.start) // columns.step))
    return range(columns.start + skipped * columns.step, min(end, columns.stop), columns.step)


def as_matrix(tensor: Tensor) -> Tensor:
    """View a tensor as a matrix [rows, all other dimensions]."""
    return tensor.detach().reshape(len(tensor) if tensor.dim() else 1, math.prod(tensor.shape[1:]))


def checksum(tensor: Tensor, sample: ColumnSample | None = None) -> int:
    """A 64-bit sum over the bit patterns of the elements, each multiplied by a number of its own place.

    So it tells tensors apart that hold the same numbers in another order, and those of parts of a tensor add up to that
    of the whole. Negative zero counts as zero: an engine whose weights are read back through a product cannot tell them
    apart. With a sample it covers these columns only.
    """
    matrix = as_matrix(tensor)
    columns = columns_of(sample, matrix.shape[1])
    return _sum(taken(matrix, columns), 0, columns, matrix.shape[1])


def taken(matrix: Tensor, columns: range) -> Tensor:
    """Return these columns as a view."""
    return matrix[:, columns.start : max(columns.start, columns.stop) : columns.step]


def _sum(part: Tensor, first_row: int, columns: range, width: int) -> int:
    """What a part of a matrix of so many columns adds to its checksum: rows from `first` on, of these columns."""
    if not len(part) or not columns:
        return 0
    device = part.device
    within_row = torch.arange(columns.start + 1, columns.stop + 1, columns.step, device=device, dtype=torch.int64)
    step = max(1, _BLOCK // max(1, len(columns)))
    total = 0
    for start in range(0, len(part), step):
        block = part[start : start + step]
        bits = (block + 0.0).view(_BITS[block.dtype])
        rows = torch.arange(len(block), device=device, dtype=torch.int64).add_(first_row + start)
        place = rows.mul_(width)[:, None].add(within_row).mul_(_MIX)
        place ^= place >> 29
        total += int((bits * (place | 1)).sum().item())
    return total % 2**64


def checksums(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    transposed: Collection[str] = (),
    sample: ColumnSample | None = None,
) -> dict[str, int]:
    """Checksums of tensors as an engine of this dtype must hold them. Computed where the tensors are.

    transposed: those that an engine holds transposed.
    """
    return {
        name: checksum((tensor.T if name in transposed else tensor).detach().to(dtype), sample)
        for name, tensor in tensors.items()
    }


def summed(
    named_tensors: Iterable[tuple[str, Tensor]],
    sums: dict[str, int],
    dtype: torch.dtype,
    transposed: Collection[str] = (),
    sample: ColumnSample | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors one at a time, each after its checksum (as in `checksums`) was put into `sums`."""
    for name, tensor in named_tensors:
        sums |= checksums({name: tensor}, dtype, transposed, sample)
        yield name, tensor
        del tensor


class Piece(NamedTuple):
    """A part of a tensor, seen as a matrix: its first row and column, how many of each, and its checksum."""

    first: tuple[int, int]
    sides: tuple[int, int]
    total: int


def piece_of(part: Tensor, whole: tuple[int, ...], first_row: int, columns: range) -> Piece | None:
    """The piece of a tensor of shape `whole` that a rank of an engine holds; None where it does not fit in.

    part: a matrix of rows from the first on, and of these columns.
    """
    rows, width = whole[0] if whole else 1, math.prod(whole[1:])
    outside = bool(columns) and not 0 <= columns[0] <= columns[-1] < width
    if part.shape[1] != len(columns) or first_row + len(part) > rows or outside:
        return None
    first = (first_row, columns[0] if columns else 0)
    return Piece(first, (len(part), len(columns)), _sum(part, first_row, columns, width))


#: In place of a checksum, which is never negative: ranks that should hold the same do not.
RANKS_DIFFER = -1


def whole_checksums(
    ranks: Sequence[Mapping[str, Sequence[Piece]]],
    shapes: Mapping[str, tuple[int, ...]],
    sample: ColumnSample | None = None,
) -> dict[str, int]:
    """Compute checksums of whole tensors from the pieces that the ranks of an engine hold.

    Pieces that several ranks hold (norms, heads that are fewer than ranks) count once. Tensors of which some part was
    not found are left out.
    """
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        pieces = [piece for rank in ranks for piece in rank.get(name, ())]
        places = {(piece.first, piece.sides): piece.total for piece in pieces}
        size = (shape[0] if shape else 1) * len(columns_of(sample, math.prod(shape[1:])))
        if pieces and sum(rows * columns for _, (rows, columns) in places) == size:
            same = all(places[piece.first, piece.sides] == piece.total for piece in pieces)
            found[name] = sum(places.values()) % 2**64 if same else RANKS_DIFFER
    return found
