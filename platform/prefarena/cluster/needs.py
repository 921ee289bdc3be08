"""What a comparison would need, from its model's configuration alone: memory of its trainings, room for its files.

Memory is predicted as it is before a training's first step (modeling/memory.py), on a model that has shapes and no
weights, for the longest sequences that the task allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from prefarena.config import BestOfN, Comparison, OffPolicyMethod, OnPolicyMethod, Optimisation, RewardModel
from prefarena.data.plan import LARGEST_PASS
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.layers import recompute_layers
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.lora import add_adapters
from prefarena.modeling.memory import on_shapes, size_of, sum_of_pass, training_memory
from prefarena.modeling.room import LARGEST_MICRO_BATCH, SMALLEST_PASS

_FLOAT = 4  # bytes; master weights are float32


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a prompt, and of a response."""

    prompt: int
    response: int

    @property
    def total(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class _Passes:
    """What decides how much memory a training takes; trainings that agree in it are looked at once.

    scores: of a reward model. responses: to each prompt, one or a pair. number: prompts in a pass. copies: what is held
    beside the model that is passed through, in multiples of its weights.
    """

    scores: bool
    responses: int
    number: int
    copies: int
    training: Optimisation


def num_parameters(settings: PretrainedConfig) -> int:
    """Of the causal language model with these settings."""
    return on_shapes(lambda: AutoModelForCausalLM.from_config(settings)).num_parameters()


def heaviest_training(
    config: Comparison, settings: PretrainedConfig, lengths: Lengths, room: int | None = None
) -> tuple[int, str] | None:
    """Bytes of a worker in the training that needs most, and the key of its micro-batch.

    room: bytes that a worker may take, by which passes that are set to auto are chosen as they will be when training
    begins; None: they are the largest. Without the interpreter's own, about 0.5 GiB. None where a model's shapes depend
    on numbers. PPO trains a critic beside its policy; every on-policy worker holds reference and reward, and the whole
    weights on their way to the generation actors.
    """
    known: dict[_Passes, int | None] = {}
    found = []
    for choices, key in _trainings(config, lengths):
        for passes in choices:
            if passes not in known:
                known[passes] = _memory(config, settings, lengths, passes)
            memory = known[passes]
            if memory is None or room is None or memory <= room:
                break
        if memory is not None:
            found.append((memory, key))
    return max(found, key=lambda one: one[0]) if found else None


def precisions(config: Comparison) -> list[str]:
    """Those that a comparison's trainings compute in, and what measures."""
    trainings = [passes.training for choices, _ in _trainings(config, Lengths(1, 1)) for passes in choices]
    return sorted({training.precision for training in trainings} | {config.scored_in})


def _trainings(config: Comparison, lengths: Lengths) -> list[tuple[list[_Passes], str]]:
    """Each training's passes, or where they are set to auto those that are tried one after another; and their key."""
    off_policy = partial(_off_policy, config, lengths)
    found = []
    if config.reference.train:
        found.append(off_policy(config.reference.training, "reference.training", responses=1))
    if config.task.kind == "text" and isinstance(config.judge, RewardModel):
        found.append(off_policy(config.judge.training, "judge.training", scores=True))
    for entry in config.entries:
        where, method = f"entries.{entry.name}.method", entry.method
        reward = getattr(method, "reward", None)
        if isinstance(reward, RewardModel):
            found.append(off_policy(reward.training, f"{where}.reward.training", scores=True))
        if isinstance(method, OffPolicyMethod):
            found.append(off_policy(method.training, f"{where}.training"))
        elif isinstance(method, OnPolicyMethod):
            # Reference, reward and weights under way; a critic's weights, gradients and two moments.
            copies = 7 if method.kind == "rlhf" else 3
            size, training = method.training.micro_batch_size, Optimisation(precision=method.training.precision)
            numbers = _halves(LARGEST_MICRO_BATCH, 1) if size == "auto" else [size]
            choices = [_Passes(False, 1, number, copies, training) for number in numbers]
            found.append((choices, f"{where}.training.micro_batch_size"))
    return found


def _off_policy(
    config: Comparison,
    lengths: Lengths,
    training: Optimisation,
    where: str,
    *,
    responses: int = 2,
    scores: bool = False,
) -> tuple[list[_Passes], str]:
    size = lengths.prompt + responses * lengths.response
    share = max(1, training.batch_size // config.resources.num_workers)
    budget = training.micro_batch_tokens
    choices = []
    for tokens in _halves(LARGEST_PASS, SMALLEST_PASS) if budget == "auto" else [budget]:
        number = min(share, max(1, tokens // size))  # what is longer goes alone
        choices.append(_Passes(scores, responses, number, 0, training))
    return choices, f"{where}.micro_batch_tokens"


def _halves(largest: int, smallest: int) -> list[int]:
    numbers = [largest]
    while numbers[-1] > smallest:
        numbers.append(numbers[-1] // 2)
    return numbers


def _memory(config: Comparison, settings: PretrainedConfig, lengths: Lengths, passes: _Passes) -> int | None:
    training = passes.training
    module = on_shapes(partial(_module, settings, lengths, training, passes.scores))
    if training.activation_checkpointing:
        recompute_layers(module)
    sizes = [lengths.response] * passes.responses
    loss = partial(sum_of_pass, prompt=lengths.prompt, responses=sizes, number=passes.number)
    need = training_memory(
        module,
        [loss],
        bfloat16=training.precision == "bfloat16",
        num_shards=config.resources.num_workers if config.resources.sharding == "fsdp" and not passes.copies else 1,
    )
    return None if need is None else need.total + passes.copies * size_of(module.parameters())


def _module(settings: PretrainedConfig, lengths: Lengths, training: Optimisation, scores: bool) -> nn.Module:
    wrap: Callable[[PreTrainedModel, int], nn.Module] = ScalarHead if scores else LogProbs
    make: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if scores:
        settings = type(settings).from_dict({**settings.to_dict(), "num_labels": 1})
    model = make.from_config(settings, dtype=torch.float32).eval()
    if training.lora is not None:
        add_adapters(model, training.lora, seed=0)
    return wrap(model, lengths.total)


def disk_needed(config: Comparison, num_parameters: int, data_bytes: int) -> int:
    """Bytes under `output`: models, snapshots, checkpoints of trainings under way, tables.

    Every trained stage leaves its weights. A training under way keeps two checkpoints of weights and both moments
    (PPO's also of the critic). Tables: the data as pairs, and again with log-probs; every seed adds models.
    """
    weights = _FLOAT * num_parameters
    models = 2.0  # base and reference
    checkpoint = 3.0  # weights and two moments
    for entry in config.entries:
        method, each = entry.method, 0.0
        each += isinstance(getattr(method, "reward", None), RewardModel)
        if not isinstance(method, BestOfN):
            each += 1 + getattr(method.training, "num_snapshots", 0)
        if method.kind == "rlhf":
            checkpoint = 6.0
        models += each * len(config.seeds)
    if config.task.kind == "text" and isinstance(config.judge, RewardModel):
        models += 1
    running = 2 * checkpoint * (config.resources.num_groups or len(config.entries) * len(config.seeds))
    return int(weights * (models + running) + 3 * data_bytes)
