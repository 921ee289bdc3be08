"""The term of methods on single labelled responses: a first pass for the step's baseline, then the loss about it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from prefarena.data.plan import BatchPlan
from prefarena.data.responses import of_pairs
from prefarena.data.tables import TokenColumn, read_rows
from prefarena.modeling.logprobs import sequence_logps
from prefarena.objectives.output import ObjectiveOutput
from prefarena.settings.unpaired import Unpaired
from prefarena.training.learner import Learner
from prefarena.training.terms import Rows, Shares, Term
from prefarena.training.worker import Worker


class UnpairedTerm(Term):
    """An unpaired objective on a table of records.REFERENCED_RESPONSES; the module is a `LogProbs`.

    The baseline is a function of the step's rows, which the batch plan decides, and of the weights that the step begins
    with: so a resumed run finds the same one, however many workers and micro-batches there are.
    """

    name = "responses"

    def __init__(self, path: str, method: Unpaired, shares: Shares, pad_id: int, pairs: str | None = None) -> None:
        """pairs: the table that the responses come from; `num_pairs` counts its rows."""
        table = read_rows(path)
        if method.num_pairs is not None and pairs is not None:
            table = of_pairs(table, read_rows(pairs, ["id"], first=method.num_pairs)["id"].to_pylist())
        self.prompts = TokenColumn.of(table, "prompt_ids")
        self._responses = {name: TokenColumn.of(table, f"{name}_ids") for name in ("response", "mismatched")}
        names = ("label", "ref_logp", "ref_mismatched_logp")
        self._numbers = {name: torch.from_numpy(table[name].to_numpy().astype(np.float32)) for name in names}
        lengths = self.prompts.lengths + self._responses["response"].lengths
        super().__init__(shares.plan(lengths, lengths), 1.0, pad_id)
        self.method = method
        self._mismatched = method.baseline_of == "mismatched responses"
        self._baseline: Tensor | None = None

    def num_tokens(self, step: int) -> int:
        """Count the tokens of both passes."""
        return super().num_tokens(step) + int(self._first_plan().sizes[self.plan.rows(step)].sum())

    def begin(self, step: int, learner: Learner, worker: Worker) -> None:
        """The baseline of the step, from sums in float64 over all of its rows."""
        parts = [
            learner.without_gradient(partial(self._sums, rows=rows, device=worker.device))
            for rows in self._first_plan().micro_batches(step, worker.rank)
        ]
        self._baseline = self.method.baseline(worker.sum(torch.stack(parts).sum(0)))

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        logps, reference, labels = self._logps(module, rows, device, "response")
        baseline = logps.new_zeros(()) if self._baseline is None else self._baseline.to(logps.dtype)
        return self.method.mean_loss(logps, reference, labels, baseline)

    def _sums(self, module: nn.Module, *, rows: Rows, device: torch.device) -> Tensor:
        logps, reference, labels = self._logps(module, rows, device, "mismatched" if self._mismatched else "response")
        return self.method.baseline_sums((logps - reference).double(), labels.double())

    def _logps(self, module: nn.Module, rows: Rows, device: torch.device, which: str) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's and the reference's log-probs of these rows' responses, and their labels, all [B]."""
        responses = [[ids] for ids in self._responses[which].take(rows)]
        logps, _ = sequence_logps(module, self.prompts.take(rows), responses, device=device, pad_id=self.pad_id)
        reference = self._number("ref_mismatched_logp" if which == "mismatched" else "ref_logp", rows, device)
        return logps, reference, self._number("label", rows, device)

    def _number(self, name: str, rows: Rows, device: torch.device) -> Tensor:
        """A column of numbers, [B] float32."""
        return self._numbers[name][rows].to(device, non_blocking=True)

    def _first_plan(self) -> BatchPlan:
        """Plan the first pass: the same rows on the same workers, cut into micro-batches by what that pass reads."""
        if not self._mismatched:
            return self.plan
        return replace(self.plan, sizes=self.prompts.lengths + self._responses["mismatched"].lengths)
