"""How an off-policy method gets pairs of its own: what its policy says on the way, labelled by a judge."""

from __future__ import annotations

from pydantic import Field

from prefarena.settings.judges import JudgeSettings, RewardModel
from prefarena.settings.section import Section


class Online(Section):
    """Every so many steps the prompts of the next ones get two new responses of the policy, and a judge orders them.

    Until then a training learns from the pairs of its data. docs/methods.md says what is done exactly.
    """

    every: int = Field(
        ge=1,
        description="Number of steps before the first drawing of new pairs, and from one drawing to the next; with "
        "no fewer than the training has, nothing is drawn.",
    )
    reward: JudgeSettings = Field(
        RewardModel(), description="The judge that orders new pairs; a learned one is trained on the pairs of the data."
    )
    temperature: float = Field(1.0, gt=0, description="Temperature at which new responses are sampled.")
