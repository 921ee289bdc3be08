"""Which rows make up which optimizer step: a pure function, so a step number is the whole state of the data.

Every epoch is a fresh permutation in which neighbours in length share a batch; steps run through the epochs
without a gap, so no row is ever dropped. Any restart, at any step, sees the same rows again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefarena.errors import UserError

#: Tokens in a forward pass where nothing asks for fewer.
LARGEST_PASS = 8192
#: The same for a pass without gradients on a CPU. The C library does not keep the memory of a larger one's tensors for
#: the next layer, so all of its pages are made anew. On two Xeon cores 64 sequences took 1.3 times as long in one pass
#: of 10,000 tokens as in four of 2,500 with SmolLM2-135M, and 1.5 times with a small Llama
#: (benchmarks/scoring_passes.py).
_LARGEST_ON_CPU = 4096
#: A pass without gradients keeps no activations, so this many times the rows of one with gradients fit.
_MORE_WITHOUT_GRADIENTS = 4
_BUCKET_BATCHES = 16  # batches whose rows are sorted by length together: little padding, enough randomness


_SEARCHED_STEPS = 256  # for the largest micro-batch


@dataclass(frozen=True)
class BatchPlan:
    """The plan of one data set. `lengths`: [N], by which rows are sorted; `batch_size`: rows per step over all workers;
    `sizes`: [N], tokens that a row takes in a forward pass; `micro_batch_tokens`: most of them in a forward pass of one
    worker (a longer row goes alone).
    """

    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    batch_size: int
    micro_batch_tokens: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.lengths) == 0:
            raise UserError("there are no rows to train on")
        if self.batch_size % self.world_size:
            raise UserError(
                f"batch_size {self.batch_size} cannot be divided evenly among {self.world_size} workers; "
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
        rows = self.rows(step)
        shares = [
            within_budget(rows[one :: self.world_size], self.sizes, self.micro_batch_tokens)
            for one in range(self.world_size)
        ]
        mine, most = shares[rank], max(map(len, shares))
        while len(mine) < most:  # halve the longest
            longest = max(range(len(mine)), key=lambda part: len(mine[part]))
            mine[longest : longest + 1] = np.array_split(mine[longest], 2)
        return mine

    def largest_micro_batch(self) -> NDArray[np.int64]:
        """The rows with the most tokens that one worker takes in one pass, among many steps of the first epoch."""
        order, steps = self._epoch(0), max(1, len(self.lengths) // self.batch_size)
        parts = []
        for step in np.unique(np.linspace(0, steps - 1, min(steps, _SEARCHED_STEPS)).astype(int)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            for rank in range(self.world_size):
                parts += within_budget(rows[rank :: self.world_size], self.sizes, self.micro_batch_tokens)
        return max(parts, key=lambda part: int(self.sizes[part].sum()))

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


def largest_scored(device: str) -> int:
    """Tokens in a forward pass without gradients on this kind of device, `cpu` or `cuda`."""
    return _LARGEST_ON_CPU if device == "cpu" else LARGEST_PASS


def scored_at_once(rows: int, longest: int, device: str) -> int:
    """Rows in a pass without gradients, where `rows` fit a pass with them. longest: tokens that a row may have.

    The number depends on nothing but these, so that all workers make equally many passes.
    """
    most = _MORE_WITHOUT_GRADIENTS * rows
    return max(rows, min(most, _LARGEST_ON_CPU // longest)) if device == "cpu" else most


def bounded_passes(lengths: NDArray[np.int64], most_rows: int, most_tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers of the passes over N rows, those of similar length together. `lengths`: [N], in tokens.

    A pass has at most `most_rows` rows, and at most `most_tokens` tokens or one row.
    """
    order = np.argsort(lengths, kind="stable")
    return [
        rows
        for start in range(0, len(order), most_rows)
        for rows in within_budget(order[start : start + most_rows], lengths, most_tokens)
    ]


def within_budget(rows: NDArray[np.int64], sizes: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """`rows` in consecutive parts of at most `budget` tokens; a longer row is a part by itself. `sizes`: [N]."""
    parts, start, total = [], 0, 0
    for position, size in enumerate(sizes[rows].tolist()):
        if total + size > budget and position > start:
            parts.append(rows[start:position])
            start, total = position, 0
        total += size
    return [*parts, rows[start:]] if len(rows) else []
