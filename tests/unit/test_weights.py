"""Weights on their way to engines: completeness, checksums, and how prompts are shared out."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from prefarena.generation.checksums import (
    RANKS_DIFFER,
    ColumnSample,
    Piece,
    checksum,
    checksums,
    columns_of,
    piece_of,
    summed,
    taken,
    whole_checksums,
    within,
)
from prefarena.generation.fleet import balance
from prefarena.generation.interface import WeightMismatchError, WeightUpdateError
from prefarena.generation.shared import Bucket, buckets, shared
from prefarena.generation.weights import Verified, check_complete, check_held, check_known


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
    monkeypatch.setattr("prefarena.generation.checksums._BLOCK", 7)
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


# ------------------------------------------------------------------------------------- what ranks hold of tensors


def cut(tensor: torch.Tensor, rows: list[int], places: list[int], sample: ColumnSample | None = None) -> list[Piece]:
    """The pieces of a matrix whose rows and columns are cut at these places."""
    found = []
    for top, bottom in itertools.pairwise([0, *rows, len(tensor)]):
        for left, right in itertools.pairwise([0, *places, tensor.shape[1]]):
            columns = within(columns_of(sample, tensor.shape[1]), left, right)
            piece = piece_of(taken(tensor, columns)[top:bottom].clone(), tuple(tensor.shape), top, columns)
            assert piece is not None
            found.append(piece)
    return found


@pytest.mark.parametrize(("rows", "places"), [([3], []), ([], [2]), ([1, 4], [1, 3]), ([0], []), ([], [5])])
def test_parts_of_a_tensor_add_up_to_its_checksum(rows: list[int], places: list[int]) -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    pieces = cut(tensor, rows, places)
    assert whole_checksums([{"x": [piece]} for piece in pieces], {"x": (7, 5)}) == {"x": checksum(tensor)}
    assert whole_checksums([{"x": pieces}], {"x": (7, 5)}) == {"x": checksum(tensor)}


@pytest.mark.parametrize("turn", [0, 1, 17, 40])
@pytest.mark.parametrize(("rows", "places"), [([], []), ([2], []), ([], [100, 290]), ([], [1])])
def test_samples_of_parts_add_up_to_the_sample_of_the_whole(rows: list[int], places: list[int], turn: int) -> None:
    tensor, sample = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)), ColumnSample(turn)
    found = whole_checksums([{"x": [piece]} for piece in cut(tensor, rows, places, sample)], {"x": (5, 300)}, sample)
    assert found == {"x": checksum(tensor, sample)} and found["x"] != checksum(tensor)


def test_every_column_has_its_turn_in_samples() -> None:
    for width in (256, 576, 4096):
        turns = [columns_of(ColumnSample(turn), width) for turn in range(width // 16)]
        assert {column for columns in turns for column in columns} == set(range(width))
        assert all(16 <= len(columns) <= 18 for columns in turns)
    assert columns_of(ColumnSample(3), 255) == range(255) and columns_of(None, 4096) == range(4096)


def test_a_sample_notices_rows_that_are_old_or_exchanged() -> None:
    tensor = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    old, exchanged = tensor.clone(), tensor.clone()
    old[7] += 0.1
    exchanged[[3, 4]] = tensor[[4, 3]]
    for turn in range(32):
        assert len({checksum(each, ColumnSample(turn)) for each in (tensor, old, exchanged)}) == 3


def test_parts_that_are_exchanged_are_noticed() -> None:
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    exchanged = [piece_of(tensor[3:], (6, 4), 0, range(4)), piece_of(tensor[:3], (6, 4), 3, range(4))]
    found = whole_checksums([{"x": [piece]} for piece in exchanged if piece], {"x": (6, 4)})
    assert found["x"] != checksum(tensor)


def test_what_several_ranks_hold_counts_once_and_must_be_the_same() -> None:
    norm = torch.randn(8, generator=torch.Generator().manual_seed(0))
    whole, other = (piece_of(each[:, None], (8,), 0, range(1)) for each in (norm, norm + 1))
    assert whole is not None and other is not None
    assert whole_checksums([{"x": [whole]}, {"x": [whole]}], {"x": (8,)}) == {"x": checksum(norm)}
    assert whole_checksums([{"x": [whole]}, {"x": [other]}], {"x": (8,)}) == {"x": RANKS_DIFFER}
    with pytest.raises(WeightMismatchError, match="x differ"):
        check_held({"x": RANKS_DIFFER}, {"x": checksum(norm)}, {"x": (8,)})


def test_a_tensor_of_which_a_part_was_not_found_is_not_compared() -> None:
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    half = piece_of(tensor[:3], (6, 4), 0, range(4))
    assert half is not None
    assert whole_checksums([{"x": [half]}, {}], {"x": (6, 4), "y": (2,)}) == {}
    assert piece_of(tensor[:3], (6, 4), 4, range(4)) is None and piece_of(tensor, (6, 3), 0, range(4)) is None
    assert piece_of(tensor, (6, 4), 0, range(3)) is None and piece_of(tensor, (24,), 0, range(4)) is None


# ------------------------------------------------------------------------------------------- buckets, shared memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_in_shared_memory_are_read_as_they_were_written(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(3, 5, generator=random).to(dtype), "b": torch.randn(7, 2, generator=random).T}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(3.0)}
    written = tensors["b"].clone()
    with shared(tensors) as told:
        read = pickle.loads(pickle.dumps(told)).open()
    tensors["b"].add_(1)  # what was read is a copy, which outlives the writer's block
    assert torch.equal(read["a"], tensors["a"]) and torch.equal(read["b"], written)
    assert read["empty"].shape == (0, 4) and read["number"] == 3 and read["a"].dtype == dtype


def of_sizes(**sizes: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((size,), float(size)) for name, size in sizes.items()}


def put_away(filled: Iterator[Bucket]) -> list[Bucket]:
    """Copies, as the object store has them."""
    return [replace(bucket, data=bucket.data.copy()) for bucket in filled]


def test_buckets_hold_what_fits_in_order_and_what_is_larger_alone() -> None:
    """In bytes of bfloat16, each tensor beginning at a multiple of 64."""
    tensors = of_sizes(a=32, b=16, c=64, d=500, e=3, f=96)
    found = put_away(buckets(tensors.items(), torch.bfloat16, 256))
    assert [list(bucket.entries) for bucket in found] == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert [len(bucket.data) for bucket in found] == [256, 1024, 256]
    read = {name: tensor for bucket in found for name, tensor in bucket.tensors().items()}
    assert all(torch.equal(read[name], tensors[name].bfloat16()) for name in tensors)
    assert list(buckets([], torch.float32, 256)) == []


def test_buckets_are_filled_in_the_same_memory() -> None:
    """New memory costs ten times as much as the copying."""
    places = [bucket.data.ctypes.data for bucket in buckets(of_sizes(a=32, b=32, c=32).items(), torch.bfloat16, 64)]
    assert len(places) == 3 and len(set(places)) == 1


def test_a_bucket_holds_copies_in_the_engines_dtype() -> None:
    tensor = torch.tensor([1.0, 1.0 + 2**-12], requires_grad=True)
    [bucket] = buckets([("x", tensor)], torch.bfloat16, 64)
    with torch.no_grad():
        tensor.zero_()
    assert bucket.tensors()["x"].tolist() == [1.0, 1.0] and not bucket.tensors()["x"].requires_grad


@pytest.mark.filterwarnings("error")
def test_a_bucket_in_memory_that_may_only_be_read_is_read_without_a_warning() -> None:
    """Ray's arrays are read-only. Torch warns of them once in a process, so it is told to warn always."""
    [bucket] = buckets(of_sizes(x=3).items(), torch.float32, 64)
    data = bucket.data.copy()
    data.flags.writeable = False
    warned_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        assert Bucket(bucket.entries, data).tensors()["x"].tolist() == [3.0, 3.0, 3.0]
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
    check_known({"layer.3": NAMES["layer.3"]}, NAMES)
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
    with pytest.raises(WeightMismatchError, match=r"engine's weights are not those that were sent: b differ"):
        check_held({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "c": 3}, dict.fromkeys("abc", (1,)))


def test_it_is_told_how_much_of_a_model_was_read_back() -> None:
    """Of 6 + 5 + 4 + 1 parameters the tensors of 5 and 1 cannot be shown; what was not sent does not count."""
    shapes = {"a": (2, 3), "d": (5,), "c": (4,), "b": (1,)}
    held = {"a": 1, "c": 3, "not sent": 9}
    verified = check_held(held, {"a": 1, "d": 4, "c": 3, "b": 2}, shapes)
    assert verified == Verified(2, 10, 4, 16, ("b", "d"))
    assert verified.share == 0.625
    assert str(verified) == (
        "2 of 4 tensors (62.5 % of the parameters) were read back from the engine and match what was sent; "
        "the layout of the others is unknown: b, d"
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
        "1 of 1 tensors (100.0 % of the parameters) were read back from the engine and match what was sent"
    )


def test_weights_go_to_the_host_one_by_one() -> None:
    """A device holds one gathered or merged tensor at a time."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abcdef":
            gc.collect()
            assert sum(one() is not None for one in alive) <= 1  # the one before is let go of when this one is given
            new = torch.full((3,), 1.5)
            alive.append(weakref.ref(new))
            yield name, new

    sums: dict[str, int] = {}
    sent = list(buckets(summed(made(), sums, torch.bfloat16), torch.bfloat16, 128))
    assert [list(bucket.entries) for bucket in sent] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert sums == checksums({name: torch.full((3,), 1.5) for name in "abcdef"}, torch.bfloat16)


def test_tensors_that_an_engine_holds_the_other_way_round_are_summed_so() -> None:
    tensors = {"a": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}
    assert checksums(tensors, torch.float32, {"a"}) == {"a": checksum(tensors["a"].T.contiguous())}
    assert checksums(tensors, torch.float32, {"b"}) == {"a": checksum(tensors["a"])}


def test_checksums_are_of_the_dtype_that_the_engine_holds() -> None:
    exact = {"a": torch.tensor([1.0, 1.0 + 2**-12])}
    rounded = {"a": torch.tensor([1.0, 1.0])}
    assert checksums(exact, torch.bfloat16) == checksums(rounded, torch.bfloat16)
    assert checksums(exact, torch.float32) != checksums(rounded, torch.float32)
