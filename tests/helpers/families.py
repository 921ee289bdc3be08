"""What an engine does with new weights of a model family: measured for tests and for `python -m benchmarks.families`.

Each family gets a tiny random model and an engine, one after another. The engine is sent other weights than it was
started with, samples, and its log-probs are held against those of transformers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import cloudpickle
from transformers import PreTrainedModel

from prefarena.config import Generation
from prefarena.generation.actor import GenerationActor
from prefarena.generation.checksums import checksums
from prefarena.generation.client import _environment
from prefarena.generation.interface import Sampling, WeightMismatchError
from prefarena.generation.weights import Sums, Verified
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, Sequences, token_logps
from prefarena.modeling.support import why_not_packed
from prefarena.records import Rollout
from tests.helpers.models import random_model, save_model
from tests.helpers.tiny import BOS, FIRST_LETTER

LARGEST_GAP = 1e-3
MAX_LENGTH = 48
_DEFAULT = Generation()
PROMPTS = [[BOS, FIRST_LETTER + i % 11, FIRST_LETTER + 3 * i % 11] for i in range(16)]


@dataclass(frozen=True)
class Served:
    """What an engine did with new weights.

    start_seconds: until it was up. unnoticed: tensors that were read back, of which other numbers than those announced
    raised no error.
    """

    start_seconds: float
    rollouts: list[Rollout]
    verified: Verified
    unnoticed: list[str]


def serve(
    folder: str, state: dict[str, torch.Tensor], generation: Generation = _DEFAULT, use_gpu: bool = False
) -> Served:
    """Start an engine in this process and give it these weights, right ones and wrong ones."""
    began = time.perf_counter()
    actor = GenerationActor(folder, generation, MAX_LENGTH, use_gpu=use_gpu, seed=0)
    start_seconds = time.perf_counter() - began
    sums = Sums(checksums(state, getattr(torch, actor.dtype()), actor.model().transposed))
    unnoticed = []
    for name in state:
        if ".1." in name:  # layers are alike
            continue
        # A tied head goes with its embedding: engines take one of the two.
        changed = state[name].roll(1) + 0.25
        wrong = {other: changed if torch.equal(tensor, state[name]) else tensor for other, tensor in state.items()}
        try:
            actor.load(wrong, sums, "wrong")
        except WeightMismatchError:
            continue
        unnoticed.append(name)
    actor.load_checkpoint(folder, verify=True, version="stored")
    verified = actor.load(state, sums, "new")
    rollouts = actor.generate(PROMPTS, list(range(len(PROMPTS))), Sampling(8, 1.0, seed=0), "new")
    assert verified is not None
    return Served(start_seconds, rollouts, verified, [name for name in unnoticed if name not in verified.skipped])


@dataclass(frozen=True)
class Outcome:
    """gap: largest difference (nats) of token log-probs to transformers with the new weights; old_gap: with the old."""

    why_not_packed: str | None
    gap: float
    old_gap: float
    verified: Verified
    unnoticed: list[str]


def make(folder: Path, family: str, **changed: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model at `folder`, and the same with other weights. changed: settings of its configuration."""
    save_model(folder, random_model(family, **changed))
    return load_policy(folder), perturbed(load_policy(folder), seed=1)


def perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same model, its weights changed by random numbers."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.device))
    return model


def compare(old: PreTrainedModel, new: PreTrainedModel, served: Served) -> Outcome:
    gaps = [_gap(model, served.rollouts) for model in (new, old)]
    return Outcome(why_not_packed(new, MAX_LENGTH), gaps[0], gaps[1], served.verified, served.unnoticed)


def _gap(policy: PreTrainedModel, rollouts: list[Rollout]) -> float:
    return (expected_logps(policy, rollouts) - given_logps(rollouts)).abs().max().item()


def given_logps(rollouts: list[Rollout]) -> torch.Tensor:
    """The engine's log-probs of all response tokens, [N]."""
    return torch.tensor([logp for r in rollouts for logp in r.token_logps])


def expected_logps(policy: PreTrainedModel, rollouts: list[Rollout]) -> torch.Tensor:
    """Those of transformers, [N]."""
    sequences = Sequences.of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    with torch.no_grad():
        return token_logps(LogProbs(policy), sequences, 1.0)[sequences.response_mask]


@contextmanager
def process_for_engine(generation: Generation, num_gpus: float = 0) -> Iterator[Callable[..., Any]]:
    """Calls a function with arguments in one process with an engine's environment, which ends with this."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not importable there

    class Process:
        def run(self, function: Any, *arguments: Any) -> Any:
            return function(*arguments)

    environment = {"env_vars": _environment(generation)}
    remote: Any = ray.remote(Process)
    process = remote.options(runtime_env=environment, num_cpus=1, num_gpus=num_gpus).remote()
    try:
        yield lambda function, *arguments: ray.get(process.run.remote(function, *arguments), timeout=300)
    finally:
        ray.kill(process)


@contextmanager
def engine_process() -> Iterator[Callable[..., Served]]:
    """`serve` in such a process."""
    with process_for_engine(_DEFAULT) as call:
        yield partial(call, serve)
