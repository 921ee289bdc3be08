"""Tensors in memory that other processes read without a copy for each: in buckets, and shared. No Ray, no vLLM.

A bucket is what an update is sent in: some tensors in one array of bytes, which Ray's object store holds as it is. The
ranks of an engine below one process read shared memory instead, as they are no processes of Ray's. That memory has no
name in a file system (`memfd_create`), so nothing is left behind by a process that is killed, and a container's small
/dev/shm does not bound it. Others open it through the writer's folder in /proc; it lives until the writer has closed it
and no reader has a tensor of it any more.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Bytes. A call for a bucket costs some milliseconds beside the copying, which takes ten times as long at this size.
BUCKET_BYTES = 128 * 2**20
#: Of an update under way: one is filled while the others are taken. Little beside any model that has as many.
MOST_BUCKETS = 3
#: Between devices: of what is packed together and sent at once, by vLLM's sender, which has up to three of these at a
#: time. Also vLLM's own number.
DEVICE_BUCKET_BYTES = 2**30
_ALIGNED = 64  # bytes; every tensor begins at a multiple


@dataclass(frozen=True)
class Entry:
    """One tensor: where it begins in the memory, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def of(self, memory: mmap.mmap | np.ndarray) -> Tensor:
        """Return the tensor itself, which keeps the memory alive."""
        numel = torch.Size(self.shape).numel()
        if not numel:
            return torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.frombuffer(memory, dtype=self.dtype, count=numel, offset=self.offset).view(self.shape)


def _room(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes, up to where the next may begin."""
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Bucket:
    """Some of an update's tensors, one after another in `data`, which is an array of bytes."""

    entries: Mapping[str, Entry]
    data: np.ndarray

    def tensors(self) -> dict[str, Tensor]:
        """Return views, which must not be written to: Ray's arrays are shared."""
        return {name: entry.of(self.data) for name, entry in self.entries.items()}


def buckets(named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: int) -> Iterator[Bucket]:
    """Pack tensors that come one by one into buckets of at most `limit` bytes; a larger one gets a bucket to itself.

    They are copied, in this dtype, and not kept: a device holds only one gathered or merged tensor at a time. All
    buckets are filled in the same memory, as new memory costs ten times as much as the copying, so each must have been
    put elsewhere before the next is asked for.
    """
    entries, size = dict[str, Entry](), 0
    data = np.empty(limit, dtype=np.uint8)
    for name, tensor in named_tensors:
        room = _room(tensor.shape, dtype)
        if entries and size + room > limit:
            yield Bucket(entries, data[:size])
            entries, size = {}, 0
        if room > len(data):
            data = np.empty(room, dtype=np.uint8)
        entries[name] = Entry(dtype, tuple(tensor.shape), size)
        entries[name].of(data).copy_(tensor.detach())
        size += room
        del tensor
    if entries:
        yield Bucket(entries, data[:size])


@dataclass(frozen=True)
class SharedTensors:
    """A small, picklable handle with which other processes can `open` the tensors."""

    pid: int
    descriptor: int
    size: int
    entries: Mapping[str, Entry]

    def open(self) -> dict[str, Tensor]:
        """Return the tensors, which must not be written to."""
        with open(f"/proc/{self.pid}/fd/{self.descriptor}", "rb") as file:
            memory = mmap.mmap(file.fileno(), self.size, prot=mmap.PROT_READ)
        return {name: entry.of(memory) for name, entry in self.entries.items()}


@contextmanager
def shared(tensors: Mapping[str, Tensor]) -> Iterator[SharedTensors]:
    """Keep tensors in memory that other processes of this machine and user can open within the block."""
    entries, size = dict[str, Entry](), 0
    for name, tensor in tensors.items():
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), size)
        size += _room(tensor.shape, tensor.dtype)
    size = max(size, _ALIGNED)
    descriptor = os.memfd_create("prefarena-weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        for name, tensor in tensors.items():
            entries[name].of(memory).copy_(tensor)
        yield SharedTensors(os.getpid(), descriptor, size, entries)
    finally:
        os.close(descriptor)
