"""A policy in training as the generators see it: weights of a named version, which they get before they are asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor

from prefarena.config import Generation
from prefarena.generation.interface import (
    GeneratorLostError,
    Pending,
    RolloutSource,
    Sleeps,
    StaleWeightsError,
    TakesLayers,
    TransferLostError,
)
from prefarena.records import Rollout
from prefarena.training.worker import Worker

#: Generators may be restarted while they are asked; each time they come back without weights.
_MAX_RESTARTS = 3


class HasWeights(Protocol):
    """The policy, as generators get it."""

    @property
    def changing(self) -> frozenset[str] | None:
        """The names of the weights that training changes; None: all of them."""

    def weights(self, *, names: Collection[str] | None = None) -> Iterable[tuple[str, Tensor]]:
        """Whole weights by name, only `names` or all; every worker iterates over them at the same time."""


class PolicySource:
    """Generators that hold the weights of a named version of a job's policy: `JOB@NUMBER`.

    The number counts what the job does: its iterations, or its steps. Where adapters are trained, the layers that they
    change are sent alone, once the generators hold the others.
    """

    def __init__(
        self, name: str, generation: Generation, worker: Worker, source: RolloutSource, policy: HasWeights
    ) -> None:
        self._name, self._generation, self._worker = name, generation, worker
        self.source, self._policy = source, policy
        self._sent: str | None = None  # the version that was pushed last

    def version(self, number: int) -> str:
        """The name of the weights that the iteration, or the step, of this number starts with."""
        return f"{self._name}@{number}"

    def push(self, number: int) -> None:
        """Send the generators the current policy; no worker continues before they have it.

        Where one is lost on the way all of it is sent again: every worker takes part, as the tensors are gathered anew.
        """
        self._barrier()  # a slower worker may still wait for rollouts of the weights that the source holds
        for _ in range(_MAX_RESTARTS + 1):
            if not self._worker.on_any(not self._send(number)):
                self._sent = self.version(number)
                return
        told = f"weights {self.version(number)!r} were sent {_MAX_RESTARTS + 1} times"
        raise GeneratorLostError(f"{told}, and each time a generator was lost on the way")

    def _send(self, number: int) -> bool:
        """Send once; whether no generator was lost on the way, as far as this worker knows."""
        names = self._changed()
        weights, version = self._policy.weights(names=names), self.version(number)
        if self._worker.rank != 0:
            deque(weights, maxlen=0)  # a sharded model's are gathered tensor by tensor, which takes every worker
            return True
        try:
            if names is not None and isinstance(self.source, TakesLayers):
                self.source.sync(weights, version, since=self._sent)
            else:
                self.source.sync(weights, version)
        except TransferLostError:  # of which the source has told
            return False
        return True

    def _changed(self) -> frozenset[str] | None:
        """The weights to be sent; None means all. Every worker decides the same, and takes part in gathering them."""
        changing, names = self._policy.changing, None
        if changing is None or self._sent is None:
            return None
        if isinstance(self.source, TakesLayers):
            names = self.source.layers_of(changing, self._sent)
        return None if self._worker.on_any(names is None) else names

    def wait(self, pending: Pending, number: int, ask_again: Callable[[], Pending]) -> list[Rollout]:
        """This worker's rollouts; where a generator was restarted, after it was given the weights again.

        Every worker takes part in every round, whether it has its rollouts or not: so nobody still waits for rollouts
        of older weights when new ones are given, and rank 0 alone gives them. Workers that did so each for itself would
        each begin a transfer with the same actors.
        """
        rollouts: list[Rollout] | None = None
        for restart in range(_MAX_RESTARTS + 1):
            if restart:
                self.push(number)
            if restart and rollouts is None:
                pending = ask_again()
            try:
                rollouts = pending.result() if rollouts is None else rollouts
            except StaleWeightsError:
                rollouts = None
            someone_has_none = self._worker.on_any(rollouts is None)
            if rollouts is not None and not someone_has_none:
                return rollouts
        raise StaleWeightsError(f"generators lost the weights {self.version(number)!r} {_MAX_RESTARTS + 1} times")

    def rest(self) -> None:
        """Let engines on the workers' devices free memory for the update, once all workers have their rollouts."""
        if self._generation.sleep_mode != "none" and isinstance(self.source, Sleeps):
            if self._worker.rank == 0:
                self.source.sleep()
            self._barrier()

    def _barrier(self) -> None:
        self._worker.sum(torch.zeros((), device=self._worker.device))
