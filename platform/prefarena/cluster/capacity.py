"""The resources of a cluster, node by node, and whether a comparison's requests fit on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from prefarena.config import Comparison, draws_responses
from prefarena.config.labels import kept_apart, selected
from prefarena.errors import UserError, WaitTimeoutError

_SHOWN = ("CPU", "GPU")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Node:
    """A living node: its name, total resources by Ray's names, and labels that people gave it."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """A number of processes at the same time, each with these resources, on nodes with these labels.

    setting: the group of settings that asks for it; counted: its keys that say how many, none where it is one. spread:
    whether each is over several devices (`tensor_parallel`).
    """

    what: str
    number: int
    each: Mapping[str, float]
    labels: tuple[tuple[str, str], ...]
    setting: str
    counted: str = ""
    spread: bool = False

    def __str__(self) -> str:
        where = f" on nodes labelled {_pairs(dict(self.labels))}" if self.labels else ""
        return f"{self.number} x ({amounts(self.each)}) for {self.what}{where}"


def cluster_nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    return [
        Node(node["NodeManagerAddress"], node["Resources"], labels_of(node)) for node in ray.nodes() if node["Alive"]
    ]


def labels_of(node: Mapping[str, Any]) -> dict[str, str]:
    """The labels that people gave a node, taken from Ray's description of it."""
    return {key: value for key, value in node["Labels"].items() if not key.startswith("ray.io/")}


def demands(config: Comparison) -> list[Demand]:
    """The demands that must be placed, the largest first; `side_by_side` says which of them run at the same time."""
    workers, actors, scorers = _parts(config)
    return [workers, *([actors] if generates(config) else []), scorers]


def side_by_side(config: Comparison) -> list[tuple[Demand, ...]]:
    """The groups of demands that exist at the same time, so that none can wait until another has ended.

    A training whose policy responds holds the generation actors beside its workers, and an evaluation from samples
    holds them beside what scores those, of which one at least must be there. Other trainings, and log-probs, have nodes
    to themselves.
    """
    workers, actors, scorers = _parts(config)
    found: list[tuple[Demand, ...]] = [(workers,), (scorers,)]
    if any(draws_responses(entry.method) for entry in config.entries):
        found.append((replace(workers, number=config.resources.num_workers, counted="num_workers"), actors))
    if config.task.kind == "text":
        found.append((actors, replace(scorers, number=1, what="scoring samples", counted="")))
    return found


def _parts(config: Comparison) -> tuple[Demand, Demand, Demand]:
    """Training workers, generation actors, and what scores, each at its most."""
    resources, generation, scoring = config.resources, config.generation, config.resources.scoring
    worker = {"CPU": resources.cpus_per_worker}
    devices = generation.tensor_parallel
    scorer, actor = {"CPU": scoring.cpus}, {"CPU": generation.cpus * devices}
    if resources.use_gpu:
        worker["GPU"] = resources.gpus_per_worker
        scorer["GPU"] = scoring.gpus if scoring.gpus is not None else resources.gpus_per_worker
        actor = {"GPU": generation.gpus * devices}
    groups, num_scorers = max(1, resources.num_groups), scoring.num_actors or resources.num_workers
    counted = "num_workers" if groups == 1 else "num_workers x concurrent_runs"
    number = resources.num_workers * groups
    engines = ("generation actors", generation.num_actors, actor, generation.labels, "generation", "num_actors")
    return (
        Demand("training workers", number, worker, resources.labels, "resources", counted),
        Demand(*engines, spread=devices > 1),
        Demand("reference log-probs", num_scorers, scorer, scoring.labels, "resources.scoring", "num_actors"),
    )


def generates(config: Comparison) -> bool:
    """Whether a comparison starts generation actors."""
    return config.task.kind == "text" or any(draws_responses(entry.method) for entry in config.entries)


def share_beside_engine(config: Comparison) -> float:
    """The share of a GPU that a worker of an on-policy training has: an engine that may be placed on it takes
    `generation.gpu_memory_utilization` of it, whatever share Ray was told, unless it sleeps while the worker learns.
    """
    resources, generation = config.resources, config.generation
    if generation.sleep_mode != "none":
        return resources.gpus_per_worker
    together = resources.gpus_per_worker + generation.gpus <= 1 + _ROUNDING
    if not together or kept_apart(resources.labels, generation.labels):
        return resources.gpus_per_worker
    return min(resources.gpus_per_worker, 1 - generation.gpu_memory_utilization)


def check_placement(config: Comparison, nodes: Sequence[Node]) -> None:
    """Raise UserError for the first demand that these nodes cannot hold, however idle they are."""
    for demand in demands(config):
        room = fitting(demand, nodes)
        if room < demand.number:
            labels = f" or {demand.setting}.labels, or label nodes (`ray start --labels`)" if demand.labels else ""
            raise UserError(
                f"the comparison asks for {demand}, but there is only room for {room}: the cluster has "
                f"{describe(nodes)}; "
                f"change {demand.setting}{labels}, or set resources.autoscaled: true where nodes come on demand"
            )
    check_side_by_side(config, nodes)


def check_side_by_side(config: Comparison, nodes: Sequence[Node]) -> None:
    """Raise UserError where parts that run at the same time fit one by one but not together.

    Counted on all nodes that may hold one of them, as if whatever is placed were placed well: nothing is refused that
    could be placed.
    """
    for parts in side_by_side(config):
        meant = [node for node in nodes if any(has_labels(node.labels, part.labels) for part in parts)]
        for kind in _SHOWN:
            room = sum(node.resources.get(kind, 0.0) for node in meant)
            if len(parts) > 1 and needed(parts, kind) > room + _ROUNDING:
                raise UserError(
                    f"{' and '.join(map(str, parts))} run at the same time, which takes {needed(parts, kind):g} "
                    f"{kind}s, but the nodes available to them have {room:g}; "
                    f"lower {' or '.join(setting_of(part, kind) for part in parts)}, use a larger cluster, or set "
                    "resources.autoscaled: true where nodes come on demand"
                )


def needed(parts: Sequence[Demand], kind: str) -> float:
    """How much of a resource parts that run at the same time take. A GPU is shared by what fits on one."""
    shares = [part.each.get(kind, 0.0) for part in parts]
    in_all = sum(part.number * share for part, share in zip(parts, shares, strict=True))
    if kind != "GPU" or not all(shares):
        return in_all
    alone = [
        part.number * share if share > 1 else math.ceil(part.number / _on_one(share))
        for part, share in zip(parts, shares, strict=True)
    ]
    return sum(alone) if sum(shares) > 1 + _ROUNDING else max(in_all, *alone)


def setting_of(part: Demand, kind: str) -> str:
    """The setting that decides how much of a resource each process of a part takes."""
    return f"{part.setting}.{_key(part, kind)}"


def settings_of(part: Demand, kind: str) -> str:
    """The settings that decide how much of a resource a part takes."""
    return f"{part.setting}.{part.counted} x {_key(part, kind)}" if part.counted else setting_of(part, kind)


def _key(part: Demand, kind: str) -> str:
    key = f"{kind.lower()}s" + ("_per_worker" if part.setting == "resources" else "")
    return f"{key} x tensor_parallel" if part.spread else key


def groups_at_once(config: Comparison, nodes: Sequence[Node]) -> int:
    """`resources.num_groups`; where that is 0, how many groups of workers these nodes have room for, at least one.

    What is trained does not depend on it: a job has its own seed, folder and checkpoints, whatever group it is in.
    """
    if config.resources.num_groups:
        return config.resources.num_groups
    return max(1, fitting(demands(config)[0], nodes) // config.resources.num_workers)


def generating_at_once(config: Comparison, nodes: Sequence[Node]) -> int:
    """How many trainings whose policy responds run at the same time, each beside generation actors of its own.

    At least one, and no more than `groups_at_once` says. Counted so that none can wait for room that others have broken
    into pieces: every process is taken to be as large as the largest one. One where an engine and a worker may share a
    device, since nothing says beside which worker Ray would place which engine.
    """
    workers, actors, _ = _parts(config)
    per_run = config.resources.num_workers, config.generation.num_actors
    shared = any(part.each.get("GPU", 1.0) < 1 - _ROUNDING for part in (workers, actors))
    if shared or config.generation.sleep_mode != "none":
        return 1
    if kept_apart(workers.labels, actors.labels):
        room = min(fitting(part, nodes) // number for part, number in zip((workers, actors), per_run, strict=True))
    elif workers.labels == actors.labels:
        kinds = workers.each.keys() | actors.each.keys()
        largest = {kind: max(workers.each.get(kind, 0.0), actors.each.get(kind, 0.0)) for kind in kinds}
        room = fitting(replace(workers, each=largest), nodes) // sum(per_run)
    else:  # some nodes may hold both, and others one of them
        return 1
    return max(1, min(groups_at_once(config, nodes), room))


def fitting(demand: Demand, nodes: Sequence[Node]) -> int:
    """How many of a demand's processes these nodes could hold with nothing else on them."""
    return sum(
        min(
            (_room(node.resources.get(kind, 0.0), kind, amount) for kind, amount in demand.each.items() if amount),
            default=demand.number,
        )
        for node in nodes
        if has_labels(node.labels, demand.labels)
    )


def _room(there: float, kind: str, amount: float) -> int:
    """How many processes that take `amount` fit; none takes its share of a GPU from two of them."""
    if kind == "GPU" and amount <= 1:
        return math.floor(there + _ROUNDING) * _on_one(amount)
    return math.floor(there / amount + _ROUNDING)


def _on_one(share: float) -> int:
    """How many processes with this share one GPU holds."""
    return math.floor(1 / share + _ROUNDING)


def has_labels(labels: Mapping[str, str], selectors: Sequence[tuple[str, str]]) -> bool:
    """Whether a node with these labels meets every selector, in Ray's form: `v`, `!v`, `in(v,w)`, `!in(v,w)`."""
    for label, selector in selectors:
        values, takes = selected(selector)
        if (labels.get(label) in values) != takes:
            return False
    return True


def describe(nodes: Sequence[Node]) -> str:
    """Describe nodes in a few words, equal ones together."""
    kinds = Counter(amounts(node.resources) + (f" ({_pairs(node.labels)})" if node.labels else "") for node in nodes)
    listed = "; ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}: {listed or 'none'}"


def amounts(resources: Mapping[str, float]) -> str:
    """Write CPUs and GPUs as `4 CPU, 1 GPU`."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in _SHOWN if kind in resources) or "no CPU"


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{label}: {value}" for label, value in sorted(labels.items()))


@contextmanager
def telling_capacity() -> Iterator[None]:
    """Add to a WaitTimeoutError that passes what the cluster has, and how much of that is free."""
    import ray

    try:
        yield
    except WaitTimeoutError as error:
        raise WaitTimeoutError(
            f"{error}; the cluster has {describe(cluster_nodes())}; free now: {amounts(ray.available_resources())}"
        ) from error
