"""What a cluster has, node by node, and whether what a comparison asks for fits on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prefarena.config import Comparison, OnPolicyMethod
from prefarena.config.labels import selected
from prefarena.errors import UserError, WaitTimeoutError

_SHOWN = ("CPU", "GPU")


@dataclass(frozen=True)
class Node:
    """A living node: its name, total resources by Ray's names, and labels that people gave it."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """So many processes at once, each with these resources, on nodes with these labels.

    setting: the group of settings that asks for it.
    """

    what: str
    number: int
    each: Mapping[str, float]
    labels: tuple[tuple[str, str], ...]
    setting: str

    def __str__(self) -> str:
        where = f" on nodes labelled {_pairs(dict(self.labels))}" if self.labels else ""
        return f"{self.number} x ({amounts(self.each)}) for {self.what}{where}"


def cluster_nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"],
            {key: value for key, value in node["Labels"].items() if not key.startswith("ray.io/")},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def demands(config: Comparison) -> list[Demand]:
    """What must be placed, largest parts of a comparison first. Parts that follow each other are demands of their own.

    Generation actors stand beside training workers; log-probs and evaluations come before and after.
    """
    resources, generation, scoring = config.resources, config.generation, config.resources.scoring
    worker = {"CPU": resources.cpus_per_worker}
    scorer, actor = {"CPU": scoring.cpus}, {"CPU": generation.cpus}
    if resources.use_gpu:
        worker["GPU"] = resources.gpus_per_worker
        scorer["GPU"] = scoring.gpus if scoring.gpus is not None else resources.gpus_per_worker
        actor = {"GPU": generation.gpus}
    number = resources.num_workers * max(1, resources.num_groups)
    found = [Demand("training workers", number, worker, resources.labels, "resources")]
    if generates(config):
        found.append(Demand("generation actors", generation.num_actors, actor, generation.labels, "generation"))
    scorers = scoring.num_actors or resources.num_workers
    return [*found, Demand("reference log-probs", scorers, scorer, scoring.labels, "resources.scoring")]


def generates(config: Comparison) -> bool:
    """Whether a comparison starts generation actors."""
    return config.task.kind == "text" or any(isinstance(entry.method, OnPolicyMethod) for entry in config.entries)


def check_placement(config: Comparison, nodes: Sequence[Node]) -> None:
    """Raise UserError for the first demand that these nodes cannot hold, however idle they are."""
    for demand in demands(config):
        room = fitting(demand, nodes)
        if room < demand.number:
            labels = f" or {demand.setting}.labels, or label nodes (`ray start --labels`)" if demand.labels else ""
            raise UserError(
                f"asked for is {demand}, and there is room for {room}: the cluster has {describe(nodes)}; change "
                f"{demand.setting}{labels}, or set resources.autoscaled: true where nodes come on demand"
            )


def groups_at_once(config: Comparison, nodes: Sequence[Node]) -> int:
    """`resources.num_groups`; where that is 0, how many groups of workers these nodes have room for, at least one.

    What is trained does not depend on it: a job has its own seed, folder and checkpoints, whatever group it is in.
    """
    if config.resources.num_groups:
        return config.resources.num_groups
    return max(1, fitting(demands(config)[0], nodes) // config.resources.num_workers)


def fitting(demand: Demand, nodes: Sequence[Node]) -> int:
    """How many of a demand's processes these nodes could hold with nothing else on them."""
    return sum(
        min(
            (
                math.floor(node.resources.get(kind, 0.0) / amount + 1e-9)
                for kind, amount in demand.each.items()
                if amount
            ),
            default=demand.number,
        )
        for node in nodes
        if has_labels(node, demand.labels)
    )


def has_labels(node: Node, selectors: Sequence[tuple[str, str]]) -> bool:
    """Whether a node meets every label selector, in Ray's form: `v`, `!v`, `in(v,w)`, `!in(v,w)`."""
    for label, selector in selectors:
        values, takes = selected(selector)
        if (node.labels.get(label) in values) != takes:
            return False
    return True


def describe(nodes: Sequence[Node]) -> str:
    """Nodes in a few words, equal ones together."""
    kinds = Counter(amounts(node.resources) + (f" ({_pairs(node.labels)})" if node.labels else "") for node in nodes)
    listed = "; ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}: {listed or 'none'}"


def amounts(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs, as `4 CPU, 1 GPU`."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in _SHOWN if kind in resources) or "no CPU"


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{label}: {value}" for label, value in sorted(labels.items()))


@contextmanager
def telling_capacity() -> Iterator[None]:
    """Add to a WaitTimeoutError that passes what the cluster has, and what of it is free."""
    import ray

    try:
        yield
    except WaitTimeoutError as error:
        raise WaitTimeoutError(
            f"{error}; the cluster has {describe(cluster_nodes())}; free now: {amounts(ray.available_resources())}"
        ) from error
