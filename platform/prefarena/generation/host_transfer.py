"""Weights from a trainer to the generation actors through host memory: the trainer's side.

An update is a sequence of buckets. Each is put into Ray's object store once, read by every actor, and dropped when all
have taken it, so a model of any size passes through the memory of a few.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from torch import Tensor

from prefarena.generation.checksums import ColumnSample, summed
from prefarena.generation.client import Call, Generator
from prefarena.generation.interface import TransferLostError
from prefarena.generation.shared import BUCKET_BYTES, MOST_BUCKETS, Bucket, buckets
from prefarena.generation.weights import Sums, Verified

#: Buckets on their way to the actors while the next is filled.
_UNDER_WAY = MOST_BUCKETS - 1

_logger = logging.getLogger(__name__)


@dataclass
class HostUpdate:
    """One update of some actors, step by step.

    An actor that is lost on the way has no part in the rest, and holds no version afterwards. since: the version that
    all hold, of which some layers are replaced; None means that all layers are. sums: checksums of what was sent so
    far.
    """

    living: list[Generator]
    version: str
    dtype: torch.dtype
    since: str | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    sums: dict[str, int] = field(default_factory=dict)

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], *, verify: bool, turn: int) -> list[Verified | None]:
        """Send all of it; returns what the remaining actors verified. turn: the turn of a sample, where one is enough.

        All tensors are asked for, even if no actor is left to take them: where a model is spread over several
        processes, gathering one takes all of these.
        """
        arguments, transposed = (self._what, self.name, self.since), self.living[0].served.transposed
        begun = [(member, member.call_update("begin_host_update", *arguments)) for member in self.living]
        sample = ColumnSample(turn) if all(self._wait(begun)) else None
        if verify:
            named_tensors = summed(named_tensors, self.sums, self.dtype, transposed, sample)
        under_way = deque[list[tuple[Generator, Call]]]()
        for bucket in buckets(named_tensors, self.dtype, BUCKET_BYTES):
            if len(under_way) == _UNDER_WAY:
                self._wait(under_way.popleft())
            under_way.append(self._ask("take_bucket", _stored(bucket)))
            del bucket
        for calls in under_way:
            self._wait(calls)
        sums = Sums(self.sums, sample) if verify else None
        return self._wait(self._ask("end_host_update", sums, self.version))

    @property
    def _what(self) -> str:
        return f"to take weights {self.version!r}"

    def _ask(self, method: str, *args: Any) -> list[tuple[Generator, Call]]:
        return [(member, member.call_update(method, self._what, self.name, *args, step=True)) for member in self.living]

    def _wait(self, calls: Sequence[tuple[Generator, Call]]) -> list[Any]:
        """Wait for the results of the actors that are not lost. Raises any other error of one of them."""
        told = []
        for member, call in calls:
            try:
                told.append(call.result())
            except TransferLostError as error:
                if member in self.living:
                    _logger.warning("generator %r has no part in the update any more: %s", member.name, error)
                    self.living.remove(member)
        return told


def _stored(bucket: Bucket) -> ray.ObjectRef:
    """Put a copy in the object store, for as long as somebody has the reference."""
    return ray.put(bucket)
