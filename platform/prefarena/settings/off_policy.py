"""What every off-policy method is, settings and a loss, and what those that learn from pairs have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from prefarena.objectives.output import Mean, ObjectiveOutput, mean_of
from prefarena.objectives.preference import (
    PairLogps,
    desensitised,
    likelihood_weights,
    preference_output,
    ratio_weights,
)
from prefarena.settings.online import Online
from prefarena.settings.optimisation import Optimisation
from prefarena.settings.regularisers import DEMONSTRATION_SOURCE, DemonstrationSource
from prefarena.settings.search import Space, around, proposed
from prefarena.settings.section import Section, is_none

LearnsFrom = Literal["labelled pairs", "ranks of labelled pairs", "chosen responses", "labelled responses"]


class OffPolicy(Section):
    """A method that learns from a fixed table: its settings are fields, its formula is a method of its base below.

    `prefarena.methods` has one file for each; docs/architecture.md says how one is added.
    """

    #: What the loss depends on: which response of a pair won, also in comparison with other pairs, its chosen one alone
    #: whatever the label, or single responses that are desirable or not.
    learns_from: ClassVar[LearnsFrom] = "labelled pairs"

    #: The loss of a pair whose chosen response has won, in TeX, in the notation of docs/methods.md, for its table.
    formula: ClassVar[str] = ""

    #: Settings that are not in a stage's address while they have their defaults: it is older than they are.
    _added: ClassVar[frozenset[str]] = frozenset()

    #: The strengths that `prefarena tune` searches: numbers, of which those above 0 are at work.
    searched: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:

        @property
        def kind(self) -> str:
            """The method's name in a configuration: a field that each method declares, as a literal."""

    demonstration_weight: float = Field(
        0.0, ge=0, description="eta: weight of -E[log pi(y|x)] on demonstrations, the off-policy forward-KL term."
    )
    demonstration_mean: Literal["sequences", "tokens"] = Field(
        "sequences",
        description="Whether the demonstration term is a mean over sequences (as in the formula) or over tokens.",
    )
    demonstration_source: DemonstrationSource = DEMONSTRATION_SOURCE
    pretraining_weight: float = Field(0.0, ge=0, description="gamma: weight of -E[log pi(x)] on pretraining text.")
    num_pairs: int | None = Field(
        None,
        ge=1,
        exclude_if=is_none,
        description="Labelled pairs that it learns from, a random subset that is within that of any larger number; "
        "none: all.",
    )
    training: Optimisation = Optimisation()

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether the loss of a pair, before any weight, depends on the reference's log-probs, with these settings.

        Metrics show them in any case.
        """

    @model_validator(mode="before")
    @classmethod
    def _pairs_alone_are_drawn(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("online") is not None and "online" not in cls.model_fields:
            raise ValueError(f"online draws labelled pairs, but {cls._named()}; leave it out")
        return given

    @classmethod
    def _named(cls) -> str:
        return f"{cls.model_fields['kind'].default} learns from {cls.learns_from}"

    def address(self) -> dict[str, Any]:
        """What results depend on, for the address of stages: settings, and code outside the package."""
        fields = type(self).model_fields
        as_ever = {name for name in self._added if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude=as_ever)

    def search_space(self) -> Space:
        """What `prefarena tune` searches unless it is told otherwise: a factor to either side of what is configured.

        Strengths, which decide how far the policy goes, by ten; the learning rate by five; how long it trains by two.
        """
        strengths = proposed(self, dict.fromkeys([*self.searched, "demonstration_weight"]), 10)
        training = self.training
        lasts = {"training.num_epochs": around(training.num_epochs, 2)}
        if training.num_steps is not None:
            lasts = {"training.num_steps": around(training.num_steps, 2, integer=True)}
        return {**strengths, "training.learning_rate": around(training.learning_rate, 5), **lasts}

    def check(self) -> None:
        """Raise UserError for what no single setting shows to be wrong, and that can be found without any work."""


class Pairwise(OffPolicy):
    """A method whose loss is a mean over pairs, each pair's a function of its own log-probs."""

    pair_weight: Literal["none", "likelihood", "ratio"] = Field(
        "none",
        description="What each pair's loss is multiplied by: the policy's likelihood of both responses, per token "
        "(likelihood; WPO, arXiv 2406.11827), or the ratio of the policy's to the reference's (ratio; arXiv "
        "2506.08681).",
    )
    max_log_ratio: float = Field(
        2.0,
        gt=0,
        description="With pair_weight: ratio, the log-ratio of both responses together, in nats, at which it is "
        "clipped.",
    )

    tail_weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Weight of the tokens by which a response is longer than the other one (alpha of LD-DPO, arXiv "
        "2409.06411).",
    )

    online: Online | None = Field(
        None,
        description="Replace the data's pairs, every so many steps, by new ones from the policy itself (every, reward, "
        "temperature); by default all pairs are the data's.",
    )
    replay: str | None = Field(
        None,
        description="Name of an entry that is online; the pairs that it was trained on, shuffled, take the place of "
        "the data's.",
    )

    #: Whether the loss depends on how much better the winner is, by scores of both responses, which pairs then need.
    needs_scores: ClassVar[bool] = False

    _added: ClassVar[frozenset[str]] = frozenset({"pair_weight", "max_log_ratio", "tail_weight", "online", "replay"})

    @model_validator(mode="after")
    def _pairs_are_there_before(self) -> Pairwise:
        own = {
            "online": self.online is not None,
            "tail_weight": self.needs_shared,
            "num_pairs": self.num_pairs is not None,
        }
        if self.replay is not None and any(own.values()):
            wrong = next(name for name, is_set in own.items() if is_set)
            raise ValueError(
                f"replay uses the pairs that another entry was trained on, and cannot be combined with {wrong}"
            )
        return self

    @property
    def needs_shared(self) -> bool:
        """Whether the loss depends on the log-probs of the first tokens by themselves, up to the shorter's length."""
        return self.tail_weight < 1

    @property
    def needs_reference(self) -> bool:
        return True

    @abstractmethod
    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        """(losses, h), both [B], from what `objectives/preference.py` describes; h is what metrics call the margin.

        policy, reference: log-probs of both responses, nats per sequence. labels: P(chosen > rejected), [B].
        num_tokens: of both responses.
        """

    def mean_loss(
        self,
        policy: PairLogps,
        reference: PairLogps,
        labels: Tensor,
        num_tokens: PairLogps,
        shared: tuple[PairLogps, PairLogps] | None = None,
        gaps: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The mean over pairs, weighted where `pair_weight` says so, and the metrics.

        shared: the policy's and the reference's log-probs of as many first tokens as the shorter response has, where
        `needs_shared`. Weights and metrics are of whole responses. gaps: score of chosen - score of rejected, [B]
        float64, where `needs_scores`.
        """
        seen = policy, reference
        if self.needs_shared:
            if shared is None:
                raise TypeError("tail_weight needs the log-probs of the first tokens by themselves")
            seen = (
                desensitised(policy, shared[0], self.tail_weight),
                desensitised(reference, shared[1], self.tail_weight),
            )
        losses, h = self._losses(*seen, labels, num_tokens, gaps)
        own = self._metrics(gaps)
        if self.pair_weight != "none":
            weights = self._weights(policy, reference, num_tokens)
            losses, own = weights * losses, own | {"preference/weight": mean_of(weights)}
        output = preference_output(losses, h, policy, reference, labels)
        return ObjectiveOutput(output.loss, output.metrics | own)

    def _weights(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> Tensor:
        if self.pair_weight == "likelihood":
            return likelihood_weights(policy, num_tokens)
        return ratio_weights(policy, reference, self.max_log_ratio)

    def _losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps, gaps: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.pair_losses(policy, reference, labels, num_tokens)

    def _metrics(self, gaps: Tensor | None) -> dict[str, Mean]:
        """The method's own metrics, in addition to those that all share."""
        return {}


class OrderedLoss(Pairwise):
    """A method whose paper gives the loss of an ordering. A soft label weighs both: p l(w, l) + (1 - p) l(l, w)."""

    @abstractmethod
    def losses(self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps) -> tuple[Tensor, Tensor]:
        """(losses, h), both [B], where the chosen response has won; h is what the metrics call the margin."""

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        as_given, h = self.losses(policy, reference, num_tokens)
        turned_round, _ = self.losses(policy.swapped, reference.swapped, num_tokens.swapped)
        return labels * as_given + (1 - labels) * turned_round, h


class OffsetLoss(Pairwise):
    """A method whose loss of an ordering also depends on an offset, found from the gap between both responses' scores.

    A soft label weighs both orderings, and each has the offset of its own gap: p l(w, l, d) + (1 - p) l(l, w, -d).
    """

    needs_scores: ClassVar[bool] = True

    @abstractmethod
    def offsets(self, gaps: Tensor) -> Tensor:
        """[B] float64, from winner's score - loser's score, [B] float64; -inf: the ordering costs nothing."""

    @abstractmethod
    def losses(
        self, policy: PairLogps, reference: PairLogps, num_tokens: PairLogps, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(losses, h), both [B], where the chosen response has won; h is what the metrics call the margin."""

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{self.kind} needs the scores of both responses")

    def _losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps, gaps: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if gaps is None:
            return self.pair_losses(policy, reference, labels, num_tokens)
        own, other = (self.offsets(of).to(policy.chosen.dtype) for of in (gaps, -gaps))
        as_given, h = self.losses(policy, reference, num_tokens, own)
        turned_round, _ = self.losses(policy.swapped, reference.swapped, num_tokens.swapped, other)
        return labels * as_given + (1 - labels) * turned_round, h

    def _metrics(self, gaps: Tensor | None) -> dict[str, Mean]:
        if gaps is None:
            return {}
        offsets = self.offsets(gaps)
        has_one = torch.isfinite(offsets)
        return {"preference/offset": mean_of(offsets, has_one), "preference/left_out": mean_of((~has_one).double())}
