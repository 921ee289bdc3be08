"""A judge that is a Python function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prefarena.config import FunctionJudge
from prefarena.errors import JudgeError
from prefarena.functions import load_function, own_traceback
from prefarena.judges.texts import JudgeRow, judge_rows
from prefarena.modeling.load import load_tokenizer

Scorer = Callable[[list[JudgeRow]], Sequence[float]]


class FunctionScorer:
    """Calls the function once for each batch that it is asked to score."""

    def __init__(self, settings: FunctionJudge, tokenizer: str) -> None:
        """Raises UserError where the function cannot be imported."""
        self._name, self._function = settings.function, load_scorer(settings.function)
        self._tokenizer = load_tokenizer(tokenizer)

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """The function's numbers float64 [N].

        Raises JudgeError where they are not N finite numbers, and with the user's traceback where the function raises.
        """
        rows = judge_rows(self._tokenizer, prompts, responses)
        try:
            values = self._function(rows)
        except Exception as error:  # the user's function: whatever it raises is shown as it was raised
            raise JudgeError(f"judge function {self._name} raised an error:\n{own_traceback(error)}") from None
        return checked_numbers(values, len(prompts), self._name)


def load_scorer(name: str) -> Scorer:
    """The function of that name. Raises UserError where it is not there, or is none of a list of rows."""
    function: Scorer = load_function(name, "judge function", ["the list of rows"])
    return function


def checked_numbers(values: object, number: int, name: str) -> np.ndarray:
    """`number` finite values as float64. Raises JudgeError naming the function and what it returned."""
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise JudgeError(f"judge function {name}: it must return one number for each row, not {values!r:.80}") from None
    if scores.shape != (number,):
        raise JudgeError(f"judge function {name}: {number} rows, but it returned an array of shape {scores.shape}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise JudgeError(f"judge function {name}: the score of row {bad[0]} is {scores[bad[0]]}, not a finite number")
    return scores
