"""The work of passes over a model, in the three numbers that their FLOPs are linear in (see `flops.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Pass:
    """The work of passes over a model, added up. tokens: as they are laid out, a shared prompt once.

    visible: pairs of a token and one that it attends to, itself included. scored: tokens that the head runs on.
    """

    tokens: float
    visible: float
    scored: float

    def times(self, factor: float) -> Pass:
        return Pass(factor * self.tokens, factor * self.visible, factor * self.scored)

    def plus(self, other: Pass) -> Pass:
        return Pass(self.tokens + other.tokens, self.visible + other.visible, self.scored + other.scored)


NOTHING = Pass(0.0, 0.0, 0.0)


def passed(prompts: ArrayLike, responses: ArrayLike) -> Pass:
    """The work of a pass over rows that are laid out as training packs them. prompts: tokens of each, [N]; responses:
    tokens of those to each prompt, [N, R].
    """
    before, own = np.asarray(prompts, float), np.asarray(responses, float)
    # A token sees itself and all before it: n (n + 1) / 2 pairs among n tokens.
    visible = before * (before + 1) / 2 + (own * (own + 1) / 2 + before[:, None] * own).sum(1)
    return Pass(float(before.sum() + own.sum()), float(visible.sum()), float(own.sum()))


@dataclass
class Worked:
    """The work of passes over one model so far: of those without gradients, and of those that were trained on."""

    scored: Pass = field(default=NOTHING)
    trained: Pass = field(default=NOTHING)

    def count(self, one: Pass, *, with_gradient: bool) -> None:
        if with_gradient:
            self.trained = self.trained.plus(one)
        else:
            self.scored = self.scored.plus(one)

    def forget(self) -> None:
        self.scored = self.trained = NOTHING
