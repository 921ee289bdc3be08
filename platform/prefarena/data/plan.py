"""Which rows make up which optimizer step: a pure function, so a step number is the whole state of the data.

Every epoch is a fresh permutation in which neighbours in length share a batch; steps run through the epochs
without a gap, so no row is ever dropped. Any restart, at any step, sees the same rows again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefarena.errors import UserError

_BUCKET_BATCHES = 16  # batches whose rows are sorted by length together: little padding, enough randomness


@dataclass(frozen=True)
class BatchPlan:
    """The plan of one data set. `lengths`: [N] in tokens; `batch_size`: rows a step over all workers;
    `micro_batch_size`: rows a forward pass of one worker.
    """

    lengths: NDArray[np.int64]
    batch_size: int
    micro_batch_size: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.lengths) == 0:
            raise UserError("there are no rows to train on")
        if self.batch_size % self.world_size:
            raise UserError(
                f"batch_size {self.batch_size} cannot be shared evenly by {self.world_size} workers; "
                "change training.batch_size or resources.num_workers"
            )

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps that `num_epochs` take, at least one."""
        return max(1, round(len(self.lengths) * num_epochs / self.batch_size))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers [batch_size] of an optimizer step, sorted by length, over all workers."""
        first, stop = step * self.batch_size, (step + 1) * self.batch_size
        size = len(self.lengths)
        epochs = range(first // size, (stop - 1) // size + 1)
        stream = np.concatenate([self._epoch(epoch) for epoch in epochs])
        rows = stream[first - epochs[0] * size : stop - epochs[0] * size]
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def micro_batches(self, step: int, rank: int) -> list[NDArray[np.int64]]:
        """Row numbers of one worker's micro-batches; every worker has the same number of them."""
        mine = self.rows(step)[rank :: self.world_size]
        return np.array_split(mine, -(-len(mine) // self.micro_batch_size))

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        bucket = self.batch_size * _BUCKET_BATCHES
        batches = []
        for start in range(0, len(order), bucket):
            rows = order[start : start + bucket]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return np.concatenate([batches[i] for i in generator.permutation(len(batches))])


def token_batches(lengths: NDArray[np.int64], most_rows: int, most_tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers of batches of similar length, the shortest first, that hold all rows once.

    `lengths`: [N] in tokens. A batch has at most `most_rows` rows and, padded to its longest, `most_tokens` tokens; a
    row that is longer is one by itself.
    """
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        size = stop - start
        full = size == most_rows or stop == len(order)
        if full or (size + 1) * lengths[order[stop]] > most_tokens:
            batches.append(order[start:stop])
            start = stop
    return batches
