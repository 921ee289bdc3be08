"""Many small arrays to a GPU in one copy.

A pass needs about twenty arrays of integers. Copied one by one from ordinary memory, each of them stops the host until
the GPU has caught up; in one buffer of pinned memory they are one copy that the GPU fetches by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Every array begins at a multiple of so many bytes.
_ALIGNMENT = 16

_KINDS = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


def rows_on(device: torch.device, rows: Tensor) -> Tensor:
    """Move row numbers [n], int64 on the host, to where they can index tensors on `device`."""
    return rows if device.type == "cpu" else moved([rows.numpy()], device)[0]


def moved(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """Copy arrays of 32-bit or 64-bit integers to tensors of their shapes on `device`, which share one buffer there."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    starts = np.cumsum([0, *sizes])
    buffer = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    for array, start in zip(arrays, starts, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_KINDS[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
