"""A judge that is a Python function of the user's."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from prefarena.config import FunctionJudge
from prefarena.errors import UserError
from prefarena.judges.texts import JudgeRow, judge_rows
from prefarena.modeling.load import load_tokenizer

Scorer = Callable[[list[JudgeRow]], Sequence[float]]


class FunctionScorer:
    """Calls the function once for each batch that it is asked to score."""

    def __init__(self, settings: FunctionJudge, tokenizer: str) -> None:
        """Raises UserError where the function cannot be imported."""
        self._name, self._function = settings.function, load_function(settings.function)
        self._tokenizer = load_tokenizer(tokenizer)

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """The function's numbers float64 [N]. Raises UserError where they are not N finite numbers."""
        return checked_numbers(
            self._function(judge_rows(self._tokenizer, prompts, responses)), len(prompts), self._name
        )


def load_function(name: str) -> Scorer:
    """`module:function`, looked for where Python looks and in the working directory. Raises UserError."""
    module_name, _, attribute = name.partition(":")
    _search_working_directory()
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module: whatever it raises, it cannot be used
        raise UserError(f"judge function {name}: {module_name} cannot be imported ({error!r})") from None
    try:
        function = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise UserError(f"judge function {name}: module {module_name} has no {attribute}") from None
    if not callable(function):
        raise UserError(f"judge function {name}: it is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def source_digest(name: str) -> str | None:
    """Hash of the file that holds the function, so that an edited function makes new stages; None: no such file."""
    _search_working_directory()
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    path = Path(found.origin) if found is not None and found.origin else None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None and path.is_file() else None


def checked_numbers(values: object, number: int, name: str) -> np.ndarray:
    """`number` finite values as float64. Raises UserError naming the function and what it returned."""
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"judge function {name}: it must return one number for each row, not {values!r:.80}") from None
    if scores.shape != (number,):
        raise UserError(f"judge function {name}: {number} rows, but it returned an array of shape {scores.shape}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(f"judge function {name}: the score of row {bad[0]} is {scores[bad[0]]}, not a finite number")
    return scores


def _search_working_directory() -> None:
    """Ray's workers look there too; an installed command does not by itself."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
