"""Shows that our PPO and TRL's optimise the same thing: rollouts that TRL made, through our trainer.

TRL's numbers are what its own `train()` computed (see trl_ppo.py), kept on disk. Ours come from the trainer that runs
in production, given the same rollouts by a source that holds them. What differs by convention and is made equal here:

- TRL whitens by the sample deviation (N - 1 tokens), we by the population's: a factor sqrt((N - 1) / N).
- TRL has one loss, policy + vf_coef * value, and one optimizer; we have two. Adam does not see the factor, and neither
  has gradients clipped here, so both move alike; the critic's gradient is compared after dividing by vf_coef.
- TRL pads prompts on the left, we whole sequences on the right.
- Where a response ends with eos, TRL puts the score on the padding after it, so that its value loss has one more token.
  There the advantages and returns are TRL's on both sides, and losses are compared on the tokens that both have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from ppo_ours import make_job
from safetensors.torch import load_file
from torch import Tensor, nn

from prefarena.generation.interface import Sampling
from prefarena.records import Rollout
from prefarena.training.experience import Experience
from prefarena.training.learner import Learner, Pass
from prefarena.training.on_policy import OnPolicyTrainer, Phases
from prefarena.training.on_policy_batch import Batch, learnable
from prefarena.training.worker import Worker

#: Largest difference that counts as the same, relative to the quantity's size.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Done:
    """Rollouts that were there before they were asked for."""

    rollouts: list[Rollout]

    def result(self) -> list[Rollout]:
        return self.rollouts


class FrozenSource:
    """Answers every request with the rollouts that TRL made; `logps` are those of its own sampler."""

    def __init__(self, frozen: dict[str, np.ndarray], pad_id: int, eos_id: int) -> None:
        context = int(frozen["context_length"])
        self._rows = []
        for ids, logps in zip(frozen["sequences"], frozen["logps"], strict=True):
            prompt = [int(token) for token in ids[:context] if token != pad_id]
            response = [int(token) for token in ids[context:] if token != pad_id]
            self._rows.append((prompt, response, logps[: len(response)].tolist(), response[-1] == eos_id))

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        return None

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
        return Done([Rollout(*row, weight_version=version) for row in self._rows])

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return self.submit(prompts, sampling, version).result()


@dataclass(frozen=True)
class Difference:
    """Of one quantity: the largest absolute difference, over the quantity's own size (root mean square)."""

    name: str
    largest: float
    relative: float


def difference(name: str, ours: Any, theirs: Any, scale: float | None = None) -> Difference:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    size = math.sqrt(float((theirs**2).mean())) if scale is None else scale
    largest = float(np.abs(ours - theirs).max())
    return Difference(name, largest, largest / size)


@dataclass(frozen=True)
class Parity:
    """What was compared, and what shows that the comparison bites: tokens, and the shares that clipping acts on."""

    differences: list[Difference]
    num_tokens: int
    clipped_ratios: float
    clipped_values: float

    @property
    def same(self) -> bool:
        return all(found.relative <= TOLERANCE for found in self.differences)


class Frozen:
    """TRL's tensors, [B, R] over response positions, read where our masks are true ([B, T-1], the same order)."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            self.arrays: dict[str, np.ndarray] = dict(arrays)

    def at_responses(self, name: str) -> Tensor:
        """The values at response tokens, row by row, [N]."""
        return torch.from_numpy(self.arrays[name][self.arrays["mask"]])

    def like(self, values: Tensor, mask: Tensor) -> Tensor:
        """[N] values as [B, T-1], zero outside `mask`."""
        return torch.zeros(mask.shape).masked_scatter(mask, values)


def compare(spec: dict[str, Any]) -> Parity:
    """Differences of everything from log-probs to gradients."""
    frozen = Frozen(spec["frozen"])
    spec = spec | {"rollouts": spec["frozen_rollouts"]}
    job = make_job(spec, "frozen", "synchronous")
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir), FrozenSource(frozen.arrays, spec["pad"], spec["eos"]))
    experience = trainer.make_experience(Phases())
    batch = learnable(experience, job.training, spec["kl_coef"]).batch
    found = _compare_models(experience, frozen)
    returns = frozen.at_responses("raw_advantages") + frozen.at_responses("values")
    if spec["ends_early"]:
        batch = replace(
            batch,
            advantages=frozen.like(frozen.at_responses("advantages"), batch.mask),
            returns=frozen.like(returns, batch.mask),
        )
    else:
        count = int(batch.mask.sum())
        batch = replace(batch, advantages=batch.advantages * math.sqrt((count - 1) / count))
        found.append(difference("advantages", batch.advantages[batch.mask], frozen.at_responses("advantages")))
        found.append(difference("returns", _present(batch.returns)[batch.mask], returns))
    found += _compare_update(trainer, batch, frozen, spec)
    clipped = (float(frozen.arrays[f"{name}_clip_fraction"]) for name in ("policy", "value"))
    return Parity(found, int(batch.mask.sum()), *clipped)


def _compare_models(experience: Experience, frozen: Frozen) -> list[Difference]:
    mask = experience.sequences.response_mask
    named = {
        "log-probs": (experience.old_logps, "logps"),
        "reference log-probs": (experience.reference_logps, "reference_logps"),
        "values": (_present(experience.values), "values"),
    }
    found = [difference("scores", experience.scores, frozen.arrays["scores"])]
    return found + [difference(name, ours[mask], frozen.at_responses(key)) for name, (ours, key) in named.items()]


def _compare_update(trainer: OnPolicyTrainer, batch: Batch, frozen: Frozen, spec: dict[str, Any]) -> list[Difference]:
    """Losses and gradients of the whole batch at the perturbed weights; on our side in micro-batches."""
    found = []
    rows = torch.arange(len(batch))
    parts, count = trainer.parts(batch, rows), trainer.count(batch, rows)
    for learner, term in trainer.terms(spec["kl_coef"]):
        kind = "policy" if learner.name == "policy" else "value"
        module = learner.module.get_submodule("model")
        path = spec["perturbed_policy" if kind == "policy" else "perturbed_critic"]
        module.load_state_dict(load_file(f"{path}/model.safetensors"))
        outputs = learner.accumulate(Pass(partial(term, part), 1 / count) for part in parts)
        loss = sum(float(output.metrics[f"{kind}/loss"].total) for output in outputs) / float(count)
        theirs = frozen.at_responses(f"{kind}_losses").double() * (1.0 if kind == "policy" else 0.5)
        size = float(theirs.abs().mean())
        found.append(difference(f"{kind} loss", loss, float(theirs.mean()), size))
        if kind == "policy" or not spec["ends_early"]:
            found.append(_gradient_difference(kind, learner, module, frozen, spec))
    return found


def _gradient_difference(
    kind: str, learner: Learner, module: nn.Module, frozen: Frozen, spec: dict[str, Any]
) -> Difference:
    """Over all weights: the norm of the difference, over the norm of TRL's gradient."""
    prefix, factor = ("policy", 1.0) if kind == "policy" else ("value_model", spec["vf_coef"])
    squares = [0.0, 0.0]
    for name, parameter in module.named_parameters():
        theirs = torch.from_numpy(frozen.arrays[f"gradient/{prefix}/{name}"]).double() / factor
        ours = torch.zeros_like(theirs) if parameter.grad is None else parameter.grad.double()
        squares[0] += float(((ours - theirs) ** 2).sum())
        squares[1] += float((theirs**2).sum())
    return Difference(f"{kind} gradient", math.sqrt(squares[0]), math.sqrt(squares[0] / squares[1]))


def _present(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
