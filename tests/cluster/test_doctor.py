"""What the doctor predicts, what it says of it, and where a local Ray listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.doctor import doctor
from pipelines.memory import model_settings
from prefarena.cluster.capacity import Node
from prefarena.cluster.doctor import (
    judge_capacity,
    judge_engine,
    judge_memory,
    judge_nodes,
    judge_storage,
    room_of_worker,
)
from prefarena.cluster.needs import Heaviest, Lengths, disk_needed, heaviest_training, num_parameters, trainings
from prefarena.cluster.probe import NodeReport, versions, vllm_wants_torch
from prefarena.config import Comparison, parse_config
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.modeling.memory import training_memory
from prefarena.training.process_memory import kept_share

ROOT = Path(__file__).parents[2]
GIB = 2**30
ENTRIES = [{"name": "dpo", "method": {"kind": "dpo"}}, {"name": "rlhf", "method": {"kind": "rlhf"}}]
NODE = NodeReport(
    "a", {"python": "3.12.1", "torch": "2.13.0", "vllm": "0.32.0"}, "2.13.0", [("L4", 24 * GIB)], True, GIB, 32 * 1024.0
)


def config(**settings: object) -> Comparison:
    return parse_config({"entries": ENTRIES, **settings})


def problems(findings: list) -> str:
    return "\n".join(finding.text for finding in findings if finding.problem)


LENGTHS = Lengths(prompt=40, response=12)
#: Of 7 billion parameters, none of which is made.
LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
    tie_word_embeddings=False,
)  # fmt: skip


def small_settings() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=2, vocab_size=512,
        tie_word_embeddings=False,
    )  # fmt: skip


def pairs_only(training: dict[str, object], **resources: object) -> Comparison:
    entry = {"name": "dpo", "method": {"kind": "dpo", "training": training}}
    return config(reference={"train": False}, entries=[entry], resources=resources)


def test_memory_is_predicted_from_settings_as_it_is_from_the_model_itself() -> None:
    module = LogProbs(LlamaForCausalLM(small_settings()).eval(), LENGTHS.total)
    prompts, responses = [[3] * LENGTHS.prompt] * 4, [[[4] * LENGTHS.response] * 2] * 4

    def loss(twin: torch.nn.Module) -> torch.Tensor:
        return sequence_logps(twin, prompts, responses)[0].sum()

    need = training_memory(module, [loss])
    assert need is not None
    tokens = 4 * (LENGTHS.prompt + 2 * LENGTHS.response) + 1
    found = heaviest_training(pairs_only({"micro_batch_tokens": tokens}), small_settings(), LENGTHS)
    assert found is not None and (found.memory, found.key) == (
        need.total,
        "entries.dpo.method.training.micro_batch_tokens",
    )
    assert 0 < found.resting < found.memory and not found.host and not found.on_policy
    assert num_parameters(small_settings()) == sum(weight.numel() for weight in module.parameters())


def test_a_model_of_seven_billion_parameters_is_measured_without_being_made() -> None:
    before = psutil.Process().memory_info().rss
    number = num_parameters(LARGE)
    found = heaviest_training(pairs_only({}), LARGE, LENGTHS)
    assert 6.7e9 < number < 6.8e9 and found is not None and found[0] > 16 * number
    assert psutil.Process().memory_info().rss - before < GIB


def test_the_settings_of_a_comparison_name_its_model() -> None:
    settings = model_settings(config())
    assert settings is not None
    assert (settings.hidden_size, settings.num_hidden_layers, settings.vocab_size) == (64, 2, 16)
    assert 100_000 < num_parameters(settings) < 120_000
    unknown = config(task={"kind": "text", "data": "x"}, model={"kind": "pretrained", "path": "/none"})
    assert model_settings(unknown) is None


def test_the_heaviest_training_is_named_by_the_setting_that_lowers_it() -> None:
    settings = small_settings()

    def heaviest(**changed: object) -> Heaviest:
        found = heaviest_training(config(**changed), settings, LENGTHS)
        assert found is not None
        return found

    small, dpo = {"training": {"micro_batch_tokens": 1}}, [{"name": "dpo", "method": {"kind": "dpo"}}]
    assert heaviest(reference=small, entries=dpo)[1] == "entries.dpo.method.training.micro_batch_tokens"
    assert heaviest(entries=[{"name": "dpo", "method": {"kind": "dpo", **small}}])[1].startswith("reference.training.")
    rlhf = {"name": "rlhf", "method": {"kind": "rlhf", "reward": {"kind": "gold"}}}
    memory, key, *_ = heaviest(reference={"train": False}, entries=[rlhf])
    assert key == "entries.rlhf.method.training.micro_batch_size"
    assert memory > 40 * num_parameters(settings)  # two of 16 bytes each, and two frozen


def test_adapters_shards_and_recomputed_layers_need_less() -> None:
    shallow = LlamaConfig.from_dict({**LARGE.to_dict(), "num_hidden_layers": 4})

    def needed(training: dict[str, object], **resources: object) -> int:
        found = heaviest_training(pairs_only(training, **resources), shallow, Lengths(384, 64))
        assert found is not None
        return found[0]

    whole, weights = needed({}), 4 * num_parameters(shallow)
    assert weights < needed({}, num_workers=4, sharding="fsdp") < whole - weights
    assert weights < needed({"lora": {"rank": 8}}) < whole - 2.9 * weights
    assert needed({"activation_checkpointing": True}) < whole
    reward = {"name": "best", "method": {"kind": "best_of_n", "reward": {"kind": "learned"}}}
    found = heaviest_training(config(reference={"train": False}, entries=[reward]), shallow, LENGTHS)
    assert found is not None and found[1] == "entries.best.method.reward.training.micro_batch_tokens"


def test_memory_that_a_worker_will_not_have() -> None:
    memory = Heaviest(30 * GIB, "entries.dpo.method.training.micro_batch_tokens")
    gpus = config(resources={"use_gpu": True, "gpus_per_worker": 0.5})
    said = problems(judge_memory(gpus, [NODE], memory))
    assert (
        "about 30.0 GiB, its share of the smallest GPU that it may have is 12.0 GiB; lower entries.dpo.method" in said
    )
    assert not problems(judge_memory(gpus, [NODE], Heaviest(10 * GIB, "x"))) and not problems(
        judge_memory(gpus, [NODE], None)
    )
    nodes = [Node("a", {"CPU": 8.0, "memory": 40.0 * GIB})]
    two = config(resources={"num_workers": 2})
    said = problems(judge_capacity(two, nodes, memory))
    assert said.startswith("2 training workers of about 30.0 GiB each do not fit") and memory.key in said
    assert not problems(judge_capacity(two, nodes * 2, memory))


def test_what_nodes_cannot_hold() -> None:
    nodes = [Node("a", {"CPU": 1.0, "memory": 40.0 * GIB})]
    said = problems(judge_capacity(config(resources={"num_workers": 4}), nodes, None))
    assert "4 x (1 CPU) for training workers: room for 1; change resources" in said
    grows = config(resources={"num_workers": 4, "autoscaled": True})
    findings = judge_capacity(grows, nodes, None)
    assert not problems(findings) and any("the cluster has to grow" in finding.text for finding in findings)


def test_nodes_that_differ_or_whose_vllm_was_built_for_another_torch() -> None:
    assert not problems(judge_nodes([NODE, replace(NODE, node="b")], [], generates=True))
    other = replace(NODE, node="b", versions={**NODE.versions, "torch": "2.12.0"})
    said = problems(judge_nodes([NODE, other], ["c"], generates=True))
    assert "node c does not answer" in said and "node b has torch 2.12.0, a has 2.13.0" in said
    assert "node b: its vLLM is built for torch 2.13.0, it has 2.12.0" in said
    bare = replace(NODE, versions={"python": "3.12.1", "torch": "2.13.0"}, vllm_wants_torch=None)
    assert "which the comparison needs, is not installed on a" in problems(judge_nodes([bare], [], generates=True))
    assert not problems(judge_nodes([bare], [], generates=False))
    assert vllm_wants_torch() == versions()["torch"]


def test_storage_that_is_not_shared_or_too_small() -> None:
    blind = replace(NODE, node="b", sees_output=False, free_bytes=None)
    assert "output: b cannot read and write" in problems(judge_storage("/x", [NODE, blind], None))
    assert "1.0 GiB free, but about 2.0 GiB are needed" in problems(judge_storage("/x", [NODE], 2 * GIB))
    assert not problems(judge_storage("/x", [NODE], GIB // 2))
    one, two = (disk_needed(config(seeds=seeds), 1000, 0) for seeds in ([0], [0, 1]))
    assert two - one == 3 * 4 * 1000  # dpo, rlhf and its reward model


def test_the_command_leaves_nothing_behind_and_its_ray_listens_on_loopback_alone(tmp_path: Path) -> None:
    output, found = tmp_path / "runs", tmp_path / "found.json"
    tree = {"entries": ENTRIES, "output": str(output), "resources": {"num_workers": 64}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = ROOT / "tests" / "helpers" / "local_session.py"
    command = [sys.executable, str(script), str(tmp_path / "config.yaml"), str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    for line in ("✓ comparison 'default'", "✗ 64 x (1 CPU) for training workers", "✓ output: ", "problem"):
        assert line in done.stdout
    assert list(output.iterdir()) == []
    addresses = json.loads(found.read_text(encoding="utf-8"))
    assert len(addresses) > 2
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}


def test_parts_that_fit_alone_and_not_together(
    ray_session: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    assert doctor(config(output=str(tmp_path / "runs"), resources={"num_workers": cpus})) == 2
    text = capsys.readouterr().out
    assert f"✓ {cpus} x (1 CPU) for training workers: fits" in text
    assert f"✗ the cluster has {cpus} CPUs, but {cpus + 1} are asked for" in text and text.endswith("1 problem\n")


def test_passes_set_to_auto_are_those_that_the_smallest_node_has_room_for() -> None:
    settings = small_settings()
    reward = {"name": "rlhf", "method": {"kind": "rlhf", "reward": {"kind": "gold"}}}
    for entry in ({"name": "dpo", "method": {"kind": "dpo"}}, reward):
        asked = config(reference={"train": False}, entries=[entry])
        found, (training,) = heaviest_training(asked, settings, LENGTHS), trainings(asked)
        held = training.need(settings, LENGTHS, training.sizes[0])
        assert found is not None and held is not None and held.total == found.memory
        # As a worker counts on a CPU, whose allocator keeps a share of what comes and goes.
        kept = kept_share(at_once=False) * (held.gradients + held.activations)
        room = int(held.total + kept + 800 * 2**20) + 1
        assert heaviest_training(asked, settings, LENGTHS, room=room) == found
        less = heaviest_training(asked, settings, LENGTHS, room=room - 2)
        assert less is not None and less.memory < found.memory and less.key == found.key
        least = heaviest_training(asked, settings, LENGTHS, room=0)
        assert least is not None and least.memory < less.memory


def test_a_worker_has_a_share_of_the_smallest_node_or_gpu() -> None:
    nodes = [replace(NODE, memory_mib=1000.0), replace(NODE, memory_mib=500.0)]
    assert room_of_worker(config(), []) is None
    assert room_of_worker(config(resources={"num_workers": 2, "concurrent_runs": 1}), nodes) == 200 * 2**20
    gpus = config(resources={"use_gpu": True, "gpus_per_worker": 0.5})
    assert room_of_worker(gpus, nodes) == int(0.4 * 24 * GIB)


def test_only_nodes_whose_labels_the_placement_asks_for_are_compared_with_it() -> None:
    small = replace(NODE, node="s", labels={"role": "generate"}, gpus=[("T4", 16 * GIB)], memory_mib=1000.0)
    large = replace(NODE, node="l", labels={"role": "train"}, gpus=[("H100", 80 * GIB)], memory_mib=4000.0)
    memory = Heaviest(30 * GIB, "x")
    anywhere = config(resources={"use_gpu": True})
    assert "smallest GPU that it may have is 16.0 GiB" in problems(judge_memory(anywhere, [small, large], memory))
    placed = config(resources={"use_gpu": True, "labels": {"role": "train"}})
    (found,) = judge_memory(placed, [small, large], memory)
    assert found.problem is False and "smallest GPU that it may have is 80.0 GiB" in found.text
    assert room_of_worker(placed, [small, large]) == int(0.8 * 80 * GIB)
    assert room_of_worker(placed, [small]) is None  # none of those that it may have is there yet
    (found,) = judge_memory(placed, [small], memory)
    assert found.problem is None
    on_cpus = config(resources={"labels": {"role": "!generate"}})
    assert room_of_worker(on_cpus, [small, large]) == int(0.8 * 4000 * 2**20)
    bare = replace(large, versions={"python": "3.12.1", "torch": "2.13.0"}, vllm_wants_torch=None)
    told = problems(judge_nodes([bare, small], [], generates=True, engines=(("role", "generate"),)))
    assert "not installed" not in told and "use one image" in told


def test_an_engine_that_its_device_cannot_hold_is_told_with_the_setting_that_spreads_it() -> None:
    def told(use_gpu: bool = True, **generation: object) -> list:
        asked = config(resources={"use_gpu": use_gpu}, generation=generation)
        return judge_engine(asked, [NODE], num_parameters(LARGE))

    [found] = told()  # 13 GB in bfloat16, and half of 24 GiB
    assert found.problem and "12.6 GiB of weights, and has 12.0 GiB" in found.text
    assert "raise generation.tensor_parallel" in found.text
    [found] = told(tensor_parallel=2)
    assert found.problem is False and "each device of 2 of an engine holds 6.3 GiB" in found.text
    [found] = told(gpu_memory_utilization=0.9)
    assert found.problem is False
    [found] = told(tensor_parallel=2, dtype="float32")
    assert found.problem
    assert told(use_gpu=False) == [] and told(labels={"role": "serve"}) == []
