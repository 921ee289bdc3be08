"""Where workers and actors are placed: by labels, on a local cluster of three nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    generating_at_once,
    groups_at_once,
    has_labels,
)
from prefarena.cluster.session import check_resources, requested
from prefarena.config import Comparison, dump_config, parse_config
from prefarena.errors import UserError

ROOT = Path(__file__).parents[2]
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
    assert " ".join(node.name for node in NODES if has_labels(node.labels, tuple(selector.items()))) == names


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
    assert "1 x (1 CPU) for generation actors on nodes labelled role: serve, but there is only room for 0" in message
    assert "3 nodes: " in message and "1 x 8 CPU, 1 GPU (role: generate)" in message
    assert "generation.labels" in message and "resources.autoscaled" in message
    with pytest.raises(UserError, match=r"training workers, but there is only room for 0.*change resources, or"):
        check_placement(config(resources={"cpus_per_worker": 9}), NODES)


def test_no_process_takes_its_share_of_a_gpu_from_two() -> None:
    two = [Node("a", {"CPU": 8.0, "GPU": 2.0})]
    found = [fitting(Demand("workers", 1, {"GPU": share}, (), "resources"), two) for share in (1, 0.6, 0.5, 0.4, 0.2)]
    assert found == [2, 2, 4, 4, 10]
    shared = config(resources={"use_gpu": True, "gpus_per_worker": 0.6, "concurrent_runs": 0})
    assert groups_at_once(shared, two) == 2


def text(**settings: object) -> Comparison:
    """A comparison that evaluates from samples, and trains off-policy alone."""
    return parse_config({"entries": ENTRIES[:1], "task": {"kind": "text", "data": "pairs.jsonl"}, **settings})


def refused(asked: Comparison, *nodes: Node) -> str:
    """What the check says of it; nothing: it fits."""
    try:
        check_placement(asked, nodes)
    except UserError as error:
        return str(error)
    return ""


def test_what_scores_samples_is_counted_beside_the_engines() -> None:
    one_gpu, gpu = Node("a", {"CPU": 8.0, "GPU": 1.0}), {"use_gpu": True}
    said = refused(text(resources=gpu), one_gpu)
    assert "1 x (1 GPU) for generation actors and 1 x (1 CPU, 1 GPU) for scoring samples run at the same time" in said
    assert "takes 2 GPUs, but the nodes available to them have 1" in said
    assert "lower generation.gpus or resources.scoring.gpus" in said
    assert not refused(text(resources=gpu), one_gpu, one_gpu)
    shares = {"generation": {"gpus": 0.5}, "resources": {**gpu, "scoring": {"gpus": 0.5}}}
    assert not refused(text(**shares), one_gpu)  # a worker has the whole GPU, before any engine is there
    assert "resources.gpus_per_worker" in refused(text(**shares, entries=ENTRIES), one_gpu)
    too_large = {"generation": {"gpus": 0.6}, "resources": {**gpu, "scoring": {"gpus": 0.5}}}
    assert "takes 2 GPUs" in refused(text(**too_large), one_gpu)  # neither of two shares fits beside the other
    one_cpu = Node("a", {"CPU": 1.0})
    assert "takes 2 CPUs" in refused(text(), one_cpu) and not refused(config(entries=ENTRIES[:1]), one_cpu)


def test_parts_that_stand_side_by_side_are_counted_where_their_labels_let_them_be() -> None:
    train, generate = (Node(role, {"CPU": 8.0, "GPU": 1.0}, {"role": role}) for role in ("train", "generate"))
    by_role = {"generation": {"labels": {"role": "generate"}}}
    on_engines = {"use_gpu": True, "labels": {"role": "train"}, "scoring": {"labels": {"role": "generate"}}}
    assert "have 1; lower" in refused(text(**by_role, resources=on_engines), train, generate)
    assert not refused(text(**by_role, resources=on_engines), train, generate, generate)
    anywhere = {"use_gpu": True, "labels": {"role": "train"}}
    assert not refused(text(**by_role, resources=anywhere), train, generate)


def test_the_whole_cluster_is_asked_for_what_stands_side_by_side() -> None:
    shown = requested(text(resources={"use_gpu": True, "num_workers": 2}, generation={"num_actors": 3}))
    why = "generation.num_actors x gpus for generation actors, and resources.scoring.gpus for scoring samples"
    assert shown["GPU"] == (4.0, why)
    assert shown["CPU"] == (2.0, "resources.num_workers x cpus_per_worker for training workers")
    with pytest.raises(UserError, match=r"the cluster has 3 GPUs, but 4 are asked for \(generation.num_actors x gpus"):
        check_resources(text(resources={"use_gpu": True}, generation={"num_actors": 3}), {"CPU": 9.0, "GPU": 3.0})
    groups = requested(config(entries=ENTRIES[:1], resources={"concurrent_runs": 3}))
    assert groups == {"CPU": (3.0, "resources.num_workers x concurrent_runs x cpus_per_worker for training workers")}


def test_trainings_that_generate_run_at_once_where_all_their_parts_certainly_fit() -> None:
    def runs(*nodes: Node, generation: dict[str, object] | None = None, **resources: Any) -> int:
        asked = config(resources={"concurrent_runs": 0, **resources}, generation=generation or {})
        return generating_at_once(asked, nodes)

    laptop, server = Node("a", {"CPU": 2.0}), Node("b", {"CPU": 9.0, "GPU": 8.0})
    assert runs(laptop) == 1 and runs(server) == 4
    assert runs(server, concurrent_runs=3) == 3 and runs(server, concurrent_runs=1) == 1
    assert runs(server, generation={"cpus": 0}) == 4  # an engine without a CPU to its name needs room all the same
    assert runs(server, generation={"cpus": 4}) == 1  # 4 and 1 fit twice only if placed well
    assert runs(server, laptop, num_workers=2) == 3
    gpus: dict[str, Any] = {"use_gpu": True}
    assert runs(server, **gpus) == 4 and runs(server, server, generation={"num_actors": 2}, **gpus) == 5
    assert runs(server, server, generation={"tensor_parallel": 4}, **gpus) == 2
    halves: dict[str, Any] = {"gpus_per_worker": 0.5}
    assert runs(server, generation={"gpus": 0.5}, **gpus, **halves) == 1 and runs(server, **gpus, **halves) == 1
    train, generate = (Node(role, {"CPU": 8.0, "GPU": 4.0}, {"role": role}) for role in ("train", "generate"))
    apart: dict[str, Any] = {
        "generation": {"labels": {"role": "generate"}, "tensor_parallel": 2},
        "labels": {"role": "train"},
    }
    assert runs(train, generate, train, **gpus, **apart) == 2
    assert runs(train, generate, **gpus, labels={"role": "train"}) == 1  # nothing keeps engines from where workers go


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


def test_an_engine_over_several_devices_needs_them_on_one_node() -> None:
    def asked(devices: int, **more: object) -> Comparison:
        generation = {"tensor_parallel": devices, **more}
        return config(entries=ENTRIES, resources={"use_gpu": True}, generation=generation)

    eight, four = Node("a", {"CPU": 64.0, "GPU": 8.0}), Node("b", {"CPU": 64.0, "GPU": 4.0})
    engines = demands(asked(4))[1]
    assert str(engines) == "1 x (4 GPU) for generation actors"
    assert fitting(engines, [eight, four]) == 3 and fitting(demands(asked(3))[1], [eight, four]) == 3
    assert not refused(asked(4, num_actors=2), eight, four)
    assert "2 x (8 GPU) for generation actors, but there is only room for 1" in refused(
        asked(8, num_actors=2), eight, four
    )
    beside = refused(asked(8), eight)
    assert "takes 9 GPUs, but the nodes available to them have 8" in beside
    assert "lower resources.gpus_per_worker or generation.gpus x tensor_parallel" in beside
    assert not refused(asked(7), eight)
    on_cpus = config(generation={"tensor_parallel": 2, "cpus": 3})
    assert str(demands(on_cpus)[1]) == "1 x (6 CPU) for generation actors"


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
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "three_nodes.py"), str(tmp_path)]
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
    assert "there is only room for 0" in found["refused"]
