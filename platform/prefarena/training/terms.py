"""The terms of an off-policy loss: a table, its batch plan, a weight, and the objective on its rows.

A training run is a weighted sum of terms, each a mean over its own batch: preference pairs, demonstrations (the
forward-KL regulariser), pretraining text. A term knows its count over the whole optimizer step in advance, so
micro-batches and workers can be summed without knowing of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefarena.config import Optimisation
from prefarena.data.plan import LARGEST_PASS, BatchPlan
from prefarena.data.tables import TokenColumn, read_rows
from prefarena.modeling.logprobs import can_pack, sequence_logps
from prefarena.modeling.packing import PackedBatch, pack
from prefarena.objectives.likelihood import negative_log_likelihood
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.objectives.reward_model import bradley_terry
from prefarena.records import PAIR_SCORES
from prefarena.settings.off_policy import OffPolicy, Pairwise

if TYPE_CHECKING:
    from prefarena.training.jobs import Regulariser
    from prefarena.training.learner import Learner
    from prefarena.training.worker import Worker

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """How batches are split: sizes and seed of a job, the number of workers, and whether pairs share their prompt."""

    training: Optimisation
    world_size: int
    seed: int
    packed: bool = True

    def plan(self, lengths: Rows, sizes: Rows) -> BatchPlan:
        training = self.training
        tokens = (
            LARGEST_PASS if training.micro_batch_tokens == "auto" else training.micro_batch_tokens
        )  # before it fits
        return BatchPlan(lengths, sizes, training.batch_size, tokens, self.world_size, self.seed)


class Term(ABC):
    """One weighted mean of the loss. `name` prefixes its loss among the metrics."""

    name: str

    def __init__(self, plan: BatchPlan, weight: float, pad_id: int) -> None:
        self.plan = plan
        self.weight = weight
        self.pad_id = pad_id

    def count(self, step: int) -> float:
        """The count that the loss's sum over the whole step, on all workers, is divided by."""
        return float(self.plan.batch_size)

    def num_tokens(self, step: int) -> int:
        """Tokens that go through the model in the whole step."""
        return int(self.plan.sizes[self.plan.rows(step)].sum())

    def num_models_beside(self) -> int:
        """Frozen models of about the policy's size that the term will hold in addition to the one in training."""
        return 0

    def begin(self, step: int, learner: Learner, worker: Worker) -> None:  # noqa: B027 - most have nothing to do
        """Compute what the loss needs to know about the whole step, on all workers, before its first gradient."""

    @abstractmethod
    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        """Forward pass and objective on a micro-batch."""


class Pairs:
    """A table of pairs from which batches are taken."""

    def __init__(
        self,
        rows: str | pa.Table,
        *,
        referenced: bool = True,
        shared: bool = False,
        needs_scores: bool = False,
        first: int | None = None,
    ) -> None:
        """rows: a table, or where it is. referenced, shared: whether it is one of REFERENCED_PAIRS or SHARED_PAIRS.

        first: read at most this many rows.
        """
        table = read_rows(rows, first=first) if isinstance(rows, str) else rows
        self.prompts = TokenColumn.of(table, "prompt_ids")
        self.chosen = TokenColumn.of(table, "chosen_ids")
        self.rejected = TokenColumn.of(table, "rejected_ids")
        names = ["label", *(["ref_chosen_logp", "ref_rejected_logp"] if referenced else [])]
        names += ["ref_chosen_shared_logp", "ref_rejected_shared_logp"] if shared else []
        self._numbers = {name: torch.from_numpy(table[name].to_numpy().astype(np.float32)) for name in names}
        if needs_scores:  # subtracted in float64: scores may be large, and near to each other
            chosen, rejected = (table[name].to_numpy().astype(np.float64) for name in PAIR_SCORES)
            self._numbers["score_gap"] = torch.from_numpy(chosen - rejected)

    def responses(self, rows: Rows) -> list[list[NDArray[np.int32]]]:
        """Both responses of each pair, chosen and rejected."""
        return [list(pair) for pair in zip(self.chosen.take(rows), self.rejected.take(rows), strict=True)]

    def numbers(self, name: str, rows: Rows, device: torch.device) -> Tensor:
        """A column of numbers, [B] float32; `score_gap`, score of chosen - score of rejected, in float64."""
        return self._numbers[name][rows].to(device, non_blocking=True)

    def plan(self, shares: Shares) -> BatchPlan:
        """The batch plan, sorted by the tokens of both sequences; the tokens of a shared prompt count once."""
        responses = self.chosen.lengths + self.rejected.lengths
        lengths = 2 * self.prompts.lengths + responses
        return shares.plan(lengths, self.prompts.lengths + responses if shares.packed else lengths)


class PairsTerm(Term):
    """An objective on pairs that have the reference's log-probs; the module is a `LogProbs`."""

    name = "preference"

    def __init__(self, pairs: Pairs, method: OffPolicy, shares: Shares, pad_id: int) -> None:
        self.pairs = pairs
        super().__init__(pairs.plan(shares), 1.0, pad_id)
        self.method = method

    def logps(self, module: nn.Module, rows: Rows, device: torch.device) -> PairLogps:
        """The policy's log-probs of both responses."""
        values, batch = self.token_logps(module, rows, device)
        return _pairs(batch.sums(values))

    def token_logps(self, module: nn.Module, rows: Rows, device: torch.device) -> tuple[Tensor, PackedBatch]:
        """The policy's log-probs of every token of both responses, [M], and the batch."""
        prompts, responses = self.pairs.prompts.take(rows), self.pairs.responses(rows)
        batch = pack(prompts, responses, shared=can_pack(module), device=device, pad_id=self.pad_id)
        return module(batch)[0], batch

    def labels(self, rows: Rows, device: torch.device) -> Tensor:
        """The labels P(chosen > rejected), [B]."""
        return self.pairs.numbers("label", rows, device)

    def reference(self, rows: Rows, device: torch.device, kind: str = "") -> PairLogps:
        """The reference's log-probs of both responses; kind: `_shared` for those of their first tokens."""
        names = (f"ref_{side}{kind}_logp" for side in ("chosen", "rejected"))
        return PairLogps(*(self.pairs.numbers(name, rows, device) for name in names))


class PreferenceTerm(PairsTerm):
    """A preference objective whose loss is a mean over pairs."""

    method: Pairwise

    def __init__(self, rows: str | pa.Table, method: Pairwise, shares: Shares, pad_id: int) -> None:
        super().__init__(self.table(rows, method), method, shares, pad_id)

    @staticmethod
    def table(rows: str | pa.Table, method: Pairwise) -> Pairs:
        """The rows with what the method reads of them."""
        needs_scores, first = method.needs_scores, method.num_pairs
        return Pairs(rows, shared=method.needs_shared, needs_scores=needs_scores, first=first)

    def origin(self, num_steps: int) -> dict[str, Any]:
        """Labels and age of the pairs that so many steps are trained on, for the manifest.

        num_data_labels: different pairs of the table. mean_age: in steps, as if the reference had generated all of
        them.
        """
        trained = num_steps * self.plan.batch_size
        labels = min(trained, len(self.plan.lengths))  # every epoch uses each row once
        return {"num_pairs_trained": trained, "num_data_labels": labels, "mean_age": (num_steps - 1) / 2}

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        values, batch = self.token_logps(module, rows, device)
        reference, labels, shared = self.reference(rows, device), self.labels(rows, device), None
        if self.method.needs_shared:
            shorter = batch.lengths.view(-1, 2).amin(1).repeat_interleave(2)
            shared = _pairs(batch.first_sums(values, shorter)), self.reference(rows, device, "_shared")
        gaps = self.pairs.numbers("score_gap", rows, device) if self.method.needs_scores else None
        return self.method.mean_loss(
            _pairs(batch.sums(values)), reference, labels, _pairs(batch.lengths.float()), shared, gaps
        )


class LikelihoodTerm(Term):
    """Mean negative log-likelihood of responses: SFT of the reference, and the eta term of any method."""

    name = "demonstration"

    def __init__(
        self,
        path: str,
        shares: Shares,
        pad_id: int,
        *,
        weight: float = 1.0,
        mean: Literal["sequences", "tokens"] = "sequences",
        loss_on: Literal["response", "all"] = "response",
        first: int | None = None,
    ) -> None:
        """path: a table of responses, or of pairs, whose chosen responses are taken. first: how many rows are used."""
        table = read_rows(path, first=first)
        response = "response_ids" if "response_ids" in table.column_names else "chosen_ids"
        self.prompts, self.responses = TokenColumn.of(table, "prompt_ids"), TokenColumn.of(table, response)
        lengths = self.prompts.lengths + self.responses.lengths
        super().__init__(shares.plan(lengths, lengths), weight, pad_id)
        self.mean: Literal["sequences", "tokens"] = mean
        self.loss_on = loss_on
        self.scored = lengths - 1 if loss_on == "all" else self.responses.lengths

    def count(self, step: int) -> float:
        return float(self.scored[self.plan.rows(step)].sum()) if self.mean == "tokens" else super().count(step)

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        prompts, responses = self.prompts.take(rows), self.responses.take(rows)
        if self.loss_on == "all":
            whole = [np.concatenate(both) for both in zip(prompts, responses, strict=True)]
            prompts, responses = [ids[:1] for ids in whole], [ids[1:] for ids in whole]
        logps, batch = sequence_logps(module, prompts, [[ids] for ids in responses], device=device, pad_id=self.pad_id)
        return negative_log_likelihood(logps, batch.lengths, mean=self.mean)


class PretrainingTerm(Term):
    """-E[log pi(x)] on plain text, after its first token: the gamma term of any method."""

    name = "pretraining"

    def __init__(self, path: str, shares: Shares, pad_id: int, *, weight: float) -> None:
        self.texts = TokenColumn.of(read_rows(path), "ids")
        super().__init__(shares.plan(self.texts.lengths, self.texts.lengths), weight, pad_id)

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        texts = self.texts.take(rows)
        logps, batch = sequence_logps(
            module, [ids[:1] for ids in texts], [[ids[1:]] for ids in texts], device=device, pad_id=self.pad_id
        )
        output = negative_log_likelihood(logps, batch.lengths)
        return ObjectiveOutput(output.loss, {"pretraining/nll": output.metrics["demonstration/nll"]})


def regularising(regulariser: Regulariser, shares: Shares, pad_id: int) -> list[Term]:
    """The eta and gamma terms that are active."""
    terms: list[Term] = []
    if regulariser.demonstrations is not None and regulariser.demonstration_weight > 0:
        weight, mean = regulariser.demonstration_weight, regulariser.demonstration_mean
        first = regulariser.num_demonstrations
        terms.append(LikelihoodTerm(regulariser.demonstrations, shares, pad_id, weight=weight, mean=mean, first=first))
    if regulariser.pretraining is not None and regulariser.pretraining_weight > 0:
        weight = regulariser.pretraining_weight
        terms.append(PretrainingTerm(regulariser.pretraining, shares, pad_id, weight=weight))
    return terms


class RewardModelTerm(Term):
    """Bradley-Terry on pairs; the module is a `ScalarHead`."""

    name = "reward_model"

    def __init__(
        self, path: str, shares: Shares, pad_id: int, *, centre_weight: float, num_pairs: int | None = None
    ) -> None:
        self.pairs = Pairs(path, referenced=False, first=num_pairs)
        super().__init__(self.pairs.plan(shares), 1.0, pad_id)
        self.centre_weight = centre_weight

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        scores = pair_scores(module, self.pairs, rows, device, self.pad_id)
        labels = self.pairs.numbers("label", rows, device)
        return bradley_terry(scores.chosen, scores.rejected, labels, centre_weight=self.centre_weight)


def pair_scores(head: nn.Module, pairs: Pairs, rows: Rows, device: torch.device, pad_id: int) -> PairLogps:
    """Raw scores of both responses of these pairs, in one pass of a `ScalarHead`."""
    prompts, responses = pairs.prompts.take(rows), pairs.responses(rows)
    return _pairs(head(pack(prompts, responses, shared=can_pack(head), device=device, pad_id=pad_id)))


def _pairs(values: Tensor) -> PairLogps:
    """Split [2B], in which chosen and rejected alternate, into both halves."""
    return PairLogps(values[0::2], values[1::2])
