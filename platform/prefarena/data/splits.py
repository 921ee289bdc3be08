"""Which rows train, and which are held out: a seeded hash of the dialogue's opening, so it depends on no other row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from prefarena.config import TextTask
from prefarena.data.formats import Pair


@dataclass(frozen=True)
class Shares:
    """Shares of the openings that are held out to test on, and to train the judge on. The rest trains the methods."""

    test: float
    judge: float
    seed: int

    def split_of(self, pair: Pair) -> str:
        """train, judge or test."""
        digest = hashlib.sha256(f"{self.seed}:{pair.opening.strip()}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        if share < self.test:
            return "test"
        return "judge" if share < self.test + self.judge else "train"

    @property
    def needed(self) -> list[str]:
        """The splits that must have pairs."""
        return ["train", *(name for name, share in (("test", self.test), ("judge", self.judge)) if share > 0)]


def shares_of(task: TextTask, learns_judge: bool) -> Shares:
    """What the task holds out. Without a judge that is learned, the rows set aside for one train the methods."""
    return Shares(task.test_share, task.judge_share if learns_judge else 0.0, task.split_seed)
