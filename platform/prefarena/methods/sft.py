"""SFT on the chosen responses: what is gained without any preference being learnt."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import LearnsFrom, Pairwise


class SFT(Pairwise):
    """Supervised fine-tuning on the chosen responses.

    -E[log pi(y_w|x)], a mean over sequences.
    """

    learns_from: ClassVar[LearnsFrom] = "chosen responses"
    formula: ClassVar[str] = r"-\ell_w"
    kind: Literal["sft"] = "sft"

    @property
    def needs_reference(self) -> bool:
        return False

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        return -policy.chosen, policy.margin
