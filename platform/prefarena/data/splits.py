"""Which rows train and which are held out, by a seeded hash of the dialogue's opening, independently of other rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from prefarena.config import TextTask
from prefarena.data.counting import count_rows
from prefarena.data.formats import Pair
from prefarena.data.rejections import IN_TEST_DATA
from prefarena.data.sources import BrokenFile, Part
from prefarena.errors import UserError

#: What is held out by default: so many rows, but at most this share of them.
NUM_HELD_OUT, MOST_HELD_OUT = 2000, 0.2


@dataclass(frozen=True)
class Shares:
    """Shares of the openings that are held out to test on, and to train the judge on. The rest trains the methods."""

    test: float
    judge: float
    seed: int

    def split_of(self, pair: Pair) -> str:
        """Return the split of an opening: train, judge or test."""
        digest = hashlib.sha256(f"{self.seed}:{pair.opening.strip()}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        if share < self.test:
            return "test"
        return "judge" if share < self.test + self.judge else "train"

    @property
    def needed(self) -> list[str]:
        """The splits that must have pairs."""
        return ["train", "test", *(["judge"] if self.judge > 0 else [])]


#: Of rows that are only looked at.
NONE_HELD_OUT = Shares(0.0, 0.0, 0)
#: Of a test set of its own.
ALL_TEST = Shares(1.0, 0.0, 0)


def shares_of(task: TextTask, parts: list[Part], learns_judge: bool) -> Shares:
    """The shares that the task holds out of its `parts`, whose rows are counted if a number is to be held out.

    Without a judge that is learned, the rows set aside for one train the methods; with rows to test on of their own,
    none are held out for that. Raises UserError where the numbers
    leave no rows to train on, and at a file that cannot be read.
    """
    wanted = {} if task.test_source else {"test": (task.test_share, task.num_test_pairs)}
    if learns_judge:
        wanted["judge"] = (task.judge_share, task.num_judge_pairs)
    num_rows = 0
    if any(share is None for share, _ in wanted.values()):
        num_rows = _count(task, parts)
    shares = {name: share or _share(number, num_rows) for name, (share, number) in wanted.items()}
    if sum(shares.values()) >= 1:
        given = [f"task.{n}_share {share:g}" for n, (share, _) in wanted.items() if share]
        given += [f"task.num_{n}_pairs {number}" for n, (_, number) in wanted.items() if number]
        raise UserError(f"{task.data}: {' and '.join(given)} leave none of its {num_rows} rows to train on; lower them")
    return Shares(shares.get("test", 0.0), shares.get("judge", 0.0), task.split_seed)


def ignored_judge(task: TextTask, learns_judge: bool) -> list[str]:
    """A note if the task sets a size for the judge's rows although no judge is learned."""
    given = next((n for n in ("judge_share", "num_judge_pairs") if getattr(task, n) is not None), None)
    if learns_judge or given is None:
        return []
    return [f"task.{given} sets nothing aside, because the judge is not learned; those rows are used for training"]


def leakage_notes(counts: dict[str, Any]) -> list[str]:
    """A note on how many rows are not trained on because their dialogue is in the test data, if there are any."""
    number = counts["dropped"].get(IN_TEST_DATA, 0)
    if not number:
        return []
    return [
        f"{number} of {counts['num_rows']} rows begin with the same prompt as a row of the test data, and are not "
        f"trained on"
    ]


def _count(task: TextTask, parts: list[Part]) -> int:
    try:
        return count_rows(parts, task.max_row_bytes, task.max_rows)
    except BrokenFile as error:
        raise UserError(str(error)) from None


def _share(number: int | None, num_rows: int) -> float:
    """The share that holds out about `number` rows; by default NUM_HELD_OUT, and at most MOST_HELD_OUT of them."""
    if number is not None:
        return number / max(1, num_rows)
    return min(MOST_HELD_OUT, NUM_HELD_OUT / max(1, num_rows))
