"""What the doctor predicts, what it says of it, and where a local Ray listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.doctor import doctor, model_shape
from prefarena.cluster.capacity import Node
from prefarena.cluster.doctor import (
    Shape,
    disk_needed,
    heaviest_training,
    judge_capacity,
    judge_memory,
    judge_nodes,
    judge_storage,
    training_memory,
)
from prefarena.cluster.probe import NodeReport, versions, vllm_wants_torch
from prefarena.config import Comparison, parse_config

ROOT = Path(__file__).parents[1]
GIB = 2**30
ENTRIES = [{"name": "dpo", "method": {"kind": "dpo"}}, {"name": "rlhf", "method": {"kind": "rlhf"}}]
LARGE = Shape(num_parameters=7 * 10**9, width=4096, inner_width=11008, num_layers=32, vocab_size=32000)
NODE = NodeReport(
    "a", {"python": "3.12.1", "torch": "2.13.0", "vllm": "0.32.0"}, "2.13.0", [("L4", 24 * GIB)], True, GIB
)


def config(**settings: object) -> Comparison:
    return parse_config({"entries": ENTRIES, **settings})


def problems(findings: list) -> str:
    return "\n".join(finding.text for finding in findings if finding.problem)


def test_the_prediction_of_activations_is_what_autograd_keeps() -> None:
    """The bytes that a forward pass keeps, counted by hooks; the last two of logits' three come with the backward."""
    width, inner, layers, vocab, batch, length = 128, 352, 3, 512, 4, 64
    settings = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = model(torch.zeros(batch, length, dtype=torch.long)).logits.log_softmax(-1)
        loss = logps.sum()
    assert loss.requires_grad
    shape = Shape(model.num_parameters(), width, inner, layers, vocab)
    predicted = training_memory(shape, batch * length) - 16 * shape.num_parameters
    assert predicted - 2 * 4 * batch * length * vocab == pytest.approx(sum(kept.values()), rel=0.1)


def test_the_model_is_measured_without_being_made() -> None:
    shape = model_shape(config())
    assert shape is not None and (shape.width, shape.num_layers, shape.vocab_size) == (64, 2, 16)
    assert 100_000 < shape.num_parameters < 120_000
    assert (
        model_shape(config(task={"kind": "text", "data": "x"}, model={"kind": "pretrained", "path": "/none"})) is None
    )


def test_the_heaviest_training_is_named_by_the_setting_that_lowers_it() -> None:
    shape = model_shape(config())
    assert shape is not None
    memory, key = heaviest_training(config(), shape, max_tokens=8)
    assert key == "reference.training.micro_batch_tokens" and memory > 16 * shape.num_parameters
    small = {"training": {"micro_batch_tokens": 1}}
    pairs = config(reference=small, entries=[{"name": "dpo", "method": {"kind": "dpo"}}])
    assert heaviest_training(pairs, shape, 8)[1] == "entries.dpo.method.training.micro_batch_tokens"
    rlhf = config(reference={"train": False}, entries=[{"name": "rlhf", "method": {"kind": "rlhf"}}])
    assert heaviest_training(rlhf, LARGE, 8) == (
        training_memory(LARGE, 64 * 8, num_trained=2, num_frozen=2),
        "entries.rlhf.method.training.micro_batch_size",
    )


def test_adapters_shards_and_recomputed_layers_need_less() -> None:
    def needed(training: dict[str, object], **resources: object) -> int:
        entry = {"name": "dpo", "method": {"kind": "dpo", "training": training}}
        settings = config(reference={"train": False}, entries=[entry], resources=resources)
        return heaviest_training(settings, LARGE, 512)[0]

    whole, weights = needed({}), 4 * LARGE.num_parameters
    assert whole == training_memory(LARGE, 8192)
    assert needed({}, num_workers=4, sharding="fsdp") == whole - 3 * weights
    assert whole - 3 * weights < needed({"lora": {"rank": 8}}) < whole - 2.9 * weights
    kept = 4 * 8192 * (LARGE.num_layers - 1) * (10 * LARGE.width + 4 * LARGE.inner_width)
    assert needed({"activation_checkpointing": True}) == whole - kept + 4 * 8192 * LARGE.num_layers * LARGE.width


def test_memory_that_a_worker_will_not_have() -> None:
    memory = (30 * GIB, "entries.dpo.method.training.micro_batch_tokens")
    gpus = config(resources={"use_gpu": True, "gpus_per_worker": 0.5})
    said = problems(judge_memory(gpus, [NODE], memory))
    assert "about 30.0 GiB, its share of the smallest GPU is 12.0 GiB; lower entries.dpo.method" in said
    assert not problems(judge_memory(gpus, [NODE], (10 * GIB, "x"))) and not problems(judge_memory(gpus, [NODE], None))
    nodes = [Node("a", {"CPU": 8.0, "memory": 40.0 * GIB})]
    two = config(resources={"num_workers": 2})
    said = problems(judge_capacity(two, nodes, memory))
    assert said.startswith("2 training workers of about 30.0 GiB each do not fit") and memory[1] in said
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
    assert "vLLM is not installed" in problems(judge_nodes([bare], [], generates=True))
    assert not problems(judge_nodes([bare], [], generates=False))
    assert vllm_wants_torch() == versions()["torch"]


def test_storage_that_is_not_shared_or_too_small() -> None:
    blind = replace(NODE, node="b", sees_output=False, free_bytes=None)
    assert "output: b cannot read and write" in problems(judge_storage("/x", [NODE, blind], None))
    assert "1.0 GiB free, but about 2.0 GiB are needed" in problems(judge_storage("/x", [NODE], 2 * GIB))
    assert not problems(judge_storage("/x", [NODE], GIB // 2))
    one, two = (disk_needed(config(seeds=seeds), LARGE, 0) for seeds in ([0], [0, 1]))
    assert two - one == 3 * 4 * LARGE.num_parameters  # dpo, rlhf and its reward model


def test_the_command_leaves_nothing_behind_and_its_ray_listens_on_loopback_alone(tmp_path: Path) -> None:
    output, found = tmp_path / "runs", tmp_path / "found.json"
    tree = {"entries": ENTRIES, "output": str(output), "resources": {"num_workers": 64}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = ROOT / "tests" / "local_session.py"
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
