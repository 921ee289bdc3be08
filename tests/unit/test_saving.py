"""Folders that are written tensor by tensor: what `save_pretrained` leaves, in files of bounded size."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, random_model, save_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefarena.config import LoRA
from prefarena.modeling import saving
from prefarena.modeling.load import load_policy, load_tokenizer, save_policy
from prefarena.modeling.lora import add_adapters, merge_adapters, merged_weights
from prefarena.modeling.saving import layout_of, save_by_tensors

#: What transformers alone can write: its tensors in the files are made of several.
CONVERTED = {"mixtral"}
SMALL = 2**15


@pytest.fixture
def policy(tmp_path: Path) -> PreTrainedModel:
    return load_policy(save_model(tmp_path / "start", random_model("llama")))


def save(model: PreTrainedModel, folder: Path, start: Path, **keywords: Any) -> None:
    layout = layout_of(model)
    assert layout is not None
    tokenizer = load_tokenizer(start)
    weights = keywords.pop("weights", model.state_dict().items())
    save_by_tensors(model, layout, weights, tokenizer, folder, **{"writes": True, **keywords})


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    return found


@pytest.mark.parametrize("largest", [SMALL, saving.LARGEST_FILE])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CONVERTED])
def test_what_is_written_is_what_transformers_writes(tmp_path: Path, family: str, largest: int) -> None:
    start = tmp_path / "start"
    model = load_policy(save_model(start, random_model(family)))
    save_policy(model, load_tokenizer(start), tmp_path / "whole")
    save(load_policy(start), tmp_path / "ours", start, largest=largest)
    ours, expected = stored(tmp_path / "ours"), stored(tmp_path / "whole")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    others = {path.name for path in (tmp_path / "whole").iterdir() if path.suffix != ".safetensors"}
    index = set() if largest > SMALL else {"model.safetensors.index.json"}
    assert {path.name for path in (tmp_path / "ours").iterdir() if path.suffix != ".safetensors"} == others | index
    for name in others:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "ours"), dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_files_have_a_bounded_size_and_an_index_names_them(tmp_path: Path, policy: PreTrainedModel) -> None:
    save(policy, tmp_path / "ours", tmp_path / "start", largest=SMALL)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert [path.name for path in files] == [
        f"model-{place + 1:05d}-of-{len(files):05d}.safetensors" for place in range(len(files))
    ]
    for path in files:
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 (it is no dictionary)
        assert sum(sizes) <= SMALL or len(sizes) == 1
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == policy.state_dict().keys()
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in policy.state_dict().values())


def test_what_an_earlier_attempt_has_written_is_no_part_of_it(tmp_path: Path, policy: PreTrainedModel) -> None:
    save(policy, tmp_path / "ours", tmp_path / "start", largest=SMALL)
    save(policy, tmp_path / "ours", tmp_path / "start")
    assert [path.name for path in (tmp_path / "ours").glob("*.safetensors*")] == ["model.safetensors"]
    save(policy, tmp_path / "ours", tmp_path / "start", largest=SMALL)
    assert not (tmp_path / "ours" / "model.safetensors").exists()


def test_merged_adapters_are_those_that_peft_merges(tmp_path: Path, policy: PreTrainedModel) -> None:
    add_adapters(policy, LoRA(rank=4), seed=1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save(policy, tmp_path / "ours", tmp_path / "start", weights=merged_weights(policy))
    merge_adapters(policy)
    save_policy(policy, load_tokenizer(tmp_path / "start"), tmp_path / "whole")
    ours, expected = stored(tmp_path / "ours"), stored(tmp_path / "whole")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "ours" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()


def test_a_disk_that_is_full_is_told_after_all_tensors_were_made(
    tmp_path: Path, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a spread model are made by all workers together, who would wait for one that stops in the middle."""
    made: list[str] = []

    def weights() -> Any:
        for name, tensor in policy.state_dict().items():
            made.append(name)
            yield name, tensor

    def full(writer: Any, name: str, tensor: Tensor) -> None:
        if len(made) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving._Writer, "add", full)
    with pytest.raises(OSError, match="No space left"):
        save(policy, tmp_path / "ours", tmp_path / "start", weights=weights())
    assert made == list(policy.state_dict())


def test_a_worker_that_does_not_write_makes_all_tensors(tmp_path: Path, policy: PreTrainedModel) -> None:
    weights = iter(policy.state_dict().items())
    save(policy, tmp_path / "ours", tmp_path / "start", weights=weights, writes=False)
    assert next(weights, None) is None and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_a_model_whose_files_need_several_tensors_at_once_has_no_layout(tmp_path: Path, family: str) -> None:
    assert layout_of(load_policy(save_model(tmp_path, random_model(family)))) is None
