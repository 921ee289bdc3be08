"""Weights on their way to an engine: as arrays, what an engine must be sent, and checksums of it. No Ray, no vLLM."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefarena.generation.interface import WeightMismatchError, WeightUpdateError

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MIX = 0x2545F4914F6CDD1D  # odd, so that multiplying by it mod 2^64 loses nothing
_BLOCK = 1 << 22  # elements mixed at once: bounds the memory that a checksum takes


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Float32 arrays in host memory, which Ray's object store holds without pickling them."""
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}


def to_host(
    named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> tuple[dict[str, np.ndarray], dict[str, int] | None]:
    """`as_arrays` and `checksums` (none without a dtype) of tensors that come one by one and need not be kept.

    So what is gathered or merged for the engines is on a device one tensor at a time.
    """
    arrays: dict[str, np.ndarray] = {}
    sums: dict[str, int] = {}
    for name, tensor in named_tensors:
        if dtype is not None:
            sums |= checksums({name: tensor}, dtype)
        arrays |= as_arrays({name: tensor})
    return arrays, None if dtype is None else sums


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Views of arrays that Ray shares read-only; they may only be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_complete(sent: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightUpdateError unless exactly the expected tensors are sent.

    A partial update is not harmless: vLLM fuses layers (q, k, v), and fills what was not sent of a fused one with
    whatever its buffer held.
    """
    missing, unknown = sorted(expected.keys() - sent.keys()), sorted(sent.keys() - expected.keys())
    if missing:
        raise WeightUpdateError(f"a weight update must hold every tensor of the model; missing: {_listed(missing)}")
    if unknown:
        raise WeightUpdateError(f"a weight update holds tensors that the model does not have: {_listed(unknown)}")
    for name, shape in expected.items():
        if tuple(sent[name]) != shape:
            raise WeightUpdateError(f"{name} was sent with shape {tuple(sent[name])}, but the engine's is {shape}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def checksum(tensor: Tensor) -> int:
    """A 64-bit sum over the bit patterns of the elements, each multiplied by a number of its own place.

    So it tells tensors apart that hold the same numbers in another order. Negative zero counts as zero: an engine
    whose weights are read back through a product cannot tell them apart.
    """
    bits = (tensor.detach().contiguous().reshape(-1) + 0.0).view(_BITS[tensor.dtype])
    total = 0
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK]
        place = torch.arange(start + 1, start + 1 + len(block), device=block.device, dtype=torch.int64).mul_(_MIX)
        place ^= place >> 29
        total += int((block * (place | 1)).sum().item())
    return total % 2**64


def checksums(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, int]:
    """Checksums of tensors as an engine of this dtype must hold them. Computed where the tensors are."""
    return {name: checksum(tensor.detach().to(dtype)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Verified:
    """How much of a model was read back from an engine and found to be what was sent; `skipped`: what was not read."""

    num_tensors: int
    num_parameters: int
    num_tensors_sent: int
    num_parameters_sent: int
    skipped: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the parameters, between 0 and 1."""
        return self.num_parameters / self.num_parameters_sent

    def __str__(self) -> str:
        told = (
            f"{self.num_tensors} of {self.num_tensors_sent} tensors ({100 * self.share:.1f} % of the parameters) were "
            "read back from the engine and are what was sent"
        )
        if not self.skipped:
            return told
        return f"{told}; the layout of the others is not known: {_listed(list(self.skipped))}"

    def summary(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "num_tensors": self.num_tensors,
            "num_tensors_sent": self.num_tensors_sent,
            "share_of_parameters": self.share,
            "skipped": list(self.skipped),
        }


def check_held(held: Mapping[str, int], sent: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Verified:
    """Raise WeightMismatchError, naming the tensors, unless what is held is what was sent; say how much was compared.

    A tensor that the engine cannot show, as it keeps it in a layout that is not known here, is skipped and named.
    """
    wrong = [name for name in sent if name in held and held[name] != sent[name]]
    if wrong:
        raise WeightMismatchError(
            f"the engine does not hold what was sent: {_listed(wrong)} differ (where vLLM keeps a model's weights in "
            "another layout this check cannot work: generation.verify_weights: false)"
        )
    sizes = {name: math.prod(shapes[name]) for name in sent}
    shown = [name for name in sent if name in held]
    return Verified(
        num_tensors=len(shown),
        num_parameters=sum(sizes[name] for name in shown),
        num_tensors_sent=len(sizes),
        num_parameters_sent=sum(sizes.values()),
        skipped=tuple(sorted(sizes.keys() - held.keys())),
    )
