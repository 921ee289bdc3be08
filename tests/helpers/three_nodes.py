"""Run by test_placement.py: a labelled cluster of a head and three nodes; tells on which of them actors ran."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from pipelines.compare import compare
from pipelines.engine import start_generator
from pipelines.jobs import reference_job
from pipelines.plan import make_plan
from pipelines.runner import run
from prefarena.config import Comparison, parse_config
from prefarena.errors import UserError, WaitTimeoutError

QUICK = {"num_steps": 2, "batch_size": 16}
PPO = {"num_iterations": 1, "rollouts_per_iteration": 16, "micro_batch_size": 16, "num_minibatches": 1}
NOBODY = {"role": "nobody"}


def comparison(folder: Path, **settings: Any) -> Comparison:
    tree = {
        "output": str(folder / "runs"),
        "task": {
            "kind": "language", "num_letters": 4, "num_prompts": 6, "prompt_letters": 2, "response_limit": 3,
            "num_demonstrations": 64, "num_pairs": 64, "num_test_pairs": 32,
        },
        "reference": {"train": False, "training": QUICK},
        "entries": [{"name": "rlhf", "method": {"kind": "rlhf", "reward": {"kind": "gold"}, "training": PPO}}],
        "resources": {"labels": {"role": "train"}, "scoring": {"labels": {"role": "score"}}},
        "generation": {"labels": {"role": "generate"}},
    }  # fmt: skip
    return parse_config({**tree, **settings})


def roles_of_actors(roles: dict[str, str]) -> dict[str, list[str]]:
    """On nodes of which roles the actors of a class ran, ended ones included."""
    found: dict[str, set[str]] = defaultdict(set)
    for actor in ray._private.state.actors().values():
        found[actor["ActorClassName"]].add(roles.get(actor["Address"]["NodeID"], "head"))
    return {name: sorted(places) for name, places in found.items()}


def waited(call: Any) -> str:
    try:
        call()
    except WaitTimeoutError as error:
        return str(error)
    raise AssertionError("it was placed")


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for role in ("train", "generate", "score"):
        cluster.add_node(num_cpus=1, labels={"role": role})
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    try:
        roles = {node["NodeID"]: node["Labels"].get("role", "head") for node in ray.nodes()}
        console = Console(width=170)
        config = comparison(folder)
        compare(config, console, "train")
        found: dict[str, Any] = dict(roles_of_actors(roles))
        found["logps"] = next(places for name, places in found.items() if "ReferenceLogps" in name)
        job = reference_job(config, make_plan(comparison(folder, reference={"training": QUICK}))[0])
        nobody = config.resources.model_copy(update={"labels": tuple(NOBODY.items()), "start_timeout_s": 4})
        elsewhere = comparison(folder, generation={"labels": NOBODY, "start_timeout_s": 3})
        found["waited"] = [
            waited(lambda: run(nobody, [job], config, console)),
            waited(lambda: start_generator(elsewhere, make_plan(elsewhere)[0], console)),
        ]
        try:
            compare(comparison(folder, name="other", generation={"labels": NOBODY}, seeds=[1]), console)
        except UserError as error:
            found["refused"] = str(error)
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
