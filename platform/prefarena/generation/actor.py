"""The generation actor: a Ray actor that owns one vLLM engine, and the client of one.

The actor knows the version of the weights it holds and refuses to generate with any other. It holds none when it
starts, and none after a restart (Ray restarts it with the weights it was created with), so no rollout can come from
stale weights. `fleet.Generators` is what the rest of the package uses.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from prefarena.config import Generation
from prefarena.errors import EntryError, WaitTimeoutError
from prefarena.generation.interface import (
    GeneratorLostError,
    Sampling,
    StaleWeightsError,
    TransferLostError,
    UpdateInfo,
)
from prefarena.generation.layout import ModelLayout
from prefarena.generation.trial import change, change_back, check_served, token_logps, trial_prompts
from prefarena.generation.weights import Verified, as_tensors, check_held, checksums
from prefarena.records import Rollout

_MAX_RESTARTS = 3
_RETRY_SECONDS = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """What a trainer must know of an engine's model. merged_heads: tied heads that the engine is not sent."""

    path: str
    merged_heads: frozenset[str]


class GenerationActor:
    """The process around the engine. Made by `Generator.begin`, which sets its environment."""

    def __init__(self, model_path: str, generation: Generation, max_model_len: int, use_gpu: bool, seed: int) -> None:
        from prefarena.generation.engine import Engine
        from prefarena.modeling.endings import load_ends
        from prefarena.modeling.load import load_tokenizer

        self._path, self._max_model_len = model_path, max_model_len
        self._version: str | None = None
        self._connected = False
        self._updating = False  # between the first and the last step of an update between devices
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
        self._engine.generate([[0]], max_tokens=1, temperature=1.0, seeds=[0])  # the first call pays for warm-up

    def dtype(self) -> str:
        """The name of the engine's dtype; answers once the engine is up."""
        return str(self._engine.dtype).removeprefix("torch.")

    def pid(self) -> int:
        return os.getpid()

    def version(self) -> str | None:
        return self._version

    def model(self) -> ServedModel:
        return ServedModel(self._path, self._merged_heads)

    def load(self, arrays: dict[str, np.ndarray], sums: dict[str, int] | None, version: str) -> Verified | None:
        """Replace all weights by these; with `sums`, check that the engine then holds what they are of.

        Returns how much of them was read back; None without `sums`.
        """
        return self._replace(as_tensors(arrays), sums, version)

    def load_checkpoint(self, path: str, verify: bool, version: str) -> None:
        from prefarena.modeling.load import load_policy

        with self._engine.model_building():
            tensors = load_policy(path).state_dict()
        self._replace(tensors, checksums(tensors, self._engine.dtype) if verify else None, version)

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
            verified = self._replace(tensors, checksums(tensors, self._engine.dtype) if verify else None, "trial")
            self._version = None
            seeds = range(len(prompts))
            samples = self._engine.generate(prompts, max_tokens=num_tokens, temperature=1.0, seeds=seeds)
            sequences = [(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
            new = token_logps(policy, sequences)
            change_back(policy)
            old = token_logps(policy, sequences)
        given = torch.tensor([logp for sample in samples for logp in sample.token_logps])
        check_served(given, new, old, self._engine.dtype)
        return verified

    def _replace(self, tensors: Mapping[str, Tensor], sums: dict[str, int] | None, version: str) -> Verified | None:
        sent = self._layout.to_send(tensors, self._merged_heads)
        self._version = None  # a failed update leaves no usable weights
        self._engine.start_update()
        self._engine.receive({"tensors": sent})
        return self._finish(sums, version)

    # The steps of a transfer between devices, driven by vLLM's trainer side (transfer.TransferClient).

    def leave(self) -> None:
        """Be in no transfer any more.

        In the middle of an update that is not possible: vLLM refuses to let go of the trainer, and has layers of which
        a part was replaced. The process ends then, and Ray starts it again.
        """
        if self._updating:
            _logger.warning("an update of the weights was begun and never finished: the process ends, to be restarted")
            os._exit(1)
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
        self._version = None
        self._updating = True
        self._engine.start_update()

    def update(self, update_info: UpdateInfo) -> None:
        self._check_updating()
        self._engine.receive(update_info)

    def finish_update(self, sums: dict[str, int] | None, version: str) -> Verified | None:
        self._check_updating()
        return self._finish(sums, version)

    def _check_updating(self) -> None:
        if not self._updating:
            raise TransferLostError("the generation actor was restarted in the middle of an update")

    def _finish(self, sums: dict[str, int] | None, version: str) -> Verified | None:
        self._engine.finish_update()
        self._updating = False
        verified = None
        if sums is not None:
            held = self._engine.held_checksums(self._layout.tensors)
            verified = check_held(held, sums, self._layout.shapes)
        self._version = version
        return verified

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, version: str) -> list[Rollout]:
        if version != self._version:
            holds = "no weights yet (it was just started or restarted)" if self._version is None else self._version
            raise StaleWeightsError(
                f"generation with weights {version!r} was asked for, but the generator holds {holds}"
            )
        samples = self._engine.generate(
            prompts, max_tokens=sampling.max_tokens, temperature=sampling.temperature, seeds=seeds
        )
        return [
            Rollout(list(prompt), sample.token_ids, sample.token_logps, sample.finished, version)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]


def _environment(generation: Generation) -> dict[str, str]:
    """Must be in place before vLLM is imported: engine in-process, quiet, as many threads as CPUs were asked for."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": f"{generation.kv_cache_gib}",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(generation.cpus))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_BATCH_INVARIANT": str(int(generation.batch_invariant)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }


def deadline_after(seconds: float) -> float:
    """The moment, on the monotonic clock, that is so many seconds away."""
    return time.monotonic() + seconds


def last_error(traceback: str) -> str:
    """The last error of a traceback as text: its type and its message, in one line of at most 500 characters."""
    lines = traceback.strip().splitlines()
    starts = [place for place, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return " ".join(" ".join(lines[starts[-1] if starts else -1 :]).split())[:500].rstrip(".")


@dataclass
class Call:
    """A method call that is on its way to an actor.

    limit: the setting of `Generation` that bounds the wait. step: whether it is a step of a transfer, in which an actor
    that was restarted has no part.
    """

    generator: Generator
    method: str
    what: str
    limit: str
    args: tuple[Any, ...]
    step: bool = False

    def __post_init__(self) -> None:
        self.answer = self._send()

    def _send(self) -> Any:
        return getattr(self.generator.actor, self.method).remote(*self.args)

    def result(self, deadline: float | None = None) -> Any:
        """What the method returns. Waits until `deadline` (by default the limit from now), restarts included.

        While Ray restarts a lost actor the call is sent again, as every method may be but a step of a transfer, which
        raises TransferLostError.
        """
        seconds = getattr(self.generator.settings, self.limit)
        deadline = deadline_after(seconds) if deadline is None else deadline
        name = self.generator.name
        too_late = f"waited {seconds:g} s for generator {name!r} {self.what}; generation.{self.limit} sets the limit"
        while True:
            try:
                return ray.get(self.answer, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError:
                raise WaitTimeoutError(too_late) from None
            except ActorUnavailableError:
                if self.step:
                    raise TransferLostError(f"generator {name!r} was lost, while waiting {self.what}") from None
                if time.monotonic() + _RETRY_SECONDS >= deadline:
                    raise WaitTimeoutError(f"{too_late} (it was being restarted)") from None
                time.sleep(_RETRY_SECONDS)
                self.answer = self._send()
            except RayActorError as error:
                reason = f"the engine raised {last_error(str(error))}" if error.actor_init_failed else error
                raise GeneratorLostError(f"generator {name!r} is gone, while waiting {self.what}: {reason}") from error
            except RayTaskError as error:
                if isinstance(error.cause, EntryError):  # its sentence, without the actor's traceback
                    raise error.cause from None
                raise


def all_of(calls: Sequence[Call], deadline: float) -> list[Any]:
    """What each of them returns. Raises what the first to fail raises, however long the others would take."""
    waiting = {call.answer: call for call in calls}
    while waiting:
        ended, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for answer in ended or list(waiting):  # none has ended in time: the first says so
            waiting.pop(answer).result(deadline)
    return [call.result(deadline) for call in calls]


class Generator:
    """A client of one generation actor. Every call has a time limit, and names what it waited for when it passes.

    After a restart the first `generate` raises StaleWeightsError, and the caller syncs again.
    """

    def __init__(self, actor: Any, name: str, settings: Generation) -> None:
        self.actor, self.name, self.settings = actor, name, settings
        self._needs = ""

    @classmethod
    def begin(
        cls, model_path: str, settings: Generation, max_model_len: int, use_gpu: bool, name: str, seed: int
    ) -> Generator:
        """Have the actor started; `call_dtype` tells when its engine is up."""
        needs = {"num_gpus": settings.gpus, "num_cpus": 0} if use_gpu else {"num_cpus": settings.cpus}
        options = {"name": name, "max_restarts": _MAX_RESTARTS, "runtime_env": {"env_vars": _environment(settings)}}
        if settings.labels:
            options["label_selector"] = dict(settings.labels)
        remote = ray.remote(GenerationActor).options(**needs, **options)
        generator = cls(remote.remote(model_path, settings, max_model_len, use_gpu, seed), name, settings)
        asked = [f"{key}={value:g}" for key, value in needs.items()]
        generator._needs = ", ".join(asked + [f"{label}: {wanted}" for label, wanted in settings.labels])
        return generator

    @classmethod
    def connect(cls, name: str, settings: Generation) -> Generator:
        """The running generator of this name. Raises GeneratorLostError where there is none."""
        try:
            return cls(ray.get_actor(name), name, settings)
        except ValueError:
            raise GeneratorLostError(f"there is no running generator {name!r} on this cluster") from None

    def call(self, method: str, what: str, limit: str, *args: Any) -> Call:
        """Call a method of the actor; returns at once."""
        return Call(self, method, what, limit, args)

    def call_step(self, method: str, what: str, *args: Any) -> Call:
        """Call a step of a transfer between devices; returns at once."""
        return Call(self, method, what, "sync_timeout_s", args, step=True)

    def call_dtype(self) -> Call:
        """Answers with the engine's dtype when it is up."""
        placed = f"to be placed ({self._needs}) and to start" if self._needs else "to start"
        return self.call("dtype", placed, "start_timeout_s")

    def call_generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, version: str) -> Call:
        what = f"to generate {len(prompts)} responses with weights {version!r}"
        return self.call("generate", what, "generate_timeout_s", prompts, seeds, sampling, version)

    def version(self) -> str | None:
        """The version of the weights that the actor holds."""
        return self.call("version", "to tell its weight version", "sync_timeout_s").result()

    def restart(self) -> None:
        """End the actor's process, whatever it is at, to be started again by Ray as after a death."""
        ray.kill(self.actor, no_restart=False)

    def stop(self) -> None:
        """End the actor and its engine; harmless when it is gone already."""
        ray.kill(self.actor, no_restart=True)
