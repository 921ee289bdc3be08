"""Weights from a trainer's GPU to those of the generation actors: the trainer's side of vLLM's weight transfer.

Any of the processes may die while weights are on their way. An actor that was restarted has no part in the transfer
any more; one that lives cannot be talked out of an update that has begun, so it is restarted too, and all meet anew.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import ray
import torch
from torch import Tensor

from prefarena.config import Generation
from prefarena.errors import WaitTimeoutError
from prefarena.generation.client import Generator, all_of, deadline_after
from prefarena.generation.interface import TransferLostError, UpdateInfo
from prefarena.generation.layout import ModelLayout
from prefarena.generation.weights import Sums, Verified


def free(members: Sequence[Generator], settings: Generation) -> None:
    """Make every actor leave its current transfer, so that it can join another; returns when all can.

    An actor in the middle of an update ends its process, and one that does not answer is ended: it waits for weights
    from a process that died. Ray starts them again. Raises WaitTimeoutError where that takes longer than
    `generation.start_timeout_s`, GeneratorLostError where an actor is gone for good.
    """
    calls = [member.call_step("leave", "to leave the weight transfer") for member in members]
    deadline, begun = deadline_after(settings.sync_timeout_s), []
    for member, call in zip(members, calls, strict=True):
        try:
            call.result(deadline)
        except TransferLostError:
            begun.append(member)
        except WaitTimeoutError:
            member.restart()
            begun.append(member)
    all_of([member.call_dtype() for member in begun], deadline_after(settings.start_timeout_s))


class TransferClient:
    """The client through which vLLM's trainer side calls all actors (its VLLMWeightSyncClient protocol).

    Unlike vLLM's own client for Ray it has time limits, and gives every actor ranks of its own.
    """

    def __init__(self, members: Sequence[Generator], limit_s: float, ranks_each: int = 1) -> None:
        """limit_s: for each step. ranks_each: processes of each actor's engine that receive, each with a rank."""
        self._members, self._limit_s, self._ranks_each = members, limit_s, ranks_each
        self.sums: Sums | None = None
        self.version = ""
        self.verified: list[Verified | None] = []
        #: What a step raised. vLLM asks for some in threads, whose errors it sees when its own part is done, if ever.
        self.failed: Future[None] = Future()

    def begin(self, sums: Sums | None, version: str) -> None:
        """Announce that the next update is of this version."""
        self.sums, self.version, self.verified = sums, version, []
        self.failed = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make every actor join, with ranks from `rank_offset` on where the backend counts ranks."""
        first = init_info.get("rank_offset")
        infos = [
            init_info if first is None else init_info | {"rank_offset": first + place * self._ranks_each}
            for place in range(len(self._members))
        ]
        self._all("connect", "to join the weight transfer", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        # All are asked before one begins: none that lives has to be restarted then because of one that was.
        self._all("check_joined", "to be ready for the weight transfer")
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
        try:
            calls = [
                member.call_step(method, what, *given) for member, given in zip(self._members, arguments, strict=True)
            ]
            return all_of(calls, deadline_after(self._limit_s))
        except BaseException as error:
            if not self.failed.done():
                self.failed.set_exception(error)
            raise


class Feed:
    """The tensors of an update, each made when it is asked for, by the thread that sends them.

    Where a model is spread over several processes, making one takes all of these, so whoever gives an update up asks
    for the rest of them.
    """

    def __init__(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = iter(named_tensors)
        self._turn = threading.Lock()
        self._given_up = False
        #: Whether a tensor has been asked for, after which the update cannot be sent from its beginning again.
        self.begun = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            with self._turn:
                if self._given_up:
                    raise TransferLostError("the update was given up")
                self.begun = True
                item = next(self._tensors, None)
            if item is None:
                return
            yield item
            del item  # before the next is made

    def give_up(self) -> None:
        """Ask for the rest of the tensors and drop them; the thread that sends them gets no more."""
        self._given_up = True
        with self._turn:
            deque(self._tensors, maxlen=0)


def join_transfer(
    backend: str,
    client: TransferClient,
    num_ranks: int,
    dtype: torch.dtype,
    shapes: Mapping[str, tuple[int, ...]],
) -> Any:
    """Make this process's side of a transfer, an engine.sender.DeviceSender; returns when all actors have joined."""
    from prefarena.generation.engine.sender import DeviceSender

    return DeviceSender(backend, client, num_ranks, dtype, ray.util.get_node_ip_address(), shapes)


class DeviceTransfer:
    """Updates from this process's GPU, through vLLM's NCCL or IPC weight transfer, with a time limit on each.

    A broadcast that a lost engine never joins does not end, so each runs in a thread of its own. `close` has NCCL abort
    it.
    """

    def __init__(self, members: Sequence[Generator], settings: Generation, dtype: torch.dtype) -> None:
        """Raises TransferLostError where an actor is lost while it joins. All have to be `free`."""
        num_ranks = len(members) * settings.tensor_parallel
        model, self._limit_s = members[0].served, members[0].sync_limit_s
        self._settings = settings
        self._client = TransferClient(members, self._limit_s, settings.tensor_parallel)
        self._layout, self._without = ModelLayout(model.path), model.merged_heads
        shapes = self._layout.sent_shapes(self._without)
        self._sender = self._within(
            "generators to join the weight transfer",
            lambda: join_transfer(settings.weight_sync, self._client, num_ranks, dtype, shapes),
        )

    def send(
        self, named_tensors: Iterable[tuple[str, Tensor]], sums: Sums | None, version: str
    ) -> list[Verified | None]:
        """Send one update to all actors, and return what they verified.

        `named_tensors` is a whole state dict in its own order, of which each tensor is made when it is packed; the
        engines get what a checkpoint would hold. sums: complete when the last tensor has been asked for. Errors are
        those of `Generators.sync`, and TransferLostError where an actor was lost since the last update, or is in this
        one. After an error the transfer can only be closed.
        """
        self._client.begin(sums, version)
        sent = self._layout.one_by_one(named_tensors, self._without)
        what = f"generators to take weights {version!r} over {self._settings.weight_sync}"
        self._within(what, lambda: self._sender.send(sent))
        return self._client.verified

    def close(self) -> None:
        """Leave the transfer, and end anything in progress in it."""
        self._sender.close()

    def _within(self, what: str, call: Callable[[], Any]) -> Any:
        return within(self._limit_s, what, call, self._client.failed)


def within(seconds: float, what: str, call: Callable[[], Any], failed: Future[None] | None = None) -> Any:
    """Return or raise what `call` does, on this process's current GPU, or what `failed` raises if that comes first.

    `call` is not ended then, nor when it takes longer: that raises WaitTimeoutError.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    if device is not None:  # vLLM gathers and packs on streams of its own, which wait for nothing computed here
        torch.cuda.synchronize()
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name=what).start()
    ended, _ = wait([outcome] if failed is None else [outcome, failed], seconds, FIRST_COMPLETED)
    if not ended:
        raise WaitTimeoutError(f"waited {seconds:g} s for {what}; generation.sync_timeout_s sets the limit")
    return outcome.result() if outcome in ended or failed is None else failed.result()
