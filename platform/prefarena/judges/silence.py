"""Rows that a function or a classifier has no score for: nan, counted, and refused where there are too many.

An endpoint counts its own silent rows, and shows what it was answered (client.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from prefarena.config import ClassifierJudge, Endpoint, FunctionJudge
from prefarena.errors import JudgeError

if TYPE_CHECKING:
    from prefarena.judges.spec import Judge, JudgeSpec


def check_scores(scores: np.ndarray, spec: JudgeSpec) -> None:
    """Raise JudgeError where a judge that may not be silent gave scores that are no finite numbers, and where one that
    may be gave more of them than its settings allow."""
    number, silent = scores.size, int((~np.isfinite(scores)).sum())
    settings = spec.settings
    if isinstance(settings, Endpoint) or not silent:
        return
    if spec.may_be_silent and isinstance(settings, FunctionJudge | ClassifierJudge):
        _check_share(silent, number, settings)
        return
    hint = "" if isinstance(settings, FunctionJudge) else "; check its weights"
    raise JudgeError(
        f"the judge `{settings.kind}` gave {silent} of {number} responses scores that are not finite numbers{hint}"
    )


def _check_share(num_silent: int, num_asked: int, settings: FunctionJudge | ClassifierJudge) -> None:
    if num_silent > settings.max_silent_share * num_asked:
        name = settings.function if isinstance(settings, FunctionJudge) else settings.path
        raise JudgeError(
            f"judge {settings.kind} {name}: {num_silent} of {num_asked} rows got no score that is a finite number, "
            f"more than max_silent_share {settings.max_silent_share:g} allows"
        )


class CountedJudge:
    """A judge that may be silent, for a training that asks batch after batch; it counts the silent rows.

    With `limited` false any number of them may be.
    """

    def __init__(self, judge: Judge, settings: FunctionJudge | ClassifierJudge, *, limited: bool = True) -> None:
        self._judge, self._settings, self._limited = judge, settings, limited
        self.num_asked = self.num_silent = 0

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Return scores, float64 [N], nan where there is none.

        Raises JudgeError where more than `max_silent_share` of all rows so far have none.
        """
        scores = self._judge.score(prompts, responses)
        self.num_asked += len(scores)
        self.num_silent += int(np.isnan(scores).sum())
        if self._limited:
            _check_share(self.num_silent, self.num_asked, self._settings)
        return scores
