"""Models that are read by rows: the very numbers of whole ones, the same refusals, and half of the memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, SCORED, random_model, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from workers import OneOfMany

from prefarena.config import LoRA
from prefarena.errors import UserError
from prefarena.modeling.awaited import AwaitedTensors, fill, first_layers, is_awaited, standing_in
from prefarena.modeling.load import load_policy, load_reward_model, new_reward_model
from prefarena.modeling.logprobs import LogProbs, Sequences, token_logps
from prefarena.modeling.lora import adapter_parameters, add_adapters
from prefarena.modeling.parts import whole
from prefarena.modeling.shapes_first import (
    WholeOnlyError,
    new_reward_model_shapes,
    policy_shapes,
    raise_if_unusable,
    reward_model_shapes,
)
from prefarena.training import process_memory
from prefarena.training.loading import Loader

#: Whose tensors transformers makes of several in the files.
CONVERTED = {"mixtral"}
#: How each kind of model is loaded whole, and by rows.
KINDS: dict[str, tuple[Callable[[str], PreTrainedModel], Callable[[str], PreTrainedModel]]] = {
    "policy": (load_policy, policy_shapes),
    "reward model": (load_reward_model, reward_model_shapes),
    "new reward model": (lambda path: new_reward_model(path, 3), lambda path: new_reward_model_shapes(path, 3)),
}
CASES = [
    (family, kind) for family in FAMILIES for kind in KINDS if kind == "policy" or family in SCORED
]  # fmt: skip


def stored(folder: Path, family: str, kind: str) -> str:
    if kind != "reward model":
        return save_model(folder, random_model(family))
    return save_model(folder, random_model(family, "ForSequenceClassification", num_labels=1))


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[0] not in CONVERTED])
def test_a_model_that_is_read_by_rows_is_the_whole_one(tmp_path: Path, family: str, kind: str) -> None:
    path = stored(tmp_path, family, kind)
    load, shapes = KINDS[kind]
    expected = load(path)
    parts = [shapes(path) for _ in range(3)]
    assert all(is_awaited(part) for part in parts)
    drawn = {"score.weight"} if kind == "new reward model" else set()
    assert {name for name, parameter in parts[0].named_parameters() if not parameter.is_meta} == drawn
    awaited = AwaitedTensors(parts[0])
    assert all(torch.equal(awaited[name], tensor) for name, tensor in expected.state_dict().items())
    raise_if_unusable([fill(model, part, 3, "cpu") for part, model in enumerate(parts)])
    tensors = [dict(model.named_parameters(remove_duplicate=False)) for model in parts]
    for name, parameter in expected.named_parameters(remove_duplicate=False):
        found = tensors[0][name] if name in drawn else torch.cat([one[name] for one in tensors])
        assert torch.equal(found, parameter) and found.dtype == parameter.dtype, name
    for model in parts:
        assert not is_awaited(model) and not model.training
        buffers = dict(model.named_buffers())
        assert buffers.keys() == dict(expected.named_buffers()).keys()
        assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert len(list(model.parameters())) == len(list(expected.parameters()))  # tied is tied
        assert model.config.to_dict() == expected.config.to_dict()
        if expected.can_generate():
            assert model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_a_model_whose_tensors_are_made_of_others_is_loaded_whole_and_says_so(tmp_path: Path, family: str) -> None:
    path = stored(tmp_path / "model", family, "policy")
    with pytest.raises(WholeOnlyError, match="transformers makes its tensors of others"):
        policy_shapes(path)
    worker = OneOfMany(str(tmp_path / "stage"), 0, 2, "fsdp")
    model = Loader(worker).policy(path)
    assert not is_awaited(model)
    assert all(torch.equal(model.state_dict()[name], one) for name, one in load_policy(path).state_dict().items())
    (fault,) = worker.stage_log.faults()
    assert fault["kind"] == "loaded_whole" and "transformers makes its tensors of others" in fault["message"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CONVERTED])
def test_what_is_tried_on_the_first_layers_comes_out_as_on_all(tmp_path: Path, family: str) -> None:
    path = save_model(tmp_path, random_model(family, **_deeper(family)))
    model = policy_shapes(path)
    cut = first_layers(model)
    assert cut is not None and 1 <= cut[1] < len(cut[0])
    tried, expected = LogProbs(model, 48), LogProbs(load_policy(path), 48)
    assert (tried.packed, tried.plain_head, tried.notes) == (expected.packed, expected.plain_head, expected.notes)
    assert is_awaited(model)
    fill(model, 0, 1, "cpu")
    sequences = Sequences.of([[1, 3, 4], [1, 5]], [[5, 6, 2], [7, 2]])
    with torch.no_grad():
        assert torch.equal(token_logps(tried, sequences), token_logps(expected, sequences))


def _deeper(family: str) -> dict[str, Any]:
    """Four layers: no family here has more than two kinds of them, but where they come in periods."""
    if family in ("gpt2", "bloom"):
        return {"n_layer": 4}
    kinds = {"gemma3": ["sliding_attention", "full_attention"] * 2}
    return {"num_hidden_layers": 4} | ({"layer_types": kinds[family]} if family in kinds else {})


def test_a_copy_with_its_first_layers_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = policy_shapes(save_model(tmp_path, random_model("llama", num_hidden_layers=3)))
    twin = standing_in(model)
    assert [len(one.model.layers) for one in (model, twin)] == [3, 1]
    assert not is_awaited(twin) and all(parameter.is_meta for parameter in model.parameters())


def test_adapters_on_awaited_weights_have_the_same_random_numbers(tmp_path: Path) -> None:
    path = save_model(tmp_path, random_model("llama-tied"))
    models = [policy_shapes(path), load_policy(path)]
    for model in models:
        add_adapters(model, LoRA(rank=4), seed=5)
    ours, expected = (adapter_parameters(model, "default") for model in models)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], one) for name, one in expected.items())
    assert [one.requires_grad for one in models[0].parameters()] == [
        one.requires_grad for one in models[1].parameters()
    ]
    base = [one for name, one in models[0].named_parameters() if "lora_" not in name]
    assert all(parameter.is_meta for parameter in base)
    fill(models[0], 0, 1, "cpu")
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    assert all(torch.equal(models[0].state_dict()[name], one) for name, one in models[1].state_dict().items())


# ------------------------------------------------------------------------------------------------ refusals


def spoilt(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def reconfigured(**settings: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")

    return spoil


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][-2:] = torch.inf


def _nan_everywhere(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][::7] = torch.nan


DEFECTS: dict[str, Callable[[Path], None]] = {
    "numbers at the end of a tensor": spoilt(_infinite),
    "numbers in the rows of all workers": spoilt(_nan_everywhere),
    "a tensor is missing": spoilt(lambda tensors: tensors.pop("model.norm.weight")),
    "a tensor too many": spoilt(lambda tensors: tensors.update(more=torch.zeros(2))),
    "another size": spoilt(lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
    "a head of its own, tied by the config": reconfigured(tie_word_embeddings=True),
    "frequencies that are none": reconfigured(rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_refused_of_a_whole_model_is_refused_in_the_same_words(tmp_path: Path, defect: str) -> None:
    path = save_model(tmp_path, random_model("llama"))
    DEFECTS[defect](tmp_path)
    with pytest.raises(UserError) as expected:
        load_policy(path)
    with pytest.raises(UserError) as found:
        parts = [policy_shapes(path) for _ in range(2)]
        raise_if_unusable([fill(model, part, 2, "cpu") for part, model in enumerate(parts)])
    assert str(found.value) == str(expected.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, random_model("llama"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="there are no weights in it"):
        policy_shapes(path)


def test_files_that_hold_a_tied_head_as_well_are_read(tmp_path: Path) -> None:
    path = save_model(tmp_path, random_model("llama-tied"))
    both = spoilt(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    both(tmp_path)
    model, expected = policy_shapes(path), load_policy(path)
    raise_if_unusable([fill(model, 0, 1, "cpu")])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(model.state_dict()[name], one) for name, one in expected.state_dict().items())


# ------------------------------------------------------------------------------------- on several workers

SPREAD = ("llama", "llama-tied", "gpt2", "gemma3", "gpt-neox", "opt", "bloom", "qwen3")
MEBIBYTES = 2**20


def write_large(folder: Path) -> int:
    """A model most of which is in its layers. Returns its bytes."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    save_model(folder, model)
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def measured(load: Callable[[], nn.Module]) -> tuple[float, nn.Module]:
    """Most bytes that the process held while it loaded, beyond what it held before."""
    process_memory.return_tensors(at_once=True)
    process_memory.give_back_freed()
    process_memory.forget_peak()
    before = process_memory.resident_mib()
    module = load()
    return (process_memory.peak_mib() - before) * MEBIBYTES, module


def load_as_one_of_two(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    worker = OneOfMany(str(root / "stage"), rank, 2, "fsdp")

    def spread(path: str) -> nn.Module:
        return worker.distribute(LogProbs(Loader(worker).policy(path)), "float32")

    spread(str(root / SPREAD[0]))  # what torch and transformers load when they are first used
    peak, _ = measured(lambda: spread(str(root / "large")))
    peak_whole, _ = measured(lambda: LogProbs(load_policy(root / "large")))
    (root / f"{rank}.json").write_text(json.dumps([peak, peak_whole]), encoding="utf-8")
    for family in SPREAD:
        module = spread(str(root / family))
        gathered = {name: whole(tensor) for name, tensor in module.state_dict().items()}
        buffers = dict(module.named_buffers())
        sequences = Sequences.of([[1, 3, 4], [1, 5]], [[5, 6, 2], [7, 2]])
        with torch.no_grad():
            logps = token_logps(module, sequences)
        torch.save((gathered, buffers, logps), root / f"{family}-{rank}.pt")
    broken = load_file(root / SPREAD[0] / "model.safetensors")
    broken["model.norm.weight"][0] = torch.nan  # rank 0's row
    shutil.copytree(root / SPREAD[0], root / f"broken-{rank}")
    save_file(broken, root / f"broken-{rank}" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of the 64 numbers in model.norm.weight are NaN or infinite"):
        spread(str(root / f"broken-{rank}"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loaded")
    for family in SPREAD:
        save_model(root / family, random_model(family))
    size = write_large(root / "large")
    (root / "size.json").write_text(str(size), encoding="utf-8")
    torch.multiprocessing.spawn(load_as_one_of_two, args=(root,), nprocs=2)
    return root


@pytest.mark.parametrize("family", SPREAD)
def test_two_workers_have_the_whole_model_between_them(loaded: Path, family: str) -> None:
    expected = LogProbs(load_policy(loaded / family))
    sequences = Sequences.of([[1, 3, 4], [1, 5]], [[5, 6, 2], [7, 2]])
    with torch.no_grad():
        logps = token_logps(expected, sequences)
    for rank in range(2):
        gathered, buffers, found = torch.load(loaded / f"{family}-{rank}.pt")
        assert gathered.keys() == expected.state_dict().keys()
        assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.state_dict().items())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers())
        assert torch.equal(found, logps)


def test_a_worker_of_two_needs_little_more_than_half_of_the_model_to_load_it(loaded: Path) -> None:
    size = float((loaded / "size.json").read_text(encoding="utf-8"))
    for rank in range(2):
        peak, peak_whole = json.loads((loaded / f"{rank}.json").read_text(encoding="utf-8"))
        assert peak_whole > 0.95 * size
        assert peak < 0.7 * size
