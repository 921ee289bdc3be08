"""The terms of an off-policy loss: a table, its batch plan, a weight, and the objective on its rows.

A training run is a weighted sum of terms, each a mean over its own batch: preference pairs, demonstrations (the
forward-KL regulariser), pretraining text. A term knows its count over the whole optimizer step in advance, so
micro-batches and workers can be summed without knowing of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefarena.config import DPO, IPO, MPO, SFT, OffPolicyMethod, Optimisation
from prefarena.data.plan import BatchPlan
from prefarena.data.tables import read_rows
from prefarena.modeling.heads import last_token
from prefarena.modeling.logprobs import Sequences, collate, sequence_logps
from prefarena.objectives import preference
from prefarena.objectives.likelihood import negative_log_likelihood
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.objectives.reward_model import bradley_terry


@dataclass(frozen=True)
class Shares:
    """How batches are cut: sizes and seed of a job, and the number of workers."""

    training: Optimisation
    world_size: int
    seed: int

    def plan(self, lengths: NDArray[np.int64]) -> BatchPlan:
        training = self.training
        return BatchPlan(lengths, training.batch_size, training.micro_batch_size, self.world_size, self.seed)


class Term(ABC):
    """One weighted mean of the loss. `name` prefixes its loss among the metrics."""

    name: str

    def __init__(self, table: pa.Table, lengths: NDArray[np.int64], shares: Shares, weight: float, pad_id: int) -> None:
        self.table = table
        self.lengths = lengths
        self.plan = shares.plan(lengths)
        self.weight = weight
        self.pad_id = pad_id

    def count(self, step: int) -> float:
        """What the loss's sum over the whole step, on all workers, is divided by."""
        return float(self.plan.batch_size)

    def num_tokens(self, step: int) -> int:
        """Tokens that go through the model in the whole step."""
        return int(self.lengths[self.plan.rows(step)].sum())

    def rows(self, indices: NDArray[np.int64]) -> dict[str, list[Any]]:
        return self.table.take(pa.array(indices)).to_pydict()

    @abstractmethod
    def __call__(self, module: nn.Module, rows: dict[str, list[Any]], device: torch.device) -> ObjectiveOutput:
        """Forward pass and objective on a micro-batch."""


class PreferenceTerm(Term):
    """A preference objective on pairs, both responses in one forward pass."""

    name = "preference"

    def __init__(self, path: str, method: OffPolicyMethod, shares: Shares, pad_id: int) -> None:
        table = read_rows(path)
        super().__init__(table, pair_lengths(table), shares, 1.0, pad_id)
        self.method = method

    def __call__(self, module: nn.Module, rows: dict[str, list[Any]], device: torch.device) -> ObjectiveOutput:
        sequences = collate_pairs(rows, self.pad_id).to(device)
        policy = _halves(sequence_logps(module, sequences))
        num_tokens = _halves(sequences.response_lengths.float())
        reference = PairLogps(_column(rows, "ref_chosen_logp", device), _column(rows, "ref_rejected_logp", device))
        return preference_objective(self.method, policy, reference, _column(rows, "label", device), num_tokens)


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
    ) -> None:
        table = read_rows(path)
        lengths = _num_tokens(table, "prompt_ids") + _num_tokens(table, "response_ids")
        super().__init__(table, lengths, shares, weight, pad_id)
        self.mean: Literal["sequences", "tokens"] = mean
        self.loss_on = loss_on
        self.scored = lengths - 1 if loss_on == "all" else _num_tokens(table, "response_ids")

    def count(self, step: int) -> float:
        return float(self.scored[self.plan.rows(step)].sum()) if self.mean == "tokens" else super().count(step)

    def __call__(self, module: nn.Module, rows: dict[str, list[Any]], device: torch.device) -> ObjectiveOutput:
        prompts, responses = rows["prompt_ids"], rows["response_ids"]
        if self.loss_on == "all":
            whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            prompts, responses = [ids[:1] for ids in whole], [ids[1:] for ids in whole]
        sequences = collate(prompts, responses, self.pad_id).to(device)
        logps = sequence_logps(module, sequences)
        return negative_log_likelihood(logps, sequences.response_lengths, mean=self.mean)


class PretrainingTerm(Term):
    """-E[log pi(x)] on plain text, after its first token: the gamma term of any method."""

    name = "pretraining"

    def __init__(self, path: str, shares: Shares, pad_id: int, *, weight: float) -> None:
        table = read_rows(path)
        super().__init__(table, _num_tokens(table, "ids"), shares, weight, pad_id)

    def __call__(self, module: nn.Module, rows: dict[str, list[Any]], device: torch.device) -> ObjectiveOutput:
        ids = rows["ids"]
        sequences = collate([row[:1] for row in ids], [row[1:] for row in ids], self.pad_id).to(device)
        output = negative_log_likelihood(sequence_logps(module, sequences), sequences.response_lengths)
        return ObjectiveOutput(output.loss, {"pretraining/nll": output.metrics["demonstration/nll"]})


class RewardModelTerm(Term):
    """Bradley-Terry on pairs; the module is a `ScalarHead`."""

    name = "reward_model"

    def __init__(self, path: str, shares: Shares, pad_id: int, *, centre_weight: float) -> None:
        table = read_rows(path)
        super().__init__(table, pair_lengths(table), shares, 1.0, pad_id)
        self.centre_weight = centre_weight

    def __call__(self, module: nn.Module, rows: dict[str, list[Any]], device: torch.device) -> ObjectiveOutput:
        sequences = collate_pairs(rows, self.pad_id).to(device)
        scores = _halves(last_token(module(sequences), sequences))
        labels = _column(rows, "label", device)
        return bradley_terry(scores.chosen, scores.rejected, labels, centre_weight=self.centre_weight)


def preference_objective(
    method: OffPolicyMethod, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
) -> ObjectiveOutput:
    """The method's objective with its settings."""
    match method:
        case MPO(beta=beta, length_normalise=normalise):
            return preference.mpo(
                policy,
                reference,
                labels,
                num_tokens,
                beta=beta,
                length_normalise=normalise,
                reference_free=method.reference == "none",
            )
        case DPO(beta=beta, label_smoothing=smoothing, length_normalise=normalise):
            return preference.dpo(
                policy, reference, labels, num_tokens, beta=beta, label_smoothing=smoothing, length_normalise=normalise
            )
        case IPO(tau=tau, length_normalise=normalise):
            return preference.ipo(policy, reference, labels, num_tokens, tau=tau, length_normalise=normalise)
        case SFT():
            return preference.sft(policy, reference, labels, num_tokens)


def collate_pairs(rows: dict[str, list[Any]], pad_id: int) -> Sequences:
    """[2B] sequences: all chosen, then all rejected."""
    return collate(rows["prompt_ids"] * 2, rows["chosen_ids"] + rows["rejected_ids"], pad_id)


def pair_lengths(table: pa.Table) -> NDArray[np.int64]:
    """Tokens [N] of both sequences of a pair."""
    responses = _num_tokens(table, "chosen_ids") + _num_tokens(table, "rejected_ids")
    return 2 * _num_tokens(table, "prompt_ids") + responses


def _num_tokens(table: pa.Table, column: str) -> NDArray[np.int64]:
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def _column(rows: dict[str, list[Any]], name: str, device: torch.device) -> Tensor:
    return torch.tensor(rows[name], dtype=torch.float32, device=device)


def _halves(values: Tensor) -> PairLogps:
    chosen, rejected = values.chunk(2)
    return PairLogps(chosen, rejected)
