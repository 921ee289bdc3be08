"""A judge that is a Python function supplied by the user."""

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

    def __init__(self, settings: FunctionJudge, tokenizer: str, may_be_silent: bool = False) -> None:
        """may_be_silent: values that are not finite become nan. Raises UserError where it cannot be imported."""
        self._name, self._function = settings.function, load_scorer(settings.function)
        self._tokenizer, self._may_be_silent = load_tokenizer(tokenizer), may_be_silent

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Return the function's numbers, float64 [N].

        Raises JudgeError where they are not N finite numbers, and with the user's traceback where the function raises.
        """
        rows = judge_rows(self._tokenizer, prompts, responses)
        try:
            values: object = self._function(rows)
        except Exception as error:  # the user's function: whatever it raises is shown as it was raised
            raise JudgeError(f"judge function {self._name} raised an error:\n{own_traceback(error)}") from None
        if self._may_be_silent:
            values = _with_silence(values)
        return checked_numbers(values, len(prompts), self._name, may_be_silent=self._may_be_silent)


def load_scorer(name: str) -> Scorer:
    """Load the function of that name. Raises UserError where it does not exist or does not take a list of rows."""
    function: Scorer = load_function(name, "judge function", ["the list of rows"])
    return function


def _with_silence(values: object) -> object:
    """Return the list with nan in place of everything that is not a number."""
    if not isinstance(values, list | tuple | np.ndarray):
        return values
    numbers = []
    for value in values:
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(np.nan)
    return numbers


def checked_numbers(values: object, number: int, name: str, *, may_be_silent: bool = False) -> np.ndarray:
    """Return `number` values as float64. With `may_be_silent`, those that are not finite become nan.

    Raises JudgeError naming the function and what it returned.
    """
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise JudgeError(f"judge function {name}: it must return one number for each row, not {values!r:.80}") from None
    if scores.shape != (number,):
        raise JudgeError(f"judge function {name}: {number} rows, but it returned an array of shape {scores.shape}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if may_be_silent:
        scores[bad] = np.nan
    elif len(bad):
        raise JudgeError(f"judge function {name}: the score of row {bad[0]} is {scores[bad[0]]}, not a finite number")
    return scores
