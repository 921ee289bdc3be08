"""The base model: a user's own folder is referred to and never copied, and stages know when it has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from tiny import save_tiny_policy

from pipelines.plan import make_plan, model_of
from pipelines.prepare import write_base
from prefarena.config import PretrainedModel, ScratchModel, parse_config
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.stages import read_manifest


def files_under(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def test_a_folder_of_a_model_is_referred_to(tmp_path: Path) -> None:
    theirs = Path(save_tiny_policy(tmp_path / "theirs"))
    before = {file.name: file.read_bytes() for file in theirs.iterdir()}
    stage = tmp_path / "stage"
    stage.mkdir()
    write_base(PretrainedModel(path=str(theirs)), "", 32, 0, stage)
    assert (stage / "model").is_symlink() and files_under(stage) == ["manifest.json"]
    ours = load_policy(stage / "model").state_dict()
    assert all(torch.equal(weights, ours[name]) for name, weights in load_policy(theirs).state_dict().items())
    assert load_tokenizer(stage / "model").eos_token_id == load_tokenizer(theirs).eos_token_id
    assert read_manifest(stage)["num_parameters"] > 0
    assert {file.name: file.read_bytes() for file in theirs.iterdir()} == before


def test_a_relative_path_is_referred_to_from_everywhere(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    save_tiny_policy(tmp_path / "theirs")
    (tmp_path / "stage").mkdir()
    monkeypatch.chdir(tmp_path)
    write_base(PretrainedModel(path="theirs"), "", 32, 0, tmp_path / "stage")
    monkeypatch.chdir("/")
    assert os.readlink(tmp_path / "stage" / "model") == str(tmp_path / "theirs")
    load_policy(tmp_path / "stage" / "model")


def test_a_model_from_scratch_is_written(tmp_path: Path) -> None:
    tokenizer = save_tiny_policy(tmp_path / "theirs")
    (tmp_path / "stage").mkdir()
    write_base(ScratchModel(vocab_size=300), tokenizer, 32, 0, tmp_path / "stage")
    assert not (tmp_path / "stage" / "model").is_symlink()
    assert "model.safetensors" in files_under(tmp_path / "stage")


def test_a_changed_model_is_another_base_and_another_reference(tmp_path: Path) -> None:
    theirs = Path(save_tiny_policy(tmp_path / "theirs"))
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    tree = {
        "task": {"kind": "text", "data": str(data)}, "model": {"kind": "pretrained", "path": str(theirs)},
        "judge": {"kind": "function", "function": "x:y"}, "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
        "output": str(tmp_path / "runs"),
    }  # fmt: skip

    def keys() -> list[str]:
        (plan,) = make_plan(parse_config(tree))
        return [model_of(plan.base), model_of(plan.reference), plan.data.key]

    first = keys()
    assert keys() == first
    os.utime(theirs / "model.safetensors", ns=(1, 1))
    assert all(new != old for new, old in zip(keys(), first, strict=True))
