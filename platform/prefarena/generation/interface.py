"""The interface of generation for training and evaluation: sampling settings, versions, errors. No Ray, no vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from prefarena.errors import EntryError
from prefarena.records import Rollout

#: What an engine is told of the tensors that it receives, as vLLM's backend for the transfer has it.
UpdateInfo = dict[str, Any] | list[dict[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How to sample one response per prompt.

    `seed` names the whole batch. Where workers each generate a share of it, `first_index` is the place of the share's
    first prompt, so that the samples do not depend on the number of workers.
    """

    max_tokens: int
    temperature: float
    seed: int
    first_index: int = 0

    def request_seeds(self, num_prompts: int) -> list[int]:
        """One 63-bit seed per prompt, from the batch's seed and the prompt's place in it."""
        return [_request_seed(self.seed, self.first_index + i) for i in range(num_prompts)]


def _request_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StaleWeightsError(RuntimeError):
    """The generator holds other weights than the caller asked for; a restarted one holds none. Sync, then ask again."""


class GeneratorLostError(EntryError):
    """The generator failed to start, or died and cannot be restarted."""


class TransferLostError(RuntimeError):
    """An engine is no longer connected to the trainer's weight transfer; a restarted one is not. Send again."""


class WeightUpdateError(EntryError):
    """A weight update that is not the whole model: tensors are missing, unknown, or of another shape."""


class WeightMismatchError(EntryError):
    """After an update the engine holds other weights than it was sent. It may not be used until synced again."""


class EngineError(EntryError):
    """vLLM raised an error while an engine took weights or generated with them."""


class Pending(Protocol):
    """A batch of rollouts that was asked for."""

    def result(self) -> list[Rollout]:
        """One rollout per prompt, in order. Raises StaleWeightsError where other weights were held than asked for."""
        ...


class RolloutSource(Protocol):
    """A generator with versioned weights, as training loops use it."""

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Replace all weights; from then on the source holds `version`.

        Raises TransferLostError where an engine was lost on the way: all are to be sent once more. Every tensor has
        been asked for by then, as gathering one may take several processes.
        """
        ...

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Pending:
        """Ask for one rollout per prompt; returns at once."""
        ...

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        """One rollout per prompt, in order. Raises StaleWeightsError where it does not hold `version`."""
        ...


@runtime_checkable
class Sleeps(Protocol):
    """A rollout source on the devices of whoever learns from it."""

    def sleep(self) -> None:
        """Free the devices' memory, if that is set; new weights or a request for rollouts wake it."""
        ...


@runtime_checkable
class TakesLayers(Protocol):
    """A rollout source that can replace some layers of the weights that it holds."""

    def layers_of(self, names: Collection[str], version: str) -> frozenset[str] | None:
        """The tensors to be sent if only these have changed since `version`; None means all."""
        ...

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str, since: str | None = None) -> None:
        """Sync as in `RolloutSource.sync`; with `since`, replace only these tensors of that version."""
        ...
