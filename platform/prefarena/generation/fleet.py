"""N generation actors as one rollout source: prompts are balanced over them, weights go to all of them."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from prefarena.config import Generation
from prefarena.errors import WaitTimeoutError
from prefarena.failures import in_one_line
from prefarena.generation.actor import Call, Generator, deadline_after
from prefarena.generation.interface import EngineError, Sampling, TransferLostError, UpdateInfo
from prefarena.generation.layout import ModelLayout
from prefarena.generation.weights import Verified, as_arrays, checksums
from prefarena.records import Rollout

_logger = logging.getLogger(__name__)


def balance(loads: Sequence[int], num_shards: int) -> list[list[int]]:
    """Indices of `loads` for each shard: the longest first, each to the shard with the least to do.

    Shards are whole (one call an actor): an engine is fast because it batches, and small chunks lose that. Indices
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
        """One rollout per prompt, in order.

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
        """The running actors of these names. Raises GeneratorLostError where one is missing."""
        return cls([Generator.connect(name, settings) for name in names], settings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self._members)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the engines' weights."""
        return getattr(torch, self._members[0].call_dtype().result())

    # ------------------------------------------------------------------------------------------ weights

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Replace all weights of all actors, in memory: a whole state dict with a tied head written out.

        Raises WeightUpdateError where names or shapes are not the model's, WeightMismatchError where an engine then
        holds something else (`generation.verify_weights`); the actor it is about holds no version afterwards.
        """
        tensors = dict(named_tensors)
        sums = checksums(tensors, self.dtype) if self._settings.verify_weights else None
        if self._settings.weight_sync == "host":
            stored = ray.put(as_arrays(tensors))  # once, however many actors read it
            what = f"to take weights {version!r}"
            calls = [member.call("load", what, "sync_timeout_s", stored, sums, version) for member in self._members]
            self._note(self._wait(calls, self._settings.sync_timeout_s))
            return
        try:
            verified = self._device_transfer().send(tensors, sums, version)
        except TransferLostError:  # an actor was restarted; it has to be met again
            self._transfer = None
            verified = self._device_transfer().send(tensors, sums, version)
        self._note(verified)

    def _note(self, told: list[Verified | None]) -> None:
        """Keep what the actors verified, and say it the first time."""
        first = self.verified is None
        self.verified = min((each for each in told if each is not None), key=lambda each: each.share, default=None)
        if first and self.verified is not None:
            _logger.log(logging.WARNING if self.verified.skipped else logging.INFO, "%s", self.verified)

    def _device_transfer(self) -> DeviceTransfer:
        self._transfer = self._transfer or DeviceTransfer(self._members, self._settings, self.dtype)
        return self._transfer

    def load_checkpoint(self, path: str, version: str) -> None:
        """Replace all weights by those of a transformers folder that the actors' nodes can read."""
        arguments = (path, self._settings.verify_weights, version)
        calls = [
            member.call("load_checkpoint", f"to load {path}", "sync_timeout_s", *arguments) for member in self._members
        ]
        self._wait(calls, self._settings.sync_timeout_s)

    def try_weights(self, path: str) -> None:
        """Have every actor take weights that are unlike those of the transformers folder `path`, and use them.

        Afterwards the actors hold no version. Raises EngineError with whatever vLLM raised, and the errors of `sync`.
        """
        arguments = (path, self._settings.verify_weights)
        what = "to take other weights of the model, as a trial"
        calls = [member.call("try_weights", what, "sync_timeout_s", *arguments) for member in self._members]
        try:
            self._note(self._wait(calls, self._settings.sync_timeout_s))
        except RayTaskError as error:
            raise EngineError(
                f"given new weights, it raised {type(error.cause).__name__}: {in_one_line(error.cause)}"
            ) from error

    def versions(self) -> dict[str, str | None]:
        """The version that each actor holds, by its name; None: no weights that may be used."""
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
        """`submit`, and its result."""
        return self.submit(prompts, sampling, version).result()

    def stop(self) -> None:
        """End the actors and their engines; harmless where they are gone already."""
        for member in self._members:
            member.stop()

    def _wait(self, calls: list[Call], seconds: float) -> list[Any]:
        deadline = deadline_after(seconds)
        return [call.result(deadline) for call in calls]


class TransferClient:
    """What vLLM's trainer side asks of the engines (its VLLMWeightSyncClient protocol), asked of all actors.

    Unlike vLLM's own client for Ray it has time limits, and gives every actor a rank of its own.
    """

    def __init__(self, members: Sequence[Generator]) -> None:
        self._members = members
        self.sums: dict[str, int] | None = None
        self.version = ""
        self.verified: list[Verified | None] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every actor join. Ranks from `rank_offset` on, where the backend counts ranks."""
        first = init_info.get("rank_offset")
        infos = [
            init_info if first is None else init_info | {"rank_offset": first + place}
            for place in range(len(self._members))
        ]
        self._all("connect", "to join the weight transfer", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self._all("start_update", "to begin an update")

    def update_weights(self, update_info: UpdateInfo) -> None:
        self._all("update", "to receive weights", [(update_info,)] * len(self._members))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        what = f"to put weights {self.version!r} to use"
        self.verified = self._all(
            "finish_update", what, [(self.sums, weight_version or self.version)] * len(self._members)
        )

    def _all(self, method: str, what: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        arguments = arguments or [()] * len(self._members)
        calls = [
            member.call(method, what, "sync_timeout_s", *given)
            for member, given in zip(self._members, arguments, strict=True)
        ]
        return [call.result() for call in calls]


def join_transfer(
    backend: str, client: TransferClient, num_actors: int, dtype: torch.dtype, sizes: Sequence[int]
) -> Any:
    """This process's side of a transfer, an engine.DeviceSender; returns when all actors have joined."""
    from prefarena.generation.engine import DeviceSender

    return DeviceSender(backend, client, num_actors, dtype, ray.util.get_node_ip_address(), sizes)


class DeviceTransfer:
    """Updates from this process's GPU, through vLLM's NCCL or IPC weight transfer, with a time limit on each.

    A broadcast that a lost engine never joins cannot be interrupted, so each runs in a thread of its own, which is
    left behind: the error ends this process, and with it the thread.
    """

    def __init__(self, members: Sequence[Generator], settings: Generation, dtype: torch.dtype) -> None:
        self._settings, self._client = settings, TransferClient(members)
        model = members[0].call("model", "to tell its model", "sync_timeout_s").result()
        self._layout, self._without = ModelLayout(model.path), model.merged_heads
        sizes = self._layout.sent_sizes(self._without)
        what = "generators to join the weight transfer"
        self._sender = within(
            settings.sync_timeout_s,
            what,
            lambda: join_transfer(settings.weight_sync, self._client, len(members), dtype, sizes),
        )

    def send(self, tensors: Mapping[str, Tensor], sums: dict[str, int] | None, version: str) -> list[Verified | None]:
        """One update of all actors, and what they verified.

        `tensors` is a whole state dict; the engines get what a checkpoint would hold. Errors are those of
        `Generators.sync`, and TransferLostError after a restart.
        """
        self._client.sums, self._client.version = sums, version
        sent = self._layout.to_send(tensors, self._without)
        what = f"generators to take weights {version!r} over {self._settings.weight_sync}"
        within(self._settings.sync_timeout_s, what, lambda: self._sender.send(sent.items()))
        return self._client.verified


def within(seconds: float, what: str, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, on this process's current GPU. Raises WaitTimeoutError when it takes longer."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name=what)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise WaitTimeoutError(f"waited {seconds:g} s for {what}; generation.sync_timeout_s sets the limit")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
