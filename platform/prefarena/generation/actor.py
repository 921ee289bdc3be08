"""The generation actor: a Ray actor that owns one vLLM engine, and its client.

The actor knows the version of the weights it holds and refuses to generate with any other. It holds none when it
starts, and none after a restart (Ray restarts it with the weights it was created with), so no rollout can come from
stale weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError
from torch import Tensor

from prefarena.config import Generation
from prefarena.errors import WaitTimeoutError
from prefarena.generation.interface import GeneratorLostError, Sampling, StaleWeightsError
from prefarena.records import Rollout

_MAX_RESTARTS = 3
_RETRY_SECONDS = 1.0


class GenerationActor:
    """The process around the engine. Made by `Generator.start`, which sets its environment."""

    def __init__(self, model_path: str, generation: Generation, max_model_len: int, use_gpu: bool, seed: int) -> None:
        from prefarena.generation.engine import Engine
        from prefarena.modeling.load import load_tokenizer

        self._version: str | None = None
        self._engine = Engine(
            model_path,
            generation,
            max_model_len=max_model_len,
            eos_id=load_tokenizer(model_path).eos_token_id,
            use_gpu=use_gpu,
            seed=seed,
        )
        self._engine.generate([[0]], max_tokens=1, temperature=1.0, seeds=[0])  # the first call pays for warm-up

    def ready(self) -> bool:
        return True

    def pid(self) -> int:
        return os.getpid()

    def version(self) -> str | None:
        return self._version

    def sync(self, arrays: dict[str, np.ndarray], version: str) -> None:
        self._load([(name, torch.tensor(array)) for name, array in arrays.items()], version)

    def load_checkpoint(self, path: str, version: str) -> None:
        from prefarena.modeling.load import load_policy

        self._load(list(load_policy(path).state_dict().items()), version)

    def _load(self, tensors: list[tuple[str, Tensor]], version: str) -> None:
        self._version = None  # a failed update leaves no usable weights
        self._engine.load(tensors)
        self._version = version

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        if version != self._version:
            holds = "no weights yet (it was just started or restarted)" if self._version is None else self._version
            raise StaleWeightsError(
                f"generation with weights {version!r} was asked for, but the generator holds {holds}"
            )
        samples = self._engine.generate(
            prompts,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seeds=sampling.request_seeds(len(prompts)),
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
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }


class _Asked:
    def __init__(self, generate: Callable[[], list[Rollout]]) -> None:
        self.result = generate


class Generator:
    """A client of one generation actor. Every call has a time limit, and names what it waited for when it passes.

    While Ray restarts a lost actor the calls wait within their limit; the first `generate` after that raises
    StaleWeightsError, and the caller syncs again.
    """

    def __init__(self, actor: Any, name: str, generation: Generation) -> None:
        self.name = name
        self._actor = actor
        self._generation = generation

    @classmethod
    def start(
        cls, model_path: str, generation: Generation, max_model_len: int, use_gpu: bool, name: str, seed: int
    ) -> Generator:
        """Start the actor and wait for its engine.

        Raises WaitTimeoutError after `generation.start_timeout_s`, GeneratorLostError where the engine cannot be made.
        """
        needs = {"num_gpus": 1, "num_cpus": 0} if use_gpu else {"num_cpus": generation.cpus}
        options = {"name": name, "max_restarts": _MAX_RESTARTS, "runtime_env": {"env_vars": _environment(generation)}}
        remote = ray.remote(GenerationActor).options(**needs, **options)
        generator = cls(remote.remote(model_path, generation, max_model_len, use_gpu, seed), name, generation)
        asked = ", ".join(f"{key}={value:g}" for key, value in needs.items())
        try:
            generator._wait("ready", f"to be placed ({asked}) and to start", "start_timeout_s")
        except (WaitTimeoutError, GeneratorLostError):
            generator.stop()
            raise
        return generator

    @classmethod
    def connect(cls, name: str, generation: Generation) -> Generator:
        """The running generator of this name. Raises GeneratorLostError where there is none."""
        try:
            return cls(ray.get_actor(name), name, generation)
        except ValueError:
            raise GeneratorLostError(f"there is no running generator {name!r} on this cluster") from None

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Replace all weights, in memory: a whole state dict with a tied head written out, as float32."""
        arrays = {tensor_name: tensor.detach().float().cpu().numpy() for tensor_name, tensor in named_tensors}
        self._wait("sync", f"to take weights {version!r}", "sync_timeout_s", ray.put(arrays), version)

    def load_checkpoint(self, path: str, version: str) -> None:
        """Replace all weights by those of a transformers folder that the actor's node can read."""
        self._wait("load_checkpoint", f"to load {path}", "sync_timeout_s", path, version)

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> _Asked:
        """Ask for one rollout per prompt when the result is wanted."""
        return _Asked(lambda: self.generate(prompts, sampling, version))

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        """One rollout per prompt, in order.

        Raises StaleWeightsError where the actor does not hold `version`, WaitTimeoutError after
        `generation.generate_timeout_s`, GeneratorLostError where the actor is gone for good.
        """
        if not prompts:
            return []
        what = f"to generate {len(prompts)} responses with weights {version!r}"
        return self._wait("generate", what, "generate_timeout_s", ray.put(prompts), sampling, version)

    def version(self) -> str | None:
        """The version of the weights that the actor holds."""
        return self._wait("version", "to tell its weight version", "sync_timeout_s")

    def stop(self) -> None:
        """End the actor and its engine; harmless when it is gone already."""
        ray.kill(self._actor, no_restart=True)

    def _wait(self, method: str, what: str, limit: str, *args: Any) -> Any:
        """Call `method` and wait at most `generation.<limit>` seconds, restarts of the actor included."""
        seconds = getattr(self._generation, limit)
        deadline = time.monotonic() + seconds
        call: Callable[..., Any] = getattr(self._actor, method).remote
        too_late = f"waited {seconds:g} s for generator {self.name!r} {what}; generation.{limit} sets the limit"
        while True:
            try:
                return ray.get(call(*args), timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError:
                raise WaitTimeoutError(too_late) from None
            except ActorUnavailableError:  # being restarted; every method may be called again
                if time.monotonic() + _RETRY_SECONDS >= deadline:
                    raise WaitTimeoutError(f"{too_late} (it was being restarted)") from None
                time.sleep(_RETRY_SECONDS)
            except (ActorDiedError, RayActorError) as error:
                raise GeneratorLostError(f"generator {self.name!r} is gone, while waiting {what}: {error}") from error
