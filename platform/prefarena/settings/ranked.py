"""What off-policy methods on the ranks of pairs have in common: a loss that knows the whole optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps, preference_output
from prefarena.objectives.transport import met, shares
from prefarena.settings.off_policy import LearnsFrom, OffPolicy


@dataclass(frozen=True)
class StepPairs:
    """The pairs of a whole optimizer step, of all workers, [S] each, float64 and without gradients.

    counts: how often a pair is in the step, which may be more than once where an epoch ends.
    """

    policy: PairLogps
    reference: PairLogps
    labels: Tensor
    counts: Tensor


class Ranked(OffPolicy):
    """A method that wants one number of the pairs to exceed another in distribution, not pair by pair.

    Both are sorted over the optimizer step, and the loss is a mean over what meets at equal ranks. Who meets whom is
    found in a first pass, without gradients, over all micro-batches and workers; then the loss of a pair is a function
    of its own log-probs and of constants, and its gradient that of the loss of the whole step: an order of unequal
    numbers has no derivative.

    A soft label p makes two of a pair: as given, of weight p, and turned round, of weight 1 - p. It is the limit of a
    step that holds every pair many times, p of them as given.
    """

    learns_from: ClassVar[LearnsFrom] = "ranks of labelled pairs"

    @property
    def needs_reference(self) -> bool:
        return True

    @abstractmethod
    def better(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """What is to be the larger one, [B], of pairs whose chosen response has won."""

    @abstractmethod
    def worse(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """What is to be the smaller one, [B], of pairs whose chosen response has won."""

    @abstractmethod
    def margins(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """h [B], what the metrics call the margin of a pair."""

    @abstractmethod
    def cost(self, gap: Tensor) -> Tensor:
        """The loss where `better` exceeds by `gap` what it meets, in any shape."""

    def mean_loss(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, step: StepPairs, places: Tensor
    ) -> ObjectiveOutput:
        """The mean over pairs, and the metrics. labels: P(chosen > rejected), [B]. places: of these pairs in `step`."""
        losses = self._losses(policy, reference, step, places)
        return preference_output(losses, self.margins(policy, reference), policy, reference, labels)

    def _losses(self, policy: PairLogps, reference: PairLogps, step: StepPairs, places: Tensor) -> Tensor:
        """[B]. Every meeting is seen from both sides, each with a gradient by its own, and is worth half on each.

        Computed in float64: numbers of whole responses are sorted, and subtracted from others of their size.
        """
        one, other = self._atoms(policy.double(), reference.double())
        all_one, all_other = self._atoms(step.policy, step.reference)
        weights = step.counts[:, None] * torch.stack([step.labels, 1 - step.labels], 1)
        lie, others_lie = shares(all_one.flatten(), weights.flatten()), shares(all_other.flatten(), weights.flatten())
        own = torch.stack([2 * places, 2 * places + 1], 1).flatten()
        seen = [
            (mass * self.cost(gap)).sum(1).view(-1, 2).sum(1) / step.counts[places]
            for mass, gap in (
                (met(_of(lie, own), others_lie), one.flatten()[:, None] - all_other.flatten()),
                (met(_of(others_lie, own), lie), all_one.flatten() - other.flatten()[:, None]),
            )
        ]
        both = seen[0] + seen[1]
        return (both - both.detach() / 2).to(policy.chosen.dtype)

    def _atoms(self, policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        """What is to be larger and what smaller, [B, 2]: of each pair as given and turned round."""
        turned = policy.swapped, reference.swapped
        better = torch.stack([self.better(policy, reference), self.better(*turned)], 1)
        return better, torch.stack([self.worse(policy, reference), self.worse(*turned)], 1)


def _of(lie: tuple[Tensor, Tensor], atoms: Tensor) -> tuple[Tensor, Tensor]:
    return lie[0][atoms], lie[1][atoms]
