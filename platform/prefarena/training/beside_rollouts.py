"""Data that an on-policy policy learns from besides its rollouts: the eta and gamma terms of off-policy losses.

InstructGPT mixes the gradient of pretraining text into each of PPO's steps (PPO-ptx, arXiv 2203.02155, equation 2);
here the forward-KL term on demonstrations can be mixed in, too, so that methods of both kinds have the same ones.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from prefarena.objectives.output import ObjectiveOutput
from prefarena.settings.optimisation import Optimisation
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.learner import Pass
from prefarena.training.terms import Rows, Shares, Term, regularising
from prefarena.training.worker import Worker


class BesideRollouts:
    """The eta and gamma terms of a job; each draws as many rows in an optimizer step as there are rollouts in it.

    Which rows make up a step is a function of its number and the job's seed, as in off-policy training.
    """

    def __init__(self, job: OnPolicyJob, worker: Worker, pad_id: int, *, packed: bool, pass_tokens: int) -> None:
        """packed: whether the policy's rows can be packed. pass_tokens: most tokens of a pass, as for rollouts."""
        settings = job.training
        self._worker, self._per_epoch = worker, settings.num_minibatches
        self._per_iteration = settings.num_epochs * settings.num_minibatches
        rows = settings.rollouts_per_iteration // settings.num_minibatches
        cut = Optimisation(batch_size=rows, micro_batch_tokens=pass_tokens)
        self.terms = regularising(job.regulariser, Shares(cut, worker.world_size, job.seed, packed), pad_id)

    def passes(self, iteration: int, epoch: int, minibatch: int) -> list[Pass]:
        """This worker's passes in an optimizer step of the policy; empty where no term is active."""
        step = self.step(iteration, epoch, minibatch)
        return [
            Pass(partial(_of_rows, term=term, rows=rows, device=self._worker.device), term.weight / term.count(step))
            for term in self.terms
            for rows in term.plan.micro_batches(step, self._worker.rank)
        ]

    def step(self, iteration: int, epoch: int, minibatch: int) -> int:
        """The number of an optimizer step, counted through the whole training."""
        return iteration * self._per_iteration + epoch * self._per_epoch + minibatch

    def num_tokens(self, iteration: int) -> int:
        """Tokens that go through the policy in all steps of an iteration, summed over all workers."""
        first = self.step(iteration, 0, 0)
        return sum(term.num_tokens(step) for term in self.terms for step in range(first, first + self._per_iteration))


def _of_rows(module: nn.Module, *, term: Term, rows: Rows, device: torch.device) -> ObjectiveOutput:
    return term(module, rows, device)
