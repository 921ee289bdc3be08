"""Weights on their way to engines: completeness, checksums, and how prompts are shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_policy

from prefarena.generation.fleet import balance
from prefarena.generation.interface import WeightMismatchError
from prefarena.generation.weights import as_arrays, as_tensors, check_held, checksum, checksums, expected_shapes
from prefarena.modeling.load import load_policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_tells_values_and_places_apart(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    again = tensor.clone()
    assert checksum(tensor) == checksum(again) == checksum(tensor.reshape(5, 37))
    again[3, 2] = torch.nextafter(again[3, 2].float(), torch.tensor(9.0)) if dtype == torch.float32 else again[3, 2] * 2
    assert checksum(again) != checksum(tensor)
    assert checksum(tensor.flip(0)) != checksum(tensor)
    assert checksum(-tensor) != checksum(tensor)
    assert checksum(tensor.T) != checksum(tensor)  # what is summed is the logical order, not that of the memory
    assert checksum(tensor.T.contiguous().T) == checksum(tensor)


def test_negative_zero_counts_as_zero() -> None:
    assert checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([-0.0, 1.0]))


def test_a_checksum_does_not_depend_on_the_size_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = checksum(tensor)
    monkeypatch.setattr("prefarena.generation.weights._BLOCK", 7)
    assert checksum(tensor) == whole


def test_tensors_survive_the_way_through_shared_arrays() -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    back = as_tensors(as_arrays(tensors))
    assert torch.equal(back["a"], tensors["a"])
    assert checksums(back, torch.bfloat16)["b"] == checksums(tensors, torch.bfloat16)["b"]


@pytest.mark.parametrize("tied", [False, True])
def test_expected_shapes_are_those_of_the_state_dict(tmp_path: Path, tied: bool) -> None:
    path = save_tiny_policy(tmp_path, tied=tied)
    state = load_policy(path).state_dict()
    assert expected_shapes(path) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert "lm_head.weight" in state


def test_weights_that_an_engine_does_not_show_are_not_taken_for_right() -> None:
    check_held({"a": 1, "b": 2}, {"a": 1})
    with pytest.raises(WeightMismatchError, match=r"does not show c; .* generation\.verify_weights: false"):
        check_held({"a": 1}, {"a": 1, "c": 3})


def test_prompts_are_balanced_by_length_and_none_is_lost() -> None:
    loads = [100, 1, 1, 1, 50, 50, 1]
    shards = balance(loads, 2)
    assert sorted(index for shard in shards for index in shard) == list(range(7))
    assert shards == [sorted(shard) for shard in shards]
    assert sorted(sum(loads[index] for index in shard) for shard in shards) == [102, 102]
    assert balance([5, 5], 3)[2] == []
    assert balance([], 2) == [[], []]
