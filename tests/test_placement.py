"""Where workers and actors are placed: by labels, on a local cluster of three nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.plan import make_plan
from prefarena.cluster.capacity import (
    Demand,
    Node,
    check_placement,
    demands,
    describe,
    fitting,
    groups_at_once,
    has_labels,
)
from prefarena.config import Comparison, dump_config, parse_config
from prefarena.errors import UserError

ROOT = Path(__file__).parents[1]
ENTRIES = [{"name": "dpo", "method": {"kind": "dpo"}}, {"name": "rlhf", "method": {"kind": "rlhf"}}]
NODES = [
    Node("head", {"CPU": 2.0}),
    Node("a", {"CPU": 8.0, "GPU": 2.0}, {"role": "train", "zone": "x"}),
    Node("b", {"CPU": 8.0, "GPU": 1.0}, {"role": "generate"}),
]


def config(**settings: object) -> Comparison:
    return parse_config({"entries": ENTRIES, **settings})


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({}, "head a b"),
        ({"role": "train"}, "a"),
        ({"role": "!train"}, "head b"),
        ({"role": "in(train, generate)"}, "a b"),
        ({"role": "!in(train,generate)"}, "head"),
        ({"role": "train", "zone": "y"}, ""),
    ],
)
def test_label_selectors_mean_what_they_mean_to_ray(selector: dict[str, str], names: str) -> None:
    assert " ".join(node.name for node in NODES if has_labels(node, tuple(selector.items()))) == names


def test_processes_are_counted_node_by_node() -> None:
    def room(each: dict[str, float], **labels: str) -> int:
        return fitting(Demand("workers", 1, each, tuple(labels.items()), "resources"), NODES)

    assert room({"CPU": 3}) == 4 and room({"CPU": 9}) == 0
    assert room({"CPU": 1, "GPU": 0.5}, role="train") == 4
    assert room({"GPU": 1}, role="nobody") == 0


def test_what_does_not_fit_is_told_with_what_there_is_and_the_setting() -> None:
    labels = {"labels": {"role": "generate"}}
    check_placement(config(generation=labels, resources={"use_gpu": True, "labels": {"role": "train"}}), NODES)
    with pytest.raises(UserError) as caught:
        check_placement(config(generation={"labels": {"role": "serve"}}), NODES)
    message = str(caught.value)
    assert "1 x (1 CPU) for generation actors on nodes labelled role: serve, and there is room for 0" in message
    assert "3 nodes: " in message and "1 x 8 CPU, 1 GPU (role: generate)" in message
    assert "generation.labels" in message and "resources.autoscaled" in message
    with pytest.raises(UserError, match=r"training workers, and there is room for 0.*change resources, or"):
        check_placement(config(resources={"cpus_per_worker": 9}), NODES)


def test_as_many_groups_train_at_once_as_there_is_room_for_and_never_none() -> None:
    def groups(**resources: object) -> int:
        return groups_at_once(config(resources=resources), NODES)

    assert groups() == 1 and groups(concurrent_runs=3) == 3
    assert groups(concurrent_runs=0) == 18 and groups(concurrent_runs=0, num_workers=4, cpus_per_worker=2) == 2
    assert groups(concurrent_runs=0, use_gpu=True, labels={"role": "train"}) == 2
    assert groups(use_gpu=True, labels={"role": "train"}) == 2  # each has a GPU of its own
    assert groups(use_gpu=True, gpus_per_worker=0.5, labels={"role": "train"}) == 1
    assert groups(concurrent_runs=0, num_workers=64) == 1
    check_placement(config(resources={"concurrent_runs": 0, "cpus_per_worker": 8}), NODES)


def test_stages_that_score_have_resources_of_their_own() -> None:
    scoring = {"num_actors": 3, "cpus": 2, "gpus": 0.25, "labels": {"role": "score"}}
    asked = {demand.setting: demand for demand in demands(config(resources={"use_gpu": True, "scoring": scoring}))}
    assert str(asked["resources.scoring"]) == (
        "3 x (2 CPU, 0.25 GPU) for reference log-probs on nodes labelled role: score"
    )
    assert dict(asked["resources"].each) == {"CPU": 1, "GPU": 1} and not asked["generation"].labels
    assert "1 node: 1 x 2 CPU" in describe(NODES[:1])


def test_labels_are_written_out_as_a_mapping_and_change_no_stage() -> None:
    plain, labelled = config(), config(resources={"labels": {"zone": "x", "role": "train"}})
    again = parse_config(yaml.safe_load(dump_config(labelled)))
    assert yaml.safe_load(dump_config(labelled))["resources"]["labels"] == {"role": "train", "zone": "x"}
    assert again == labelled and hash(again.resources) == hash(labelled.resources)
    assert make_plan(plain) == make_plan(labelled)


@pytest.mark.long
def test_on_three_nodes_everything_lands_where_it_is_asked_to(tmp_path: Path) -> None:
    """In a process of its own, which starts the nodes: a whole comparison, then labels that no node has."""
    command = [sys.executable, str(ROOT / "tests" / "three_nodes.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["RayTrainWorker"] == ["train"]
    assert found["GenerationActor"] == ["generate"]
    assert found["logps"] == ["score"]
    for waited in found["waited"]:
        assert "role: nobody" in waited and "start_timeout_s sets the limit" in waited
        assert "the cluster has 4 nodes: " in waited and "1 x 1 CPU (role: train)" in waited
        assert "free now: 4 CPU" in waited
    assert len(found["waited"]) == 2
    assert "there is room for 0" in found["refused"]
