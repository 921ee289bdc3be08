"""What an engine does with new weights of a model family: measured for tests and for `python -m benchmarks.families`.

Each family gets a tiny random model and an engine, one after another. The engine is sent other weights than it was
started with, samples, and its log-probs are held against those of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from transformers import PreTrainedModel

from prefarena.config import Generation
from prefarena.generation.actor import GenerationActor, _environment
from prefarena.generation.interface import Sampling, WeightMismatchError
from prefarena.generation.weights import Verified, as_arrays, checksums
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, collate, token_logps
from prefarena.modeling.support import why_not_packed
from prefarena.records import Rollout
from tests.models import random_model, save_model
from tests.tiny import BOS, FIRST_LETTER

LARGEST_GAP = 1e-3
_MAX_LENGTH = 48
_PROMPTS = [[BOS, FIRST_LETTER + i % 11, FIRST_LETTER + 3 * i % 11] for i in range(16)]


@dataclass(frozen=True)
class Served:
    """What an engine did with new weights.

    unnoticed: tensors that were read back, of which other numbers than those announced raised no error.
    """

    rollouts: list[Rollout]
    verified: Verified
    unnoticed: list[str]


def serve(folder: str, arrays: dict[str, np.ndarray]) -> Served:
    """Start an engine in this process and give it these weights, right ones and wrong ones."""
    actor = GenerationActor(folder, Generation(), _MAX_LENGTH, use_gpu=False, seed=0)
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    sums = checksums(state, torch.float32)
    unnoticed = []
    for name in state:
        if ".1." in name:  # layers are alike
            continue
        # A tied head goes with its embedding: engines take one of the two.
        changed = state[name].roll(1) + 0.25
        wrong = {other: changed if torch.equal(tensor, state[name]) else tensor for other, tensor in state.items()}
        try:
            actor.load(as_arrays(wrong), sums, "wrong")
        except WeightMismatchError:
            continue
        unnoticed.append(name)
    actor.load_checkpoint(folder, verify=True, version="stored")
    verified = actor.load(arrays, sums, "new")
    rollouts = actor.generate(_PROMPTS, list(range(len(_PROMPTS))), Sampling(8, 1.0, seed=0), "new")
    assert verified is not None
    return Served(rollouts, verified, [name for name in unnoticed if name not in verified.skipped])


@dataclass(frozen=True)
class Outcome:
    """gap: largest difference (nats) of token log-probs to transformers with the new weights; old_gap: with the old."""

    why_not_packed: str | None
    gap: float
    old_gap: float
    verified: Verified
    unnoticed: list[str]


def make(folder: Path, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model at `folder`, and the same with other weights."""
    save_model(folder, random_model(family))
    old, new = load_policy(folder), load_policy(folder)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return old, new


def compare(old: PreTrainedModel, new: PreTrainedModel, served: Served) -> Outcome:
    gaps = [_gap(model, served.rollouts) for model in (new, old)]
    return Outcome(why_not_packed(new, _MAX_LENGTH), gaps[0], gaps[1], served.verified, served.unnoticed)


def _gap(policy: PreTrainedModel, rollouts: list[Rollout]) -> float:
    sequences = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], pad_id=0)
    with torch.no_grad():
        expected = token_logps(LogProbs(policy), sequences, 1.0)[sequences.response_mask]
    return (expected - torch.tensor([logp for r in rollouts for logp in r.token_logps])).abs().max().item()


@contextmanager
def engine_process() -> Iterator[Any]:
    """A function that runs `serve` in one process with an engine's environment, which ends with this."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not importable there

    class Process:
        def run(self, function: Any, *arguments: Any) -> Any:
            return function(*arguments)

    environment = {"env_vars": _environment(Generation())}
    remote: Any = ray.remote(Process)
    process = remote.options(runtime_env=environment, num_cpus=1).remote()
    try:
        yield lambda *arguments: ray.get(process.run.remote(serve, *arguments), timeout=300)
    finally:
        ray.kill(process)
