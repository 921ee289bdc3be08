"""The memory and disk space that a comparison would need, from its model's configuration only.

Memory is predicted as it is before a training's first step (modeling/memory.py), on a model that has shapes and no
weights, for the longest sequences that the task allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from prefarena.cluster.capacity import share_beside_engine
from prefarena.config import (
    BestOfN,
    Comparison,
    OffPolicyMethod,
    OnPolicyMethod,
    Optimisation,
    RewardModel,
    reward_of,
)
from prefarena.data.plan import LARGEST_PASS
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.layers import recompute_layers
from prefarena.modeling.load import scoring_settings
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.lora import add_adapters
from prefarena.modeling.memory import MemoryNeed, Spread, on_shapes, sum_of_pass, training_memory, with_models
from prefarena.modeling.room import LARGEST_MICRO_BATCH, SMALLEST_PASS
from prefarena.settings.judges import is_model
from prefarena.settings.on_policy import CriticTraining
from prefarena.settings.optimisation import LearnerSettings
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy_memory import memory_need
from prefarena.training.on_policy_models import Shapes, models_from
from prefarena.training.prediction import required_mib

_FLOAT = 4  # bytes; master weights are float32
_MIB = 2**20


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a prompt, and of a response."""

    prompt: int
    response: int

    @property
    def total(self) -> int:
        return self.prompt + self.response


class Heaviest(NamedTuple):
    """The training that needs most: its bytes on a worker, and the key of its micro-batch.

    on_policy: the generation actors are there beside it. host: bytes of the host's memory that it takes beside a GPU's.
    resting: of `memory` what it holds between two updates.
    """

    memory: int
    key: str
    on_policy: bool = False
    host: int = 0
    resting: int = 0


@dataclass(frozen=True)
class Training:
    """One training of a comparison, before its models are known.

    where: the key of its settings; size_key: of its micro-batch, within them. sizes: what a pass may hold, the largest
    first; several where it is auto. need: of a model's settings, the longest sequences and such a size.
    """

    where: str
    size_key: str
    settings: LearnerSettings
    sizes: tuple[int, ...]
    need: Callable[[PretrainedConfig, Lengths, int], MemoryNeed | None]
    on_policy: bool = False

    @property
    def key(self) -> str:
        return f"{self.where}.{self.size_key}"


def num_parameters(settings: PretrainedConfig) -> int:
    """The number of parameters of the causal language model with these settings."""
    return on_shapes(lambda: AutoModelForCausalLM.from_config(settings)).num_parameters()


def heaviest_training(
    config: Comparison, settings: PretrainedConfig, lengths: Lengths, room: int | None = None
) -> Heaviest | None:
    """The training that needs most of a worker, in passes of the sizes that will be chosen when it begins.

    room: bytes that a worker may take, by which sizes that are set to auto are chosen; None: they are the largest.
    Needs are without what the process holds beside its job, and without what its allocator keeps. None where a model's
    shapes depend on numbers.
    """
    found, known = [], dict[Any, MemoryNeed | None]()
    for training in trainings(config):

        def need(size: int, training: Training = training) -> MemoryNeed | None:
            same = (training.need, size)
            if same not in known:
                known[same] = training.need(settings, lengths, size)
            return known[same]

        size = chosen_size(training, need, room, config)
        if (held := need(size)) is not None:
            found.append(
                Heaviest(held.total, training.key, training.on_policy, held.host, held.weights + held.optimizer)
            )
    return max(found, key=lambda one: one.memory / _part(config, one), default=None)


def _part(config: Comparison, one: Heaviest) -> float:
    """The part of a GPU that a worker has in this training run."""
    return share_beside_engine(config) if one.on_policy else config.resources.gpus_per_worker


def chosen_size(
    training: Training, need: Callable[[int], MemoryNeed | None], room: int | None, config: Comparison
) -> int:
    """The largest size of a pass that fits, else the smallest.

    A larger one needs more, so it is found by halving; but each need takes seconds, and where models are small the
    largest size fits.
    """
    sizes, on_cpu = training.sizes, not config.resources.use_gpu
    if room is None or len(sizes) == 1:
        return sizes[0]

    def fits(size: int) -> bool:
        held, spares = need(size), training.settings.spares_memory or bool(spread_of(config))
        return held is not None and required_mib(held, on_cpu=on_cpu, spares=spares) * _MIB <= room

    if fits(sizes[0]):
        return sizes[0]
    smaller, larger = 1, len(sizes) - 1
    while smaller < larger:
        middle = (smaller + larger) // 2
        if fits(sizes[middle]):
            larger = middle
        else:
            smaller = middle + 1
    return sizes[smaller]


def least_need(training: Training, settings: PretrainedConfig) -> MemoryNeed | None:
    """The least that a worker (rank 0) holds: in its smallest pass, however short all sequences are."""
    return training.need(settings, Lengths(1, 1), min(training.sizes))


def precisions(config: Comparison) -> list[Arithmetic]:
    """The precisions in which a comparison trains and measures."""
    return sorted({training.settings.precision for training in trainings(config)} | {config.scored_in})


def trainings(config: Comparison) -> list[Training]:
    """All training runs of a comparison, including those of reward models."""
    off_policy = partial(_off_policy, config)
    found = []
    if config.reference.train:
        found.append(off_policy(config.reference.training, "reference.training", responses=1))
    if config.trained_judge is not None:
        found.append(off_policy(config.trained_judge.training, "judge.training", scores=True))
    for entry in config.entries:
        where, method = f"entries.{entry.name}.method", entry.method
        keyed = reward_of(method)
        if keyed is not None and isinstance(keyed[1], RewardModel):
            found.append(off_policy(keyed[1].training, f"{where}.{keyed[0]}.training", scores=True))
        if isinstance(method, OffPolicyMethod):
            beside = 0 if keyed is None else 1 + is_model(keyed[1])
            terms = 1 + (method.demonstration_weight > 0) + (method.pretraining_weight > 0)
            found.append(off_policy(method.training, f"{where}.training", beside=beside, terms=terms))
        elif isinstance(method, OnPolicyMethod):
            chosen = method.training.micro_batch_size
            found.append(
                Training(
                    f"{where}.training",
                    "micro_batch_size",
                    method.training,
                    _halves(LARGEST_MICRO_BATCH, 1) if chosen == "auto" else (chosen,),
                    _OnPolicy(config, method),
                    on_policy=True,
                )
            )
    return found


def spread_of(config: Comparison) -> Spread:
    """How the models of a training run are spread over workers."""
    resources = config.resources
    return Spread(resources.num_workers if resources.sharding == "fsdp" else 1, resources.cpu_offload)


def _off_policy(
    config: Comparison,
    training: Optimisation,
    where: str,
    *,
    responses: int = 2,
    scores: bool = False,
    beside: int = 0,
    terms: int = 1,
) -> Training:
    """The need of off-policy training. beside: frozen models that a worker holds if the policy responds on the way.

    terms: of the loss, each of which makes its own passes in a step.
    """
    tokens = training.micro_batch_tokens
    return Training(
        where,
        "micro_batch_tokens",
        training,
        _halves(LARGEST_PASS, SMALLEST_PASS) if tokens == "auto" else (tokens,),
        _OffPolicy(
            _of_memory(training), responses, scores, config.resources.num_workers, spread_of(config), beside, terms
        ),
        on_policy=beside > 0,
    )


def _of_memory(training: Optimisation) -> Optimisation:
    """Keep the settings that memory depends on and reset the others, so that runs with equal needs are equal."""
    names = ("batch_size", "precision", "lora", "activation_checkpointing")
    return Optimisation(**{name: getattr(training, name) for name in names})


def _halves(largest: int, smallest: int) -> tuple[int, ...]:
    numbers = [largest]
    while numbers[-1] > smallest:
        numbers.append(numbers[-1] // 2)
    return tuple(numbers)


@dataclass(frozen=True)
class _OffPolicy:
    """The memory that a training on a table needs; trainings with equal needs are examined once.

    responses: to each prompt, one or a pair. scores: of a reward model. beside: frozen models of about its size. terms:
    of the loss; with several, or with several passes over one, gradients exist while a pass runs.
    """

    training: Optimisation
    responses: int
    scores: bool
    num_workers: int
    spread: Spread
    beside: int = 0
    terms: int = 1

    def __call__(self, settings: PretrainedConfig, lengths: Lengths, tokens: int) -> MemoryNeed | None:
        """The need in passes of so many tokens; a longer sequence gets a pass of its own."""
        share = max(1, self.training.batch_size // self.num_workers)
        number = min(share, max(1, tokens // (lengths.prompt + self.responses * lengths.response)))
        module = on_shapes(partial(self._module, settings, lengths))
        if self.training.activation_checkpointing:
            recompute_layers(module)
        sizes = [lengths.response] * self.responses
        loss = partial(sum_of_pass, prompt=lengths.prompt, responses=sizes, number=number)
        halved = self.training.precision == "bfloat16"
        accumulates = self.terms > 1 or number < share
        need = training_memory(module, [loss], bfloat16=halved, accumulates=accumulates, spread=self.spread)
        return None if need is None else with_models(need, module, self.beside, self.spread)

    def _module(self, settings: PretrainedConfig, lengths: Lengths) -> nn.Module:
        wrap: Callable[[PreTrainedModel, int], nn.Module] = ScalarHead if self.scores else LogProbs
        make: Any = AutoModelForSequenceClassification if self.scores else AutoModelForCausalLM
        model = make.from_config(scoring_settings(settings) if self.scores else settings, dtype=torch.float32).eval()
        if self.training.lora is not None:
            add_adapters(model, self.training.lora, seed=0)
        return wrap(model, lengths.total)


@dataclass(frozen=True)
class _OnPolicy:
    """The memory that an on-policy training needs, by the function that its workers call before their first step."""

    config: Comparison
    method: OnPolicyMethod

    def __call__(self, settings: PretrainedConfig, lengths: Lengths, size: int) -> MemoryNeed | None:
        """The need in passes of so many rollouts."""
        job = self.job(lengths)
        models = on_shapes(lambda: models_from(Shapes(settings, job), job, (lengths.total,)))
        if job.training.activation_checkpointing:
            for module in models.to_prepare():
                recompute_layers(module)
        on_gpu = self.config.resources.use_gpu
        return memory_need(job, models, lengths.prompt, size, spread_of(self.config), on_gpu=on_gpu)

    def job(self, lengths: Lengths) -> OnPolicyJob:
        """The job, as far as memory depends on it: there are no folders yet."""
        config, method = self.config, self.method
        judge = config.trained_judge
        return OnPolicyJob(
            "",
            "",
            "",
            0,
            training=method.training,
            reward=JudgeSpec(method.reward, "reward", "", arithmetic=config.scored_in),
            prompts="",
            covered_only=False,
            generators=(),
            generation=config.generation,
            response_limit=lengths.response,
            monitor=None if judge is None else JudgeSpec(judge, "judge", "", arithmetic=config.scored_in),
            max_length=lengths.total,
        )


def disk_needed(config: Comparison, num_parameters: int, data_bytes: int) -> int:
    """Bytes under `output`: models, snapshots, checkpoints of trainings under way, tables.

    Every trained stage leaves its weights. A training under way keeps two checkpoints of weights and both moments
    (with a critic also of that, and with a reference that moves its weights). Tables: the data as pairs, and again with
    log-probs; every seed adds models.
    """
    weights = _FLOAT * num_parameters
    models = 2.0  # base and reference
    checkpoint = 3.0  # weights and two moments
    for entry in config.entries:
        method, each = entry.method, 0.0
        each += (keyed := reward_of(method)) is not None and isinstance(keyed[1], RewardModel)
        if not isinstance(method, BestOfN):
            each += 1 + getattr(method.training, "num_snapshots", 0)
        if isinstance(method, OnPolicyMethod):
            learned = 1 + isinstance(method.training, CriticTraining)
            checkpoint = max(checkpoint, 3.0 * learned + (method.training.reference_every is not None))
        models += each * len(config.seeds)
    if config.trained_judge is not None:
        models += 1
    running = 2 * checkpoint * (config.resources.num_groups or len(config.entries) * len(config.seeds))
    return int(weights * (models + running) + 3 * data_bytes)
