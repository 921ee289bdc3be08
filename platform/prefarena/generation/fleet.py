"""N generation actors as one rollout source: prompts are balanced over them, weights go to all of them."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from prefarena.config import Generation
from prefarena.failures import in_one_line
from prefarena.generation.checksums import ColumnSample, summed
from prefarena.generation.client import Call, Generator, deadline_after
from prefarena.generation.host_transfer import HostUpdate
from prefarena.generation.interface import EngineError, GeneratorLostError, Sampling, TransferLostError
from prefarena.generation.transfer import DeviceTransfer, Feed, free
from prefarena.generation.weights import Sums, Verified
from prefarena.records import Rollout

#: One update is sent over so many transfers at most: each time an actor was lost in it, and Ray restarts it thrice.
_MAX_TRANSFERS = 4

_logger = logging.getLogger(__name__)


def balance(loads: Sequence[int], num_shards: int) -> list[list[int]]:
    """Divide the indices of `loads` into shards: the longest first, each to the shard with the least load.

    Each shard is a single call to its actor: an engine is fast because it batches, and small chunks lose that. Indices
    ascend within a shard; shards may be empty.
    """
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    least = [(0, shard) for shard in range(num_shards)]
    for index in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        load, shard = heapq.heappop(least)
        shards[shard].append(index)
        heapq.heappush(least, (load + loads[index], shard))
    return [sorted(shard) for shard in shards]


@dataclass(frozen=True)
class PendingRollouts:
    """A batch that the actors are working on, one shard each."""

    shards: list[tuple[list[int], Call]]
    num_prompts: int
    limit_s: float

    def result(self) -> list[Rollout]:
        """Return one rollout per prompt, in order.

        Raises StaleWeightsError where an actor holds other weights, WaitTimeoutError where one takes longer than
        `generation.generate_timeout_s` from this call on, GeneratorLostError where one is gone for good.
        """
        deadline = deadline_after(self.limit_s)
        found: dict[int, Rollout] = {}
        for indices, call in self.shards:
            found.update(zip(indices, call.result(deadline), strict=True))
        return [found[index] for index in range(self.num_prompts)]


class Generators:
    """A client of several generation actors. Errors name the actor that they are about."""

    def __init__(self, members: Sequence[Generator], settings: Generation) -> None:
        self._members = list(members)
        self._settings = settings
        self._transfer: DeviceTransfer | None = None
        self._turn = 0  # updates that were sent
        #: How much of the weights was read back after the last `sync`, by the actor that read least; None: nothing.
        self.verified: Verified | None = None

    @classmethod
    def start(
        cls, model_path: str, settings: Generation, max_model_len: int, use_gpu: bool, names: tuple[str, ...], seed: int
    ) -> Generators:
        """Start one actor per name, side by side, and wait for their engines; all end where one cannot start.

        Raises WaitTimeoutError after `generation.start_timeout_s`, GeneratorLostError where an engine cannot be made.
        """
        members = [Generator.begin(model_path, settings, max_model_len, use_gpu, name, seed) for name in names]
        fleet = cls(members, settings)
        try:
            fleet._wait([member.call_dtype() for member in members], settings.start_timeout_s)
        except BaseException:  # an interruption too must not leave engines behind
            fleet.stop()
            raise
        return fleet

    @classmethod
    def connect(cls, names: tuple[str, ...], settings: Generation) -> Generators:
        """Connect to the running actors of these names. Raises GeneratorLostError where one is missing."""
        return cls([Generator.connect(name, settings) for name in names], settings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self._members)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the engines' weights."""
        return getattr(torch, self._members[0].call_dtype().result())

    # ------------------------------------------------------------------------------------------ weights

    def layers_of(self, names: Collection[str], version: str) -> frozenset[str] | None:
        """The tensors that `sync` must replace in `version` if only these have changed.

        They are these, and those that engines fuse with them. None where some actor does not hold that version, or
        everything must be sent.
        """
        if self._settings.weight_sync != "host" or set(self.versions().values()) != {version}:
            return None
        return self._members[0].served.whole_layers(names)

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str, since: str | None = None) -> None:
        """Replace all weights of all actors, in memory: a whole state dict with a tied head written out.

        With `since` it is a part of one, as `layers_of` that version tells, and the rest stays.

        Raises WeightUpdateError where names or shapes are not the model's, WeightMismatchError where an engine then
        holds something else (`generation.verify_weights`); the actor it is about holds no version afterwards. Between
        devices also TransferLostError, as in `RolloutSource.sync`.
        """
        self._turn += 1
        if self._settings.weight_sync != "host":
            self._note(self._send(Feed(named_tensors), version))
            return
        update = HostUpdate(list(self._members), version, self.dtype, since)
        self._note(update.send(named_tensors, verify=self._settings.verify_weights, turn=self._turn))

    def _sums(self) -> Sums:
        """Checksums yet to be taken of what is sent between devices: of samples, once every actor has compared all."""
        calls = [
            member.call("checked_whole", "to report what it has checked", "sync_timeout_s") for member in self._members
        ]
        sample = ColumnSample(self._turn) if all(self._wait(calls, self._settings.sync_timeout_s)) else None
        return Sums({}, sample)

    def _send(self, feed: Feed, version: str) -> list[Verified | None]:
        """Send over a transfer between devices, and over a new one if an actor is lost before any tensor was made.

        Raises TransferLostError where one is lost later.
        """
        for _ in range(_MAX_TRANSFERS):
            try:
                if self._transfer is None:
                    free(self._members, self._settings)
                    self._transfer = DeviceTransfer(self._members, self._settings, self.dtype)
                named_tensors, sums = iter(feed), None
                if self._settings.verify_weights:
                    sums, transposed = self._sums(), self._members[0].served.transposed
                    named_tensors = summed(named_tensors, sums.of, self.dtype, transposed, sums.sample)
                return self._transfer.send(named_tensors, sums, version)
            except TransferLostError as error:
                lost = error
                _logger.warning("weights %r are to be sent again: %s", version, error)
                self.leave()
                if feed.begun:
                    feed.give_up()
                    raise
            except BaseException:  # whatever became of the update, the next one begins with a new connection
                self.leave()
                raise
        told = f"weights {version!r} did not arrive in {_MAX_TRANSFERS} attempts, the last time because {lost}"
        raise GeneratorLostError(told) from lost

    def leave(self) -> None:
        """End this process's transfer, where it has one; actors are told when another begins."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def _note(self, told: list[Verified | None]) -> None:
        """Keep what the actors verified, and log it the first time."""
        first = self.verified is None
        self.verified = min((each for each in told if each is not None), key=lambda each: each.share, default=None)
        if first and self.verified is not None:
            _logger.log(logging.WARNING if self.verified.skipped else logging.INFO, "%s", self.verified)

    def load_checkpoint(self, path: str, version: str) -> None:
        """Replace all weights by those of a transformers folder that the actors' nodes can read."""
        self._update("load_checkpoint", f"to load {path}", path, self._settings.verify_weights, version)

    def try_weights(self, path: str) -> None:
        """Have every actor take weights that are unlike those of the transformers folder `path`, and use them.

        Afterwards the actors hold no version. Raises EngineError with whatever vLLM raised, and the errors of `sync`.
        """
        what = "to take other weights in a trial"
        try:
            self._note(self._update("try_weights", what, path, self._settings.verify_weights))
        except RayTaskError as error:
            raise EngineError(
                f"given new weights, it raised {type(error.cause).__name__}: {in_one_line(error.cause)}"
            ) from error

    def _update(self, method: str, what: str, *args: Any) -> list[Any]:
        """Update every actor wholly; each reads the weights itself."""
        limit = max(member.sync_limit_s for member in self._members)
        return self._wait([member.call_update(method, what, *args) for member in self._members], limit)

    def versions(self) -> dict[str, str | None]:
        """The version that each actor holds, by its name; None where it holds no usable weights."""
        return {member.name: member.version() for member in self._members}

    # ----------------------------------------------------------------------------------------- rollouts

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> PendingRollouts:
        """Ask for one rollout per prompt; returns at once.

        A request's seed depends on the batch's seed and its place in the batch, so samples do not depend on the number
        of actors.
        """
        seeds = sampling.request_seeds(len(prompts))
        parts = balance([len(prompt) + sampling.max_tokens for prompt in prompts], len(self._members))
        shards = [
            (part, member.call_generate([prompts[i] for i in part], [seeds[i] for i in part], sampling, version))
            for part, member in zip(parts, self._members, strict=True)
            if part
        ]
        return PendingRollouts(shards, len(prompts), self._settings.generate_timeout_s)

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        """Call `submit` and wait for its result."""
        return self.submit(prompts, sampling, version).result()

    def sleep(self) -> None:
        """Make the engines free their memory if `generation.sleep_mode` says so; they wake when needed."""
        if self._settings.sleep_mode != "none":
            limit = "sync_timeout_s"
            calls = [member.call("sleep", "to free its memory", limit) for member in self._members]
            self._wait(calls, self._settings.sync_timeout_s)

    def stop(self) -> None:
        """End the actors and their engines; harmless where they are gone already."""
        for member in self._members:
            member.stop()

    def _wait(self, calls: list[Call], seconds: float) -> list[Any]:
        deadline = deadline_after(seconds)
        return [call.result(deadline) for call in calls]
