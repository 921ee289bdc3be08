"""Weights on their way to engines: completeness, checksums, and how prompts are shared out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from prefarena.generation.fleet import balance
from prefarena.generation.interface import WeightMismatchError, WeightUpdateError
from prefarena.generation.weights import (
    Verified,
    as_arrays,
    as_tensors,
    check_complete,
    check_held,
    checksum,
    checksums,
    to_host,
)


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


def test_a_checksum_is_computed_where_the_tensor_is() -> None:
    """Where new tensors go elsewhere by default, as they do beside a model on a GPU."""
    tensor = torch.randn(9, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        found = checksum(tensor)
    assert found == checksum(tensor)


def in_python(patterns: list[int]) -> int:
    """The checksum of bit patterns (signed), in whole numbers without torch."""
    total = 0
    for place, pattern in enumerate(patterns, start=1):
        mixed = place * 0x2545F4914F6CDD1D % 2**64
        signed = mixed - 2**64 if mixed >= 2**63 else mixed
        total += pattern * ((signed ^ (signed >> 29)) | 1)
    return total % 2**64


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)],
)
@pytest.mark.parametrize("seed", range(8))  # the signed sums of some are negative
def test_a_checksum_is_the_sum_that_whole_numbers_give(dtype: torch.dtype, bits: torch.dtype, seed: int) -> None:
    tensor = torch.randn(23, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert checksum(tensor) == in_python(tensor.view(bits).flatten().tolist())


def test_changes_of_several_places_do_not_cancel() -> None:
    """A place is multiplied by the checksum of the bit pattern 1 there; +1, -2, +1 at even distances is seen."""
    numbers = []
    for place in range(128):
        patterns = torch.zeros(128, dtype=torch.int32)
        patterns[place] = 1
        numbers.append(checksum(patterns.view(torch.float32)))
    assert len(set(numbers)) == 128 and all(number % 2 == 1 for number in numbers)
    assert all(40 <= sum(number >> bit & 1 for number in numbers) <= 88 for bit in range(1, 63))
    for step in range(1, 60):
        for first, middle, last in zip(numbers, numbers[step:], numbers[2 * step :], strict=False):
            rest = (first - 2 * middle + last) % 2**64
            assert min(rest, 2**64 - rest) > 1000  # without the second half of the mixing: at most 4


def test_tensors_survive_the_way_through_shared_arrays() -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    back = as_tensors(as_arrays(tensors))
    assert torch.equal(back["a"], tensors["a"])
    assert checksums(back, torch.bfloat16)["b"] == checksums(tensors, torch.bfloat16)["b"]


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_become_tensors_without_a_warning() -> None:
    """Ray's arrays are read-only. Torch warns of them once in a process, so it is told to warn always."""
    array = np.arange(3, dtype=np.float32)
    array.flags.writeable = False
    warned_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        assert as_tensors({"a": array})["a"].tolist() == [0.0, 1.0, 2.0]
    finally:
        torch.set_warn_always(warned_always)


def test_prompts_are_balanced_by_length_and_none_is_lost() -> None:
    loads = [100, 1, 1, 1, 50, 50, 1]
    shards = balance(loads, 2)
    assert sorted(index for shard in shards for index in shard) == list(range(7))
    assert shards == [sorted(shard) for shard in shards]
    assert sorted(sum(loads[index] for index in shard) for shard in shards) == [102, 102]
    assert balance([5, 5], 3)[2] == []
    assert balance([], 2) == [[], []]


NAMES = {f"layer.{i}": (i + 1, 2) for i in range(7)}


def test_a_whole_update_passes_and_a_partial_one_is_refused_by_name() -> None:
    check_complete(dict(NAMES), NAMES)
    with pytest.raises(WeightUpdateError, match=r"missing: layer\.3$"):
        check_complete({name: shape for name, shape in NAMES.items() if name != "layer.3"}, NAMES)
    with pytest.raises(WeightUpdateError, match=r"does not have: extra$"):
        check_complete({**NAMES, "extra": (1,)}, NAMES)
    with pytest.raises(WeightUpdateError, match=r"layer\.2 was sent with shape \(2, 3\), but the engine's is \(3, 2\)"):
        check_complete({**NAMES, "layer.2": (2, 3)}, NAMES)


@pytest.mark.parametrize(
    ("num_missing", "ending"),
    [(2, r"layer\.0, layer\.1$"), (5, r"layer\.3, layer\.4$"), (6, r"layer\.4 and 1 more$"), (7, "4 and 2 more$")],
)
def test_at_most_five_names_are_listed(num_missing: int, ending: str) -> None:
    sent = {name: shape for i, (name, shape) in enumerate(NAMES.items()) if i >= num_missing}
    with pytest.raises(WeightUpdateError, match=ending):
        check_complete(sent, NAMES)


def test_weights_that_differ_are_named_and_no_others() -> None:
    with pytest.raises(WeightMismatchError, match=r"does not hold what was sent: b differ"):
        check_held({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "c": 3}, dict.fromkeys("abc", (1,)))


def test_it_is_told_how_much_of_a_model_was_read_back() -> None:
    """Of 6 + 5 + 4 + 1 parameters the tensors of 5 and 1 cannot be shown; what was not sent does not count."""
    shapes = {"a": (2, 3), "d": (5,), "c": (4,), "b": (1,)}
    held = {"a": 1, "c": 3, "not sent": 9}
    verified = check_held(held, {"a": 1, "d": 4, "c": 3, "b": 2}, shapes)
    assert verified == Verified(2, 10, 4, 16, ("b", "d"))
    assert verified.share == 0.625
    assert str(verified) == (
        "2 of 4 tensors (62.5 % of the parameters) were read back from the engine and are what was sent; "
        "the layout of the others is not known: b, d"
    )
    assert verified.summary() == {
        "num_tensors": 2,
        "num_tensors_sent": 4,
        "share_of_parameters": 0.625,
        "skipped": ["b", "d"],
    }


def test_of_a_model_that_was_read_back_whole_nothing_is_named() -> None:
    verified = check_held({"a": 1}, {"a": 1}, {"a": (2, 2)})
    assert (verified.num_parameters, verified.share, verified.skipped) == (4, 1.0, ())
    assert str(verified) == (
        "1 of 1 tensors (100.0 % of the parameters) were read back from the engine and are what was sent"
    )


def test_arrays_are_float32_on_the_host_without_a_graph() -> None:
    arrays = as_arrays({"a": torch.full((2,), 1.5, dtype=torch.bfloat16, requires_grad=True)})
    assert arrays["a"].dtype == np.float32 and arrays["a"].tolist() == [1.5, 1.5]


def test_weights_go_to_the_host_one_by_one() -> None:
    """A device holds one gathered or merged tensor at a time."""
    tensors = {
        name: torch.full((3,), number, dtype=torch.bfloat16) for name, number in (("a", 1.5), ("b", 2.5), ("c", 3.5))
    }
    alive: list[weakref.ref[torch.Tensor]] = []

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            gc.collect()
            assert sum(one() is not None for one in alive) <= 1  # the one before is let go of when this one is given
            new = tensor.clone()
            alive.append(weakref.ref(new))
            yield name, new

    arrays, sums = to_host(made(), torch.bfloat16)
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [1.5] * 3, "b": [2.5] * 3, "c": [3.5] * 3}
    assert sums == checksums(tensors, torch.bfloat16)
    assert to_host(tensors.items(), None)[1] is None


def test_checksums_are_of_the_dtype_that_the_engine_holds() -> None:
    exact = {"a": torch.tensor([1.0, 1.0 + 2**-12])}
    rounded = {"a": torch.tensor([1.0, 1.0])}
    assert checksums(exact, torch.bfloat16) == checksums(rounded, torch.bfloat16)
    assert checksums(exact, torch.float32) != checksums(rounded, torch.float32)
