"""What the doctor tries on a node with GPUs, and what it says of one where that does not work; without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from pipelines.doctor import attention_heads
from prefarena.cluster import attention
from prefarena.cluster.attention import Toolchain, lacking, toolchain, why_not
from prefarena.cluster.doctor import judge_attention
from prefarena.cluster.needs import precisions
from prefarena.config import parse_config
from prefarena.modeling import attention_trial
from prefarena.modeling.attention_trial import Heads, attend, difference

HEADS = Heads(32, 4, 2)
WHOLE = Toolchain("/usr/bin/gcc", True, "580.105.08", "13.0")


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        (WHOLE, None),
        (replace(WHOLE, driver="535.183.01", cuda="12.8"), None),
        (replace(WHOLE, driver="535.183.01"), "NVIDIA driver 535.183.01 is too old for torch's CUDA 13.0; install 580"),
        (replace(WHOLE, driver=None), "no NVIDIA driver answers there (nvidia-smi); install one of at least 580"),
        (replace(WHOLE, compiler=None), "no C compiler, which Triton needs; install gcc"),
        (replace(WHOLE, headers=False), "no Python.h, which Triton needs; install Python's headers (apt-get install"),
        (replace(WHOLE, cuda=None), "torch is built without CUDA"),
        (replace(WHOLE, driver="550.1", compiler=None), "too old"),  # first what hides the rest
    ],
)
def test_what_a_node_lacks_is_one_sentence_with_its_remedy(tools: Toolchain, says: str | None) -> None:
    told = lacking(tools)
    assert told is None if says is None else (told is not None and says in told and "\n" not in told)


def program(folder: Path, name: str, text: str) -> str:
    """A program of this name and nothing else in a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_compiler_headers_and_driver_are_looked_for_where_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert (toolchain().compiler, toolchain().driver) == (None, None)
    clang = program(tmp_path / "bin", "clang", "")
    assert toolchain().compiler == clang
    gcc = program(tmp_path / "bin", "gcc", "")
    program(tmp_path / "bin", "nvidia-smi", "echo 535.183.01; echo 535.183.01")
    assert (toolchain().compiler, toolchain().driver) == (gcc, "535.183.01")
    program(tmp_path / "bin", "nvidia-smi", "echo no devices were found; exit 9")
    monkeypatch.setenv("CC", "icx")  # what Triton would then call, and fail
    assert (toolchain().compiler, toolchain().driver) == (None, None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert not toolchain().headers
    (tmp_path / "Python.h").touch()
    assert toolchain().headers


def test_attention_is_tried_forward_and_backward_in_both_precisions() -> None:
    assert why_not(HEADS, ["float32", "bfloat16"], "cpu") is None
    out, *gradients = attend(HEADS, torch.float32, "cpu")
    assert out.shape == (1, 208, 4, 32) and [grad.shape[1] for grad in gradients] == [4, 2, 2]
    assert all(bool((grad != 0).any()) for grad in gradients)


@pytest.mark.parametrize("in_blocks", [False, True], ids=["tree by tree", "FlexAttention"])
def test_both_ways_of_attending_are_held_against_float64(in_blocks: bool) -> None:
    assert difference(HEADS, torch.float32, "cpu", exact=True, in_blocks=in_blocks) < 1e-5
    assert 1e-4 < difference(HEADS, torch.bfloat16, "cpu", exact=True, in_blocks=in_blocks) < 5e-2


def test_a_call_that_fails_is_explained_by_what_is_missing_or_else_by_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert why_not(HEADS, ["float32"]) == lacking(toolchain())  # this torch has no CUDA
    monkeypatch.setattr(attention, "toolchain", lambda: WHOLE)
    told = why_not(HEADS, ["float32"])
    assert told is not None and "CUDA" in told and told.startswith("RuntimeError: ") and "\n" not in told


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_other_values_than_a_cpus_are_no_success(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def attend(heads: Heads, dtype: torch.dtype, device: str, **_: Any) -> list[torch.Tensor]:
        return [torch.tensor([1.0, value if device == "cuda" else 1.0])]

    monkeypatch.setattr(attention_trial, "attend", attend)
    told = why_not(HEADS, ["bfloat16"])
    assert told is not None and told.startswith("in bfloat16 its values are others than on a CPU, by ")


def test_the_findings_name_the_node_and_what_was_tried() -> None:
    found = judge_attention({"a": None, "b": "it has no C compiler"}, ["c"], "attention")
    assert [(finding.problem, finding.text[:8]) for finding in found] == [
        (False, "node a: "),
        (True, "node b: "),
        (None, "node c: "),
    ]
    assert found[1].text == "node b: attention does not work: it has no C compiler"


def test_what_is_tried_is_the_models_own() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert attention_heads(config) == Heads(64, 4, 2)
    assert attention_heads(LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=128)) == Heads(128, 4, 4)
    assert attention_heads(MambaConfig()) is None
    halved = {"kind": "dpo", "training": {"precision": "bfloat16"}}
    tree = {"entries": [{"name": "dpo", "method": halved}]}
    assert precisions(parse_config(tree)) == ["bfloat16", "float32"]  # the reference is trained in float32
    text = {"kind": "text", "data": "pairs.jsonl"}
    on_gpus = {**tree, "reference": {"train": False}, "task": text, "judge": {"kind": "function", "function": "a:b"}}
    assert precisions(parse_config({**on_gpus, "resources": {"use_gpu": True}})) == ["bfloat16"]
    assert precisions(parse_config(on_gpus)) == ["bfloat16", "float32"]  # and what measures computes so


def test_the_doctor_tries_it_on_nodes_with_gpus_alone(tmp_path: Path) -> None:
    """On a Ray that says that it has a GPU, on a machine without one: in a process of its own."""
    script = f"""
        import ray
        from pipelines.doctor import doctor
        from prefarena.config import parse_config
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, labels={{"role": "train"}})
        entries = [{{"name": "dpo", "method": {{"kind": "dpo"}}}}]
        for role in ("train", "none"):
            resources = {{"use_gpu": True, "labels": {{"role": role}}, "concurrent_runs": 1}}
            tree = {{"output": {str(tmp_path)!r}, "entries": entries, "resources": resources}}
            print(role, doctor(parse_config(tree)))
    """
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    train, none = done.stdout.split("train 2\n")
    why = "attention with heads of 32 in float32 does not work: its torch is built without CUDA"
    assert train.count(why) == 1 and "1 problem\n" in train, done.stdout + done.stderr
    assert "attention" not in none and none.endswith("none 2\n")
