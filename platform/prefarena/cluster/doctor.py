"""Verdicts on whether a cluster has what a comparison would need (needs.py), without any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prefarena.cluster.capacity import (
    Demand,
    Node,
    demands,
    describe,
    fitting,
    generates,
    has_labels,
    share_beside_engine,
)
from prefarena.cluster.needs import Heaviest
from prefarena.cluster.probe import PACKAGES, NodeReport
from prefarena.config import Comparison
from prefarena.modeling.room import USABLE, share_mib

_GIB = 2**30

Selectors = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A sentence, and whether it is a problem (True), in order (False), or only to be known (None)."""

    problem: bool | None
    text: str


def judge_nodes(
    reports: Sequence[NodeReport], silent: Sequence[str], generates: bool, engines: Selectors = ()
) -> list[Finding]:
    """Whether nodes answer, have one set of versions, and whether vLLM and torch fit. The first report is the model.

    engines: labels of the nodes that hold them, where the comparison generates.
    """
    found = [Finding(True, f"node {name} does not answer; fix it, or remove it from the cluster") for name in silent]
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
    without = [report.node for report in on_nodes(reports, engines) if generates and "vllm" not in report.versions]
    if without:
        told = f"vLLM, which the comparison needs, is not installed on {', '.join(without)}; pip install '.[gpu]'"
        found.append(Finding(True, told))
    return found


def judge_reach(reports: Sequence[NodeReport], places: Mapping[str, str]) -> list[Finding]:
    """Whether every node can read the data and the model of the comparison with the credentials that it has."""
    found = [Finding(True, f"node {report.node}: {told}") for report in reports for told in report.unreachable]
    failed = {told.split(":", 1)[0] for report in reports for told in report.unreachable}
    return found + [
        Finding(False, f"{key}: every node can {'use' if key == 'output' else 'read'} {place}")
        for key, place in places.items()
        if key not in failed
    ]


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
        return [Finding(True, f"{text}, but about {gibibytes(needed)} are needed; free some space, or change output")]
    return [Finding(False, f"{text}, about {gibibytes(needed)} needed")]


def on_nodes(reports: Sequence[NodeReport], selectors: Selectors) -> list[NodeReport]:
    """The reports of the nodes that these label selectors let processes run on."""
    return [report for report in reports if has_labels(report.labels, selectors)]


def smallest_gpu(config: Comparison, reports: Sequence[NodeReport]) -> int | None:
    """Bytes of the smallest GPU that a training worker may get; None if there is none."""
    sizes = [size for report in on_nodes(reports, config.resources.labels) for _, size in report.gpus]
    return min(sizes, default=None)


def room_of_worker(config: Comparison, reports: Sequence[NodeReport]) -> int | None:
    """Bytes that a training worker may take on the smallest node, or of the smallest GPU, that its labels let it have;
    None where none such answered.
    """
    resources = config.resources
    if resources.use_gpu:
        card = smallest_gpu(config, reports)
        return None if card is None else int(card * USABLE * resources.gpus_per_worker)
    memory = [report.memory_mib for report in on_nodes(reports, resources.labels)]
    if not memory:
        return None
    side_by_side = resources.num_workers * max(1, resources.num_groups)
    return int(share_mib(min(memory), side_by_side) * 2**20)


def largest_room(config: Comparison, reports: Sequence[NodeReport], on_policy: bool) -> int | None:
    """Bytes of the largest GPU, or node, that a training worker may be given, whatever else runs there.

    An engine that shares it for certain has its part: with `weight_sync: ipc`, or where there is one GPU in all.
    """
    there = on_nodes(reports, config.resources.labels)
    if not config.resources.use_gpu:
        return max((int(report.memory_mib * 2**20) for report in there), default=None)
    sizes = [size for report in there for _, size in report.gpus]
    if config.generation.sleep_mode != "none":
        return max(sizes, default=None)
    shared = config.generation.weight_sync == "ipc" or sum(len(report.gpus) for report in reports) == 1
    part = 1 - config.generation.gpu_memory_utilization if on_policy and shared else 1.0
    return int(max(sizes) * part) if sizes else None


def judge_capacity(config: Comparison, nodes: Sequence[Node], memory: Heaviest | None) -> list[Finding]:
    """Whether each demand fits, and on CPUs whether its memory does."""
    found = [Finding(None, f"the cluster has {describe(nodes)}")]
    for demand in demands(config):
        if demand.setting == "resources" and memory is not None and not config.resources.use_gpu:
            found += _judge_demand(config, demand, nodes)
            with_memory = replace(demand, each={**demand.each, "memory": memory.memory})
            if fitting(demand, nodes) >= demand.number > fitting(with_memory, nodes):
                found.append(
                    Finding(
                        True,
                        f"{demand.number} training workers of about {gibibytes(memory.memory)} each do not fit in the "
                        f"nodes' memory; lower {memory.key}, or use larger nodes",
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


def judge_memory(config: Comparison, reports: Sequence[NodeReport], memory: Heaviest | None) -> list[Finding]:
    """The prediction, and on GPUs whether a worker's share of the smallest one holds it."""
    if memory is None:
        return [Finding(None, "model: its size cannot be determined here, so memory is not predicted")]
    text = f"a training worker needs about {gibibytes(memory.memory)}"
    card = smallest_gpu(config, reports) if config.resources.use_gpu else None
    if card is None:
        return [Finding(None, text)]
    part, whole = share_beside_engine(config), config.resources.gpus_per_worker
    share = int(card * (part if memory.on_policy else whole))
    text = f"{text}, its share of the smallest GPU that it may have is {gibibytes(share)}"
    beside = memory.on_policy and part < whole
    if beside:
        text += f" beside an engine (generation.gpu_memory_utilization: {config.generation.gpu_memory_utilization:g})"
    if memory.memory > share:
        return [Finding(True, f"{text}; lower {memory.key}" + (" or the engine's part" if beside else ""))]
    return [Finding(False, text)]


def judge_waking(config: Comparison, reports: Sequence[NodeReport], memory: Heaviest | None) -> list[Finding]:
    """Whether a sleeping engine has room to wake, given what a worker holds between two updates."""
    card, part = smallest_gpu(config, reports), config.generation.gpu_memory_utilization
    if memory is None or card is None or not memory.on_policy or config.generation.sleep_mode == "none":
        return []
    needed = memory.resting + int(card * part)
    text = (
        f"while engines are awake a worker holds {gibibytes(memory.resting)}, beside {part:g} of its GPU "
        f"(generation.gpu_memory_utilization), which makes {gibibytes(needed)} of the {gibibytes(card)} of the smallest"
    )
    told = "; lower the engine's part, or set resources.cpu_offload"
    return [Finding(True, text + told) if needed > card else Finding(False, text)]


def judge_host(config: Comparison, reports: Sequence[NodeReport], memory: Heaviest | None) -> list[Finding]:
    """Whether every node with GPUs has room in its own memory for what its workers offload there."""
    resources, found = config.resources, list[Finding]()
    if memory is None or not memory.host:
        return []
    for report in on_nodes(reports, resources.labels):
        most = resources.num_workers * max(1, resources.num_groups)
        workers = min(most, len(report.gpus) * int(1 / resources.gpus_per_worker))
        if not workers:
            continue
        room, needed = int(report.memory_mib * USABLE) * 2**20, workers * memory.host
        text = (
            f"node {report.node}: up to {workers} training workers keep {gibibytes(memory.host)} each in its memory, "
            f"which has {gibibytes(room)} for them (resources.cpu_offload)"
        )
        told = "; use nodes with more memory, or spread the models over more of them"
        found.append(Finding(True, text + told) if needed > room else Finding(False, text))
    return found


def judge_engine(config: Comparison, reports: Sequence[NodeReport], num_parameters: int) -> list[Finding]:
    """Whether each GPU of an engine has room for its part of the weights, on the smallest GPU that it may get."""
    generation = config.generation
    cards = [size for report in on_nodes(reports, generation.labels) for _, size in report.gpus]
    if not generates(config) or not config.resources.use_gpu or not cards:
        return []
    width = 2 if generation.dtype_on(use_gpu=True) == "bfloat16" else 4
    weights = num_parameters * width // generation.tensor_parallel
    room = int(min(cards) * generation.gpu_memory_utilization)
    over = f" of {generation.tensor_parallel}" if generation.tensor_parallel > 1 else ""
    text = (
        f"each device{over} of an engine holds {gibibytes(weights)} of weights, and has {gibibytes(room)} for them and "
        f"its cache (generation.gpu_memory_utilization: {generation.gpu_memory_utilization:g})"
    )
    if weights > room:
        return [Finding(True, f"{text}; raise generation.tensor_parallel, or the engine's part")]
    return [Finding(False, text)]


def judge_attention(answers: Mapping[str, str | None], silent: Sequence[str], tried: str) -> list[Finding]:
    """Whether attention compiles and runs on each node with GPUs. tried: a description of what was tried."""
    found = []
    for node, why in sorted(answers.items()):
        told = f"does not work: {why}" if why else "compiles, and gives the same values as on a CPU"
        found.append(Finding(why is not None, f"node {node}: {tried} {told}"))
    return found + [
        Finding(None, f"node {node}: no GPU was free in time, or compiling took too long; {tried} was not tried")
        for node in silent
    ]


def gibibytes(number: int) -> str:
    """Format bytes for people."""
    return f"{number / _GIB:.1f} GiB"
