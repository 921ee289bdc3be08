"""What every off-policy method is: settings, some of them shared, and a loss of pairs."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps, preference_output
from prefarena.settings.optimisation import Optimisation
from prefarena.settings.section import Section


class OffPolicy(Section):
    """A method that learns from pairs: its settings are fields, its formula is `pair_loss`.

    `prefarena.methods` has one file for each; docs/architecture.md says how one is added.
    """

    #: What of a pair the loss depends on: which response won, or the chosen one alone, whatever the label.
    learns_from: ClassVar[Literal["labelled pairs", "chosen responses"]] = "labelled pairs"

    #: The loss of a pair whose chosen response has won, in TeX, in the notation of docs/methods.md, for its table.
    formula: ClassVar[str] = ""

    if TYPE_CHECKING:

        @property
        def kind(self) -> str:
            """The method's name in a configuration: a field that each method declares, as a literal."""

    demonstration_weight: float = Field(
        0.0, ge=0, description="eta: weight of -E[log pi(y|x)] on demonstrations, the off-policy forward-KL term."
    )
    demonstration_mean: Literal["sequences", "tokens"] = Field(
        "sequences", description="Mean of the demonstration term over sequences (the formula) or over tokens."
    )
    pretraining_weight: float = Field(0.0, ge=0, description="gamma: weight of -E[log pi(x)] on pretraining text.")
    training: Optimisation = Optimisation()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on the reference's log-probs, with these settings. Metrics show them in any case."""
        return True

    def source(self) -> str | None:
        """A hash of code outside the package that the loss is computed by, for the address of stages; None: none is."""
        return None

    def check(self) -> None:
        """Raise UserError for what no single setting shows to be wrong, and that can be found without any work."""

    @abstractmethod
    def pair_loss(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> ObjectiveOutput:
        """The mean loss over pairs and the metrics, from what `objectives/preference.py` describes.

        policy, reference: log-probs of both responses, nats a sequence. labels: P(chosen > rejected), [B]. num_tokens:
        of both responses.
        """


class OrderedLoss(OffPolicy):
    """A method whose paper gives the loss of an ordering. A soft label weighs both: p l(w, l) + (1 - p) l(l, w)."""

    @abstractmethod
    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        """(losses, h), both [B], where the chosen response has won; h is what the metrics call the margin."""

    def pair_loss(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> ObjectiveOutput:
        as_given, h = self.losses(policy, reference, num_tokens)
        turned_round, _ = self.losses(policy.swapped, reference.swapped, num_tokens.swapped)
        return preference_output(labels * as_given + (1 - labels) * turned_round, h, policy, reference, labels)
