"""The client of one generation actor: how it is started, asked with time limits, and what its errors say."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from prefarena.config import Generation
from prefarena.errors import EntryError, WaitTimeoutError
from prefarena.generation.actor import GenerationActor, ServedModel
from prefarena.generation.interface import GeneratorLostError, Sampling, TransferLostError

_MAX_RESTARTS = 3
_RETRY_SECONDS = 1.0
#: Weights that come more slowly than these bytes in a second, over all steps of an update, are taken not to come.
_SLOWEST = 32 * 2**20


def _environment(generation: Generation) -> dict[str, str]:
    """Environment variables set before vLLM is imported: engine in-process, quiet, as many threads as requested CPUs.

    Ranks of an engine over several devices inherit it.
    """
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
    """A pending method call of an actor.

    limit: the setting of `Generation` that bounds the wait. more: seconds beyond it. step: whether it is a step of a
    transfer, in which an actor that was restarted has no part.
    """

    generator: Generator
    method: str
    what: str
    limit: str
    args: tuple[Any, ...]
    step: bool = False
    more: float = 0.0

    def __post_init__(self) -> None:
        self.answer = self._send()

    def _send(self) -> Any:
        return getattr(self.generator.actor, self.method).remote(*self.args)

    def result(self, deadline: float | None = None) -> Any:
        """Return what the method returns. Waits until `deadline` (by default the limit from now), restarts included.

        While Ray restarts a lost actor the call is sent again, as every method may be, except a step of a transfer,
        which raises TransferLostError.
        """
        seconds = getattr(self.generator.settings, self.limit) + self.more
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
                raise GeneratorLostError(f"generator {name!r} is gone while waiting {self.what}: {reason}") from error
            except RayTaskError as error:
                if isinstance(error.cause, EntryError):  # its sentence, without the actor's traceback
                    raise error.cause from None
                raise


def all_of(calls: Sequence[Call], deadline: float) -> list[Any]:
    """Return each call's result. Raises what the first to fail raises, however long the others would take."""
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
        self._group: PlacementGroup | None = None

    @classmethod
    def begin(
        cls, model_path: str, settings: Generation, max_model_len: int, use_gpu: bool, name: str, seed: int
    ) -> Generator:
        """Start the actor; `call_dtype` answers when its engine is up.

        An engine over several devices has a placement group: they are on one node, and stay reserved while the actor is
        restarted.
        """
        devices = settings.tensor_parallel
        needs = {"num_gpus": settings.gpus, "num_cpus": 0} if use_gpu else {"num_cpus": settings.cpus}
        needs = {kind: number * devices for kind, number in needs.items()}
        options = {"name": name, "max_restarts": _MAX_RESTARTS, "runtime_env": {"env_vars": _environment(settings)}}
        generator = cls(None, name, settings)
        if devices > 1:
            generator._group = _reserved(needs, settings)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(generator._group)
        elif settings.labels:
            options["label_selector"] = dict(settings.labels)
        remote = ray.remote(GenerationActor).options(**needs, **options)
        generator.actor = remote.remote(model_path, settings, max_model_len, use_gpu, seed)
        asked = [f"{key}={value:g}" for key, value in needs.items()]
        generator._needs = ", ".join(asked + [f"{label}: {wanted}" for label, wanted in settings.labels])
        return generator

    @classmethod
    def connect(cls, name: str, settings: Generation) -> Generator:
        """Connect to the running generator of this name. Raises GeneratorLostError where there is none."""
        try:
            return cls(ray.get_actor(name), name, settings)
        except ValueError:
            raise GeneratorLostError(f"there is no running generator {name!r} on this cluster") from None

    def call(self, method: str, what: str, limit: str, *args: Any) -> Call:
        """Call a method of the actor; returns at once."""
        return Call(self, method, what, limit, args)

    def call_step(self, method: str, what: str, *args: Any) -> Call:
        """Call a step of a transfer between devices; returns at once. Whoever asks for it bounds the wait."""
        return Call(self, method, what, "sync_timeout_s", args, step=True)

    def call_update(self, method: str, what: str, *args: Any, step: bool = False) -> Call:
        """Call for an update, with a limit that grows with the model, which the actor must have been asked for.

        step: as in a Call; otherwise it is a whole update, or its beginning, which can be asked for again.
        """
        return Call(self, method, what, "sync_timeout_s", args, step=step, more=self.more_seconds)

    @cached_property
    def served(self) -> ServedModel:
        """Facts about its model."""
        return self.call("model", "to report its model", "sync_timeout_s").result()

    @property
    def more_seconds(self) -> float:
        """Seconds that an update may take beyond `sync_timeout_s`, in proportion to the number of weights."""
        return float(self.served.num_bytes // _SLOWEST)

    def call_dtype(self) -> Call:
        """Answers with the engine's dtype when it is up."""
        placed = f"to be placed ({self._needs}) and to start" if self._needs else "to start"
        return self.call("dtype", placed, "start_timeout_s")

    def call_generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, version: str) -> Call:
        what = f"to generate {len(prompts)} responses with weights {version!r}"
        return self.call("generate", what, "generate_timeout_s", prompts, seeds, sampling, version)

    @property
    def sync_limit_s(self) -> float:
        """Longest wait for a step of an update."""
        return self.settings.sync_timeout_s + self.more_seconds

    def version(self) -> str | None:
        """The version of the weights that the actor holds."""
        return self.call("version", "to report its weight version", "sync_timeout_s").result()

    def restart(self) -> None:
        """End the actor's process, whatever it is doing; Ray starts it again as after a death."""
        ray.kill(self.actor, no_restart=False)

    def stop(self) -> None:
        """End the actor and its engine; harmless when it is gone already."""
        ray.kill(self.actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _reserved(needs: Mapping[str, float], settings: Generation) -> PlacementGroup:
    """Reserve room for one actor on one node; it is freed at the latest when the process that asked for it ends."""
    bundle = {kind.removeprefix("num_").upper().removesuffix("S"): number for kind, number in needs.items() if number}
    labels = [dict(settings.labels)] if settings.labels else None
    return placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=labels)
