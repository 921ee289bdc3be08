"""Labels and scores compared with the order of the answers: which are not preferences, and what is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prefarena.errors import UserError

EVEN = 0.5  # a smaller label says that `rejected` is the better answer
#: Scores of both answers, as data sets name them: chosen's column, rejected's column.
_SCORES = [
    *((f"{what}_chosen", f"{what}_rejected") for what in ("score", "rating", "reward")),
    *((f"chosen{join}{what}", f"rejected{join}{what}") for what in ("score", "rating", "reward") for join in "_-"),
    ("chosen_avg_rating", "rejected_avg_rating"),
]
SCORES = tuple(name for names in _SCORES for name in names)


def scores_of(row: dict[str, Any]) -> tuple[float, float] | None:
    """The scores of `chosen` and `rejected`, by the first names of which the row has both as finite numbers."""
    for chosen, rejected in _SCORES:
        found = _number(row.get(chosen)), _number(row.get(rejected))
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def _number(value: Any) -> float | None:
    """A finite number, None where it is something else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON knows whole numbers of any size
        return None
    return number if math.isfinite(number) else None


def check_labels(path: str, labels: Sequence[Any]) -> None:
    """Raise UserError where labels look like classes: as probabilities of a preference they would turn pairs round."""
    whole = [label for label in labels if isinstance(label, int) and not isinstance(label, bool)]
    under = [label for label in labels if isinstance(label, float) and label < EVEN]
    meaning = "`label` is P(chosen preferred), and a label under one half says that `rejected` is the better answer"
    if whole and len(whole) == len(labels) and 0 in whole:
        raise UserError(
            f"{path}: the column 'label' holds only whole numbers, as classes do, and {whole.count(0)} of its first "
            f"{len(labels)} are 0: {meaning}; rename the column if it is something else, or write 0.0 and 1.0 if "
            f"these are probabilities"
        )
    if labels and len(under) == len(labels):
        raise UserError(
            f"{path}: all of its first {len(labels)} labels are under one half: {meaning}; rename the column if it is "
            "something else, or swap the answers"
        )


def order_notes(counts: dict[str, Any]) -> list[str]:
    """A sentence each on the kinds of pairs whose answers are not in the order that their columns say."""
    notes, num_pairs = [], sum(counts[f"num_{split}_pairs"] for split in ("train", "judge", "test"))
    if number := counts["num_labels_under_half"]:
        notes.append(
            f"{number} of {num_pairs} pairs have a label under one half: in these, `rejected` counts as the better "
            f"answer"
        )
    if number := counts["num_scores_contradicting"]:
        notes.append(
            f"{number} of {num_pairs} pairs have a lower score for `chosen` than for `rejected`; the order of the "
            f"answers is what counts"
        )
    return notes
