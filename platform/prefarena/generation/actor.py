"""The generation actor: a Ray actor that owns one vLLM engine.

The actor knows the version of the weights it holds and refuses to generate with any other. It holds none when it
starts, and none after a restart (Ray restarts it with the weights it was created with), so no rollout can come from
stale weights. `client.Generator` asks it; `fleet.Generators` is what the rest of the package uses.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefarena.config import Generation
from prefarena.generation.checksums import checksums
from prefarena.generation.interface import (
    Sampling,
    StaleWeightsError,
    TransferLostError,
    UpdateInfo,
)
from prefarena.generation.layout import ModelLayout
from prefarena.generation.shared import Bucket
from prefarena.generation.trial import change, change_back, check_served, token_logps, trial_prompts
from prefarena.generation.weights import Sums, Verified, check_complete, check_held, check_known, check_layers
from prefarena.records import Rollout

_logger = logging.getLogger(__name__)

#: What an engine gives back while it sleeps, by vLLM's names.
_MEMORY = frozenset({"weights", "kv_cache"})
_LEVELS = {"keep": 1, "discard": 2}


@dataclass(frozen=True)
class ServedModel:
    """The facts about an engine's model that a trainer must know.

    merged_heads: tied heads that the engine is not sent. transposed: tensors that it holds transposed. num_bytes: of a
    whole update, in the engine's dtype. layers: names of tensors that go together in a part of one.
    """

    path: str
    merged_heads: frozenset[str]
    transposed: frozenset[str] = frozenset()
    num_bytes: int = 0
    layers: tuple[frozenset[str], ...] = ()

    def whole_layers(self, names: Collection[str]) -> frozenset[str] | None:
        """Return these tensors and those that must be sent with them; None where that is unknown for one of them."""
        found = [layer for layer in self.layers if not layer.isdisjoint(names)]
        together = frozenset[str]().union(*found)
        return together if together >= set(names) else None


@dataclass
class HostUpdate:
    """An update through host memory in progress, of all or some layers, with the shapes received so far."""

    name: str
    partial: bool
    shapes: dict[str, tuple[int, ...]]


class GenerationActor:
    """The process around the engine. Made by `client.Generator.begin`, which sets its environment."""

    def __init__(self, model_path: str, generation: Generation, max_model_len: int, use_gpu: bool, seed: int) -> None:
        from prefarena.generation.engine.engine import Engine
        from prefarena.modeling.endings import load_ends
        from prefarena.modeling.load import load_tokenizer

        self._path, self._max_model_len = model_path, max_model_len
        self._version: str | None = None
        self._connected = False
        self._updating = False  # between the first and the last step of an update between devices
        self._update: HostUpdate | None = None  # the update through host memory that is under way
        self._failed = False  # whether the engine raised an error in the middle of an update
        self._checked: Verified | None = None  # of the last update that was compared whole
        self._sleep_mode = generation.sleep_mode
        self._asleep = set[str]()  # the parts of the engine's memory that are given back
        self._layout = ModelLayout(model_path)
        self._engine = Engine(
            model_path,
            generation,
            max_model_len=max_model_len,
            end_ids=load_ends(model_path, load_tokenizer(model_path)),
            use_gpu=use_gpu,
            seed=seed,
        )
        self._merged_heads = self._engine.merged_heads(self._layout.tied)
        self._layers = tuple(self._engine.layers(self._layout.tensors))
        self._engine.generate([[0]], max_tokens=1, temperature=1.0, seeds=[0])  # the first call pays for warm-up
        self.sleep()

    def dtype(self) -> str:
        """The name of the engine's dtype; answers once the engine is up."""
        return str(self._engine.dtype).removeprefix("torch.")

    def pid(self) -> int:
        return os.getpid()

    def version(self) -> str | None:
        return self._version

    def model(self) -> ServedModel:
        shapes = self._layout.sent_shapes(self._merged_heads).values()
        num_bytes = sum(map(math.prod, shapes)) * self._engine.dtype.itemsize
        return ServedModel(self._path, self._merged_heads, self._layout.transposed, num_bytes, self._layers)

    def sleep(self) -> None:
        """Free the engine's memory until it is needed, if `generation.sleep_mode` says so; otherwise do nothing.

        With "discard" the actor then holds no version.
        """
        if self._sleep_mode == "none" or self._asleep == _MEMORY:
            return
        self._wake()  # vLLM takes an engine that has its weights alone for one that sleeps
        if self._sleep_mode == "discard":
            self._version = None
        self._engine.sleep(_LEVELS[self._sleep_mode])
        self._asleep = set(_MEMORY)

    def _wake(self, parts: Collection[str] = _MEMORY) -> None:
        """Allocate these parts of the engine's memory again."""
        if missing := self._asleep & set(parts):
            self._engine.wake(missing)
            self._asleep -= missing

    def load(self, tensors: Mapping[str, Tensor], sums: Sums | None, version: str) -> Verified | None:
        """Replace all weights by these; with the checksums `sums`, check that the engine then holds the same numbers.

        Returns how much of them was read back; None without `sums`.
        """
        sent = self._layout.to_send(tensors, self._merged_heads)
        self._begin()
        self._receive({"tensors": sent})
        return self._finish(sums, version)

    def load_checkpoint(self, path: str, verify: bool, version: str) -> None:
        from prefarena.modeling.load import load_policy

        with self._engine.model_building():
            tensors = load_policy(path).state_dict()
        self.load(tensors, self._sums(tensors) if verify else None, version)

    def try_weights(self, path: str, verify: bool) -> Verified | None:
        """Give the engine weights that are unlike those of the model at `path`, and see that it computes with them.

        The actor then holds no version. Returns what `load` does. Raises WeightMismatchError where the engine does not
        hold these weights (with `verify`), or where its log-probs are not theirs.
        """
        from prefarena.modeling.load import load_policy

        with self._engine.model_building():
            policy = load_policy(path)
            vocab_size = policy.config.get_text_config(decoder=True).vocab_size
            prompts, num_tokens = trial_prompts(vocab_size, self._max_model_len)
            change(policy)
            tensors = policy.state_dict()
            verified = self.load(tensors, self._sums(tensors) if verify else None, "trial")
            self._version = None
            self._wake()
            seeds = range(len(prompts))
            samples = self._engine.generate(prompts, max_tokens=num_tokens, temperature=1.0, seeds=seeds)
            sequences = [(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
            new = token_logps(policy, sequences)
            change_back(policy)
            old = token_logps(policy, sequences)
        given = torch.tensor([logp for sample in samples for logp in sample.token_logps])
        check_served(given, new, old, self._engine.dtype)
        return verified

    def _sums(self, tensors: Mapping[str, Tensor]) -> Sums:
        return Sums(checksums(tensors, self._engine.dtype, self._layout.transposed))

    def _begin(self) -> None:
        """Begin an update, however the last one ended. A failed update leaves no usable weights."""
        if self._failed or self._updating:
            self._end_process()
        self._version = None
        self._wake(["weights"])
        if self._update is not None:  # its trainer died between two buckets; the layers are whole again
            self._update = None
            self._engine.finish_update()
        self._engine.start_update()

    def _receive(self, update_info: UpdateInfo) -> None:
        self._failed = True
        self._engine.receive(update_info)
        self._failed = False

    def _end_process(self) -> None:
        """End the process, as vLLM cannot leave an update of partly replaced layers; Ray restarts the actor."""
        _logger.warning("an update of the weights was begun and never finished, so the process ends and is restarted")
        os._exit(1)

    # The steps of an update through host memory (host_transfer.HostTransfer).

    def begin_host_update(self, update: str, since: str | None) -> bool:
        """Begin the update of this name; whether a whole one has been compared, so that a sample of this is enough.

        since: the version that this one changes a part of; None means a whole update. Raises TransferLostError where
        the actor does not hold it.
        """
        if since is not None and since != self._version:
            raise TransferLostError(f"the generation actor does not hold {since!r}, of which a part was to be replaced")
        self._begin()
        self._update = HostUpdate(update, since is not None, {})
        return self._checked is not None

    def take_bucket(self, update: str, bucket: Bucket) -> None:
        """Take some of the update's tensors. Raises WeightUpdateError for those that the model does not have."""
        under_way = self._host_update(update)
        shapes = {name: entry.shape for name, entry in bucket.entries.items()}
        check_known(shapes, self._layout.shapes)
        under_way.shapes.update(shapes)
        self._receive({"tensors": self._layout.as_sent(bucket.tensors(), self._merged_heads)})

    def end_host_update(self, update: str, sums: Sums | None, version: str) -> Verified | None:
        """Start using the weights if they are complete; returns what `load` does. Raises WeightUpdateError."""
        under_way = self._host_update(update)
        if under_way.partial:
            check_layers(under_way.shapes, self._layers)
        else:
            check_complete(under_way.shapes, self._layout.shapes)
        return self._finish(sums, version)

    def _host_update(self, update: str) -> HostUpdate:
        if self._failed or self._update is None or self._update.name != update:
            raise TransferLostError("the generation actor was restarted, or failed, in the middle of an update")
        return self._update

    # The steps of a transfer between devices, driven by vLLM's trainer side (transfer.TransferClient).

    def leave(self) -> None:
        """Leave any transfer.

        In the middle of an update that is not possible: vLLM refuses to let go of the trainer, and has layers of which
        a part was replaced. The process ends then, and Ray starts it again.
        """
        if self._updating or self._failed:
            self._end_process()
        if self._connected:
            self._connected = False
            self._engine.disconnect()

    def connect(self, init_info: dict[str, Any]) -> None:
        self.leave()
        self._engine.connect(init_info)
        self._connected = True

    def check_joined(self) -> None:
        """Raise TransferLostError unless an update can begin."""
        if not self._connected:
            raise TransferLostError("the generation actor has no connection to the trainer: it was restarted")
        if self._updating:
            raise TransferLostError("the generation actor is in the middle of an update that was not finished")

    def start_update(self) -> None:
        self.check_joined()
        self._begin()
        self._updating = True

    def update(self, update_info: UpdateInfo) -> None:
        self._check_updating()
        self._engine.receive(update_info)

    def finish_update(self, sums: Sums | None, version: str) -> Verified | None:
        self._check_updating()
        return self._finish(sums, version)

    def checked_whole(self) -> bool:
        """Whether a whole update has been compared with what was sent, so that a sample of the next is enough."""
        return self._checked is not None

    def _check_updating(self) -> None:
        if self._failed or not self._updating:
            raise TransferLostError("the generation actor was restarted, or failed, in the middle of an update")

    def _finish(self, sums: Sums | None, version: str) -> Verified | None:
        self._failed = True
        self._engine.finish_update()
        self._failed = self._updating = False
        self._update = None
        if sums is not None:
            checked, self._checked = self._checked, None  # unless it is found to hold what was sent
            sent = {name: layout for name, layout in self._layout.tensors.items() if name in sums.of}
            held = self._engine.held_checksums(sent, sums.sample)
            verified = check_held(held, sums.of, self._layout.shapes)
            self._checked = verified if sums.sample is None else checked
        self._version = version
        return self._checked if sums is not None else None

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, version: str) -> list[Rollout]:
        if version != self._version:
            holds = "no weights yet (it was just started or restarted)" if self._version is None else self._version
            raise StaleWeightsError(
                f"generation with weights {version!r} was asked for, but the generator holds {holds}"
            )
        self._wake()
        samples = self._engine.generate(
            prompts, max_tokens=sampling.max_tokens, temperature=sampling.temperature, seeds=seeds
        )
        return [
            Rollout(list(prompt), sample.token_ids, sample.token_logps, sample.finished, version)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
