"""A judge that is a Python function of the user's."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefarena.config import FunctionJudge
from prefarena.errors import JudgeError, UserError
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
        """The function's numbers float64 [N].

        Raises JudgeError where they are not N finite numbers, and with the user's traceback where the function raises.
        """
        rows = judge_rows(self._tokenizer, prompts, responses)
        try:
            values = self._function(rows)
        except Exception as error:  # the user's function: whatever it raises is shown as it was raised
            lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next)  # type: ignore[union-attr]
            raise JudgeError(f"judge function {self._name} raised an error:\n{''.join(lines).rstrip()}") from None
        return checked_numbers(values, len(prompts), self._name)


def load_function(name: str) -> Scorer:
    """`module:function`, looked for where Python looks and in the working directory. Raises UserError."""
    module_name, _, attribute = name.partition(":")
    _search_working_directory()
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module: whatever it raises, it cannot be used
        raise UserError(f"judge function {name}: {module_name} cannot be imported ({error!r})") from None
    function = owner = module
    for part in attribute.split("."):
        owner = function
        try:
            function = getattr(owner, part)
        except AttributeError:
            raise UserError(f"judge function {name}: module {module_name} has no {attribute}") from None
    reason = _no_function_of_rows(function, owner, part)
    if reason is not None:
        raise UserError(f"judge function {name}: {reason}; it must be a function of one argument, the list of rows")
    return function  # type: ignore[no-any-return]


def _no_function_of_rows(function: object, owner: object, attribute: str) -> str | None:
    """Why an object cannot be called with a list of rows for a list of scores; None: it can, as far as can be seen."""
    if inspect.isclass(function):
        return "it is a class"
    if not callable(function):
        return f"it is a {type(function).__name__}, not a function"
    if inspect.isclass(owner) and inspect.isfunction(inspect.getattr_static(owner, attribute)):
        return f"it is a method, which needs an instance of {owner.__name__}"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return "it is a coroutine or a generator, which returns no list of scores"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # some built-in functions do not tell
    try:
        signature.bind([])
    except TypeError:
        return f"it cannot be called with one argument: its arguments are {signature}"
    return None


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


def _search_working_directory() -> None:
    """Ray's workers look there too; an installed command does not by itself."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
