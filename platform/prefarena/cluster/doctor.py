"""What a comparison would need, and whether a cluster has it: predictions and verdicts, without any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefarena.cluster.capacity import Demand, Node, demands, describe, fitting
from prefarena.cluster.probe import PACKAGES, NodeReport
from prefarena.config import BestOfN, Comparison, OffPolicyMethod, Optimisation, RewardModel

_FLOAT = 4  # bytes; master weights are float32
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A causal language model's sizes."""

    num_parameters: int
    width: int
    inner_width: int
    num_layers: int
    vocab_size: int


@dataclass(frozen=True)
class Finding:
    """A sentence, and whether it is a problem (True), in order (False), or only to be known (None)."""

    problem: bool | None
    text: str


# --------------------------------------------------------------------------------------- predictions


def training_memory(
    shape: Shape, num_tokens: int, num_trained: float = 1, num_frozen: float = 0, recomputed: bool = False
) -> int:
    """Bytes of a training worker at its peak, without the interpreter's own (about 0.5 GiB).

    num_trained, num_frozen: models, or shares of them. Trained: weights, gradients and both of Adam's moments, 16 bytes
    a parameter; frozen: 4. Activations of one micro-batch, kept for the backward pass, in floats a token: per layer 10
    of the width (input, two norms, query, key, value, attention's result and projection, two sums) and 4 of the inner
    width (gate, up, its activation, their product); recomputed layers keep their input, and one at a time all of it.
    At the end 3 of the vocabulary (logits, their log-softmax, its gradient; less where the head goes through its tokens
    in chunks).
    """
    layer = 10 * shape.width + 4 * shape.inner_width
    layers = shape.num_layers * shape.width + layer if recomputed else shape.num_layers * layer
    models = 4 * _FLOAT * num_trained + _FLOAT * num_frozen
    return int(models * shape.num_parameters) + _FLOAT * num_tokens * (layers + 3 * shape.vocab_size)


def heaviest_training(config: Comparison, shape: Shape, max_tokens: int) -> tuple[int, str]:
    """Bytes of the training that needs most, and the key of its micro-batch.

    Pairs are two sequences. PPO trains a critic too, and holds reference and reward; groups hold reference and reward.
    """
    found = []
    if config.reference.train:
        found.append(_supervised(config, shape, config.reference.training, max_tokens, "reference.training"))
    if config.task.kind == "text" and isinstance(config.judge, RewardModel):
        found.append(_supervised(config, shape, config.judge.training, 2 * max_tokens, "judge.training"))
    for entry in config.entries:
        where, method = f"entries.{entry.name}.method", entry.method
        reward = getattr(method, "reward", None)
        if isinstance(reward, RewardModel):
            found.append(_supervised(config, shape, reward.training, 2 * max_tokens, f"{where}.reward.training"))
        if isinstance(method, BestOfN):
            continue
        if isinstance(method, OffPolicyMethod):
            found.append(_supervised(config, shape, method.training, 2 * max_tokens, f"{where}.training"))
            continue
        trained = 2 if method.kind == "rlhf" else 1
        tokens = method.training.micro_batch_size * max_tokens
        found.append((training_memory(shape, tokens, trained, num_frozen=2), f"{where}.training.micro_batch_size"))
    return max(found, default=(0, "entries"))


def _supervised(
    config: Comparison, shape: Shape, training: Optimisation, tokens_each: int, where: str
) -> tuple[int, str]:
    """With LoRA the model is frozen, and adapters of a layer's seven projections are trained; FSDP shares out all."""
    trained, frozen = 1.0, 0.0
    if training.lora is not None:
        sides = 8 * shape.width + 3 * (shape.width + shape.inner_width)
        trained, frozen = training.lora.rank * shape.num_layers * sides / shape.num_parameters, 1.0
    shards = config.resources.num_workers if config.resources.sharding == "fsdp" else 1
    tokens = max(training.micro_batch_tokens, tokens_each)  # what is longer goes alone
    memory = training_memory(shape, tokens, trained / shards, frozen / shards, training.activation_checkpointing)
    return memory, f"{where}.micro_batch_tokens"


def disk_needed(config: Comparison, shape: Shape, data_bytes: int) -> int:
    """Bytes under `output`: models, snapshots, checkpoints of trainings under way, tables.

    Every trained stage leaves its weights. A training under way keeps two checkpoints of weights and both moments
    (PPO's also of the critic). Tables: the data as pairs, and again with log-probs; every seed adds models.
    """
    weights = _FLOAT * shape.num_parameters
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
    running = 2 * checkpoint * max(1, config.resources.concurrent_runs)
    return int(weights * (models + running) + 3 * data_bytes)


# ------------------------------------------------------------------------------------------- verdicts


def judge_nodes(reports: Sequence[NodeReport], silent: Sequence[str], generates: bool) -> list[Finding]:
    """Whether nodes answer, have one set of versions, and whether vLLM and torch fit. The first report is the model."""
    found = [Finding(True, f"node {name} does not answer; mend it, or take it out of the cluster") for name in silent]
    for report in reports:
        listed = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        cards = ", ".join(f"{name} ({memory / _GIB:.0f} GiB)" for name, memory in report.gpus) or "no GPU"
        found.append(Finding(None, f"node {report.node}: {listed}; {cards}"))
        for package in PACKAGES:
            have, want = report.versions.get(package), reports[0].versions.get(package)
            if have != want:
                told = f"node {report.node} has {package} {have}, {reports[0].node} has {want}; use one image"
                found.append(Finding(True, told))
        torch, wanted = report.versions.get("torch"), report.vllm_wants_torch
        if wanted is not None and torch != wanted:
            found.append(Finding(True, f"node {report.node}: its vLLM is built for torch {wanted}, it has {torch}"))
    if generates and reports and "vllm" not in reports[0].versions:
        found.append(Finding(True, "vLLM is not installed, and the comparison generates; pip install '.[gpu]'"))
    return found


def judge_storage(output: str, reports: Sequence[NodeReport], needed: int | None) -> list[Finding]:
    """Whether every node sees the output folder, and whether it has room."""
    blind = [report.node for report in reports if not report.sees_output]
    if blind:
        return [
            Finding(
                True,
                f"output: {', '.join(blind)} cannot read and write what the driver wrote to {output}; give a path on "
                "storage that all nodes share",
            )
        ]
    free = min(report.free_bytes or 0 for report in reports)
    text = f"output: {output} is shared by all nodes, {gibibytes(free)} free"
    if needed is None:
        return [Finding(False, text)]
    if needed > free:
        return [Finding(True, f"{text}, but about {gibibytes(needed)} are needed; free some, or change output")]
    return [Finding(False, f"{text}, about {gibibytes(needed)} needed")]


def judge_capacity(config: Comparison, nodes: Sequence[Node], memory: tuple[int, str] | None) -> list[Finding]:
    """Whether each demand fits, and on CPUs whether its memory does."""
    found = [Finding(None, f"the cluster has {describe(nodes)}")]
    for demand in demands(config):
        if demand.setting == "resources" and memory is not None and not config.resources.use_gpu:
            found += _judge_demand(config, demand, nodes)
            with_memory = replace(demand, each={**demand.each, "memory": memory[0]})
            if fitting(demand, nodes) >= demand.number > fitting(with_memory, nodes):
                found.append(
                    Finding(
                        True,
                        f"{demand.number} training workers of about {gibibytes(memory[0])} each do not fit in the "
                        f"nodes' memory; lower {memory[1]}, or use larger nodes",
                    )
                )
            continue
        found += _judge_demand(config, demand, nodes)
    return found


def _judge_demand(config: Comparison, demand: Demand, nodes: Sequence[Node]) -> list[Finding]:
    room = fitting(demand, nodes)
    if room >= demand.number:
        return [Finding(False, f"{demand}: fits")]
    if config.resources.autoscaled:
        return [Finding(None, f"{demand}: room for {room} now; the cluster has to grow (resources.autoscaled)")]
    return [Finding(True, f"{demand}: room for {room}; change {demand.setting}, or use a larger cluster")]


def judge_memory(config: Comparison, reports: Sequence[NodeReport], memory: tuple[int, str] | None) -> list[Finding]:
    """The prediction, and on GPUs whether a worker's share of the smallest one holds it."""
    if memory is None:
        return [Finding(None, "model: its sizes cannot be read here, so memory and disk are not predicted")]
    text = f"a training worker needs about {gibibytes(memory[0])}"
    cards = [size for report in reports for _, size in report.gpus]
    if not config.resources.use_gpu or not cards:
        return [Finding(None, text)]
    share = min(cards) * config.resources.gpus_per_worker
    if memory[0] > share:
        return [Finding(True, f"{text}, its share of the smallest GPU is {gibibytes(int(share))}; lower {memory[1]}")]
    return [Finding(False, f"{text}, its share of the smallest GPU is {gibibytes(int(share))}")]


def gibibytes(number: int) -> str:
    """Bytes for people."""
    return f"{number / _GIB:.1f} GiB"
