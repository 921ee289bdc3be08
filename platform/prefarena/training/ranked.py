"""The term of methods on the ranks of pairs: a first pass for the log-probs of the whole step, then the loss."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.settings.ranked import Ranked, StepPairs
from prefarena.training.learner import Learner
from prefarena.training.terms import Pairs, PairsTerm, Rows, Shares
from prefarena.training.worker import Worker


class RankedTerm(PairsTerm):
    """A ranked objective on pairs; the module is a `LogProbs`.

    What the first pass finds is a function of the step's rows, which the batch plan decides, and of the weights that
    the step begins with: so a resumed run finds the same, however many workers and micro-batches there are.
    """

    method: Ranked
    #: Of the step that has begun; a pass that belongs to none, as when memory is predicted, is a step of its own.
    _step: tuple[Rows, StepPairs] | None = None

    def __init__(self, path: str, method: Ranked, shares: Shares, pad_id: int) -> None:
        super().__init__(Pairs(path, first=method.num_pairs), method, shares, pad_id)

    def num_tokens(self, step: int) -> int:
        """Count the tokens of both passes."""
        return 2 * super().num_tokens(step)

    def begin(self, step: int, learner: Learner, worker: Worker) -> None:
        """Compute every pair's log-probs in float64; each pair's come from one worker, and are zero on the others."""
        rows, counts = np.unique(self.plan.rows(step), return_counts=True)
        sums = torch.zeros(3, len(rows), dtype=torch.float64, device=worker.device)
        for part in self.plan.micro_batches(step, worker.rank):
            logps = learner.without_gradient(partial(self._both, rows=part, device=worker.device)).double()
            places = torch.from_numpy(np.searchsorted(rows, part)).to(worker.device)
            for row, values in zip(sums, (*logps, torch.ones_like(logps[0])), strict=True):
                row.index_add_(0, places, values)
        sums = worker.sum(sums)
        chosen, rejected = sums[:2] / sums[2]
        reference, labels = self.reference(rows, worker.device), self.labels(rows, worker.device)
        own = torch.from_numpy(counts).to(worker.device, torch.float64)
        self._step = rows, StepPairs(PairLogps(chosen, rejected), reference.double(), labels.double(), own)

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        policy = self.logps(module, rows, device)
        reference, labels = self.reference(rows, device), self.labels(rows, device)
        if self._step is None:
            known, doubled = PairLogps(policy.chosen.detach(), policy.rejected.detach()), labels.double()
            alone = StepPairs(known.double(), reference.double(), doubled, torch.ones_like(doubled))
            places = torch.arange(len(rows), device=device)
            return self.method.mean_loss(policy, reference, labels, alone, places)
        every, step = self._step
        places = torch.from_numpy(np.searchsorted(every, rows)).to(device)
        return self.method.mean_loss(policy, reference, labels, step, places)

    def _both(self, module: nn.Module, *, rows: Rows, device: torch.device) -> Tensor:
        """The policy's log-probs of both responses, [2, B]."""
        policy = self.logps(module, rows, device)
        return torch.stack([policy.chosen, policy.rejected])
