"""New weights in engines of families whose layers are unlike Llama's: taken, verified, and wrong ones found.

All families, in a table: `python -m benchmarks.families`, docs/models.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prefarena.generation.interface import WeightMismatchError
from prefarena.generation.layout import ModelLayout
from prefarena.generation.weights import check_held
from prefarena.modeling.load import load_policy
from tests.helpers.families import LARGEST_GAP, compare, engine_process, make
from tests.helpers.models import FAMILIES, random_model, save_model


#: vLLM sets a process up for experts when its first engine starts, or not at all: Mixtral has one of its own.
@pytest.mark.parametrize("families", [["gpt2", "gpt-neox", "gemma2"], ["mixtral"]], ids=" ".join)
def test_new_weights_reach_engines_of_other_families(ray_session: None, tmp_path: Path, families: list[str]) -> None:
    models = {family: make(tmp_path / family, family) for family in families}
    with engine_process() as run:
        for family, (old, new) in models.items():
            outcome = compare(old, new, run(str(tmp_path / family), new.state_dict()))
            assert outcome.gap < LARGEST_GAP < outcome.old_gap, family
            unread = {name for name in outcome.verified.skipped if ".experts." not in name}
            assert unread == set() and bool(outcome.verified.skipped) == (family == "mixtral"), family
            assert outcome.unnoticed == [], family


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_are_those_of_the_state_dict_and_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    save_model(tmp_path, random_model(family))
    state = load_policy(tmp_path).state_dict()
    layout = ModelLayout(str(tmp_path))
    assert layout.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    sent = layout.as_checkpoint(state)
    whole = {tensor.name for tensor in layout.tensors.values() if tensor.name is not None}
    assert whole <= sent.keys()
    assert sum(tensor.numel() for tensor in sent.values()) == sum(tensor.numel() for tensor in state.values())
    pointers = [tensor.data_ptr() for tensor in state.values()]
    shared = {name for name, tensor in state.items() if pointers.count(tensor.data_ptr()) > 1}
    assert {name for name, each in layout.tensors.items() if each.tied_to} == shared & layout.tied
    assert len(layout.tied) == (1 if shared else 0)


def test_experts_are_taken_apart_as_in_a_checkpoint(tmp_path: Path) -> None:
    save_model(tmp_path, random_model("mixtral"))
    state = load_policy(tmp_path).state_dict()
    layout = ModelLayout(str(tmp_path))
    sent = layout.as_checkpoint(state)
    fused = state["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(2):
        parts = [sent[f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"] for part in ("w1", "w3")]
        assert fused[expert].equal(fused.new_tensor([row for part in parts for row in part.tolist()]))
    assert layout.tensors["model.layers.0.mlp.experts.gate_up_proj"].name is None
    assert layout.tensors["model.layers.0.mlp.gate.weight"].name == "model.layers.0.block_sparse_moe.gate.weight"


def test_what_an_engine_does_not_show_is_counted_and_named() -> None:
    shapes = {"a": (2, 3), "b": (4,), "c": (10,)}
    verified = check_held({"a": 1, "b": 2, "other": 5}, {"a": 1, "b": 2, "c": 3}, shapes)
    assert (verified.num_tensors, verified.num_parameters, verified.share) == (2, 10, 0.5)
    assert verified.skipped == ("c",)
    assert "2 of 3 tensors (50.0 % of the parameters)" in str(verified) and str(verified).endswith(": c")
    with pytest.raises(WeightMismatchError, match="b differ"):
        check_held({"a": 1, "b": 9}, {"a": 1, "b": 2, "c": 3}, shapes)
