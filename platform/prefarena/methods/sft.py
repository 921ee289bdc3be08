"""SFT on the chosen responses: what is gained without any preference being learnt."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps, preference_output
from prefarena.settings.off_policy import OffPolicy


class SFT(OffPolicy):
    """Supervised fine-tuning on the chosen responses.

    -E[log pi(y_w|x)], a mean over sequences.
    """

    learns_from: ClassVar[Literal["labelled pairs", "chosen responses"]] = "chosen responses"
    formula: ClassVar[str] = r"-\ell_w"
    kind: Literal["sft"] = "sft"

    @property
    def needs_reference(self) -> bool:
        return False

    def pair_loss(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> ObjectiveOutput:
        return preference_output(-policy.chosen, policy.margin, policy, reference, labels)
