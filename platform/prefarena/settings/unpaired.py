"""What off-policy methods on single labelled responses have in common: a loss about a baseline of the whole step."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.responses import response_output
from prefarena.settings.off_policy import LearnsFrom, OffPolicy


class Unpaired(OffPolicy):
    """A method whose loss is a mean over single responses, each desirable or not, held against a baseline.

    The baseline is one number for the whole optimizer step, of all micro-batches and workers. So it is found in a first
    pass, without gradients, from sums that can be added up; the loss takes it as a constant.
    """

    learns_from: ClassVar[LearnsFrom] = "labelled responses"

    #: What the first pass goes over: the step's responses themselves, or each prompt with another prompt's response.
    baseline_of: ClassVar[Literal["responses", "mismatched responses"]] = "responses"

    @property
    def needs_reference(self) -> bool:
        return True

    @abstractmethod
    def baseline_sums(self, ratio: Tensor, labels: Tensor) -> Tensor:
        """Sums [K] over responses, from log-ratios to the reference and labels [B]; K is the method's."""

    @abstractmethod
    def baseline(self, sums: Tensor) -> Tensor:
        """The baseline [] from the sums [K] of the whole optimizer step."""

    @abstractmethod
    def response_losses(self, ratio: Tensor, labels: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        """(losses, h), both [B]. ratio: log pi - log pi_ref, nats per sequence. labels: P(desirable). baseline: []."""

    def mean_loss(self, policy: Tensor, reference: Tensor, labels: Tensor, baseline: Tensor) -> ObjectiveOutput:
        """The mean over responses, and the metrics. policy, reference: log-probs, nats per sequence, [B]."""
        ratio = policy - reference
        losses, h = self.response_losses(ratio, labels, baseline)
        return response_output(losses, h, policy, ratio, labels, baseline)
