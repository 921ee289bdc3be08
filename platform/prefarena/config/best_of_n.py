"""Best-of-n, a method that trains nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefarena.settings.judges import JudgeSettings, RewardModel
from prefarena.settings.search import Space, around
from prefarena.settings.section import Section


class BestOfN(Section):
    """The best of n samples of the reference, by the reward model: no training of the policy."""

    kind: Literal["best_of_n"] = "best_of_n"
    reward: JudgeSettings = RewardModel()
    n: int = Field(4, ge=1)

    def search_space(self) -> Space:
        """What `prefarena tune` searches by default: the number of samples."""
        return {"n": around(self.n, 4, integer=True)}
