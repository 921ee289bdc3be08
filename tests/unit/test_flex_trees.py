"""What only a GPU executes of tree attention, as far as it can be shown without one: masks, precision, variants."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from prefarena.modeling import chunked_head, flex_trees
from prefarena.modeling.chunked_head import chunked_logps
from prefarena.modeling.flex_trees import (
    BLOCK,
    Ints,
    mask_arrays,
    mask_of,
    options_for,
    visible_pairs,
    visible_to,
)
from prefarena.modeling.transfer import moved
from prefarena.modeling.tree_attention import Trees, plan_trees, tree_attention

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: Compute capability, and bytes of shared memory that a block of threads may ask for (CUDA's programming guide).
CARDS = {
    "A100": ((8, 0), 166912),
    "A10G": ((8, 6), 101376),
    "L40S": ((8, 9), 101376),
    "H100": ((9, 0), 232448),
}
#: Prompts and responses of each tree: short ones, some that cover several blocks, empty answers, an end on a boundary.
ROWS: dict[str, list[list[int]]] = {
    "short": [[3, 5, 4], [2, 1], [7, 9, 8, 1]],
    "long": [[300, 140, 260], [5, 600], [129, 127, 1]],
    "empty answers": [[30, 0, 40], [20, 0, 0], [10, 150]],
    "on a boundary": [[128, 128, 128], [64, 64]],
}


def row(lengths: list[list[int]]) -> tuple[Ints, Ints]:
    """tree_of and branch_of, padded to whole blocks as `packing.pack` does on CUDA."""
    sizes = [size for segments in lengths for size in segments]
    padding = -sum(sizes) % BLOCK
    tree = np.repeat([index for index, own in enumerate(lengths) for _ in own], sizes)
    branch = np.repeat([place for own in lengths for place in range(len(own))], sizes)
    return np.pad(tree, (0, padding), constant_values=-1), np.pad(branch, (0, padding))


def random_lengths(seed: int) -> list[list[int]]:
    source = np.random.default_rng(seed)
    return [[int(source.integers(1, 200)), *source.integers(0, 200, source.integers(1, 4)).tolist()] for _ in range(5)]


def block_mask(tree: Ints, branch: Ints, lengths: list[list[int]]) -> BlockMask:
    return mask_of(moved(mask_arrays(tree, branch, lengths), CPU))


@pytest.mark.parametrize("lengths", [*ROWS.values(), *(random_lengths(seed) for seed in range(6))])
def test_block_lists_hold_what_the_mask_says_of_every_pair_of_tokens(lengths: list[list[int]]) -> None:
    tree, branch = row(lengths)
    size = len(tree)
    mask = visible_to(torch.from_numpy(tree), torch.from_numpy(branch))
    query, key = torch.arange(size)[:, None], torch.arange(size)[None, :]
    visible = mask(torch.tensor(0), torch.tensor(0), query, key)
    blocks = visible.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK).sum((1, 3))
    assert visible_pairs(lengths, size).tolist() == blocks.tolist()

    ours = block_mask(tree, branch, lengths)
    theirs = create_block_mask(mask, None, None, size, size, device="cpu", BLOCK_SIZE=BLOCK)
    for name in ("kv", "full_kv", "q", "full_q"):
        numbers, expected = (getattr(one, f"{name}_num_blocks") for one in (ours, theirs))
        assert torch.equal(numbers, expected) and numbers.dtype == torch.int32
        found, wanted = (getattr(one, f"{name}_indices") for one in (ours, theirs))
        for place, number in enumerate(numbers[0, 0].tolist()):
            assert found[0, 0, place, :number].tolist() == wanted[0, 0, place, :number].tolist()


@pytest.mark.parametrize("lengths", ROWS.values())
@pytest.mark.parametrize("num_key_value_heads", [1, 2])
def test_flex_attention_computes_what_the_cpu_does(
    lengths: list[list[int]], num_key_value_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # it refuses backward
    tree, branch = row(lengths)
    used = sum(map(sum, lengths))
    generator = torch.Generator().manual_seed(2)
    heads = (2, num_key_value_heads, num_key_value_heads)
    wide = [torch.randn(1, count, len(tree), 8, generator=generator).double().requires_grad_() for count in heads]
    blocks = block_mask(tree, branch, lengths)
    query, key, value = wide
    theirs, _ = tree_attention(torch.nn.Module(), query, key, value, None, trees=Trees((), blocks))
    on_cpu = plan_trees(branch[:used], lengths)
    query, key, value = (tensor[:, :, :used] for tensor in wide)
    ours, _ = tree_attention(torch.nn.Module(), query, key, value, None, trees=on_cpu)
    torch.testing.assert_close(ours, theirs[:, :used], rtol=0, atol=1e-12)
    factors = torch.randn(ours.shape, generator=generator).double()
    gradients = [torch.autograd.grad((out * factors).sum(), wide) for out in (ours, theirs[:, :used])]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_a_kernel_that_cannot_be_made_is_told_and_lack_of_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    flex_trees.why_not.cache_clear()
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # it refuses backward
    assert flex_trees.why_not(CPU, torch.float32, 4, 2, 16) is None

    def refused(*_: object, **__: object) -> Tensor:
        raise RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: shared memory\nmore lines")

    monkeypatch.setattr(flex_trees, "flex_attention", refused)
    reason = flex_trees.why_not(CPU, torch.float32, 4, 2, 32)
    assert reason == "No valid triton configs. OutOfMemoryError: out of resource: shared memory"

    def exhausted(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flex_trees, "flex_attention", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        flex_trees.why_not(CPU, torch.float32, 4, 2, 64)
    flex_trees.why_not.cache_clear()


def test_a_kernel_that_gives_no_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    flex_trees.why_not.cache_clear()

    def unsafe(query: Tensor, *_: object, **__: object) -> Tensor:
        """Rows behind the first 12 see nothing in their first tile."""
        return query * torch.where(torch.arange(BLOCK) < 12, 1.0, torch.nan)[:, None]

    monkeypatch.setattr(flex_trees, "flex_attention", unsafe)
    assert flex_trees.why_not(CPU, torch.float32, 4, 2, 16) == "its kernel gives values that are not finite numbers"
    flex_trees.why_not.cache_clear()


def test_too_many_variants_are_an_error_rather_than_silence() -> None:
    """With torch's defaults the ninth variant runs uncompiled, and holds the scores of all pairs of tokens."""
    call = torch.compile(lambda tensor, power: tensor**power, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        call(torch.ones(2), 2), call(torch.ones(3), 2)
        with pytest.raises(FailOnRecompileLimitHit):
            call(torch.ones(4), 2)
    assert torch._dynamo.config.recompile_limit > 2


def test_every_kernel_that_would_be_chosen_fits_its_card() -> None:
    """The table of benchmarks/attention_kernels.py, which compiles them, is of the options that stand in the code."""
    rows = json.loads((BENCHMARKS / "results" / "attention_kernels.json").read_text(encoding="utf-8"))
    combinations = itertools.product(CARDS, ("bfloat16", "float32", "tf32"), (64, 128, 256))
    assert [(row["card"], row["kind"], row["head_dim"]) for row in rows] == list(combinations)
    for row in rows:
        capability, shared_memory = CARDS[row["card"]]
        kind = torch.bfloat16 if row["kind"] == "bfloat16" else torch.float32
        assert row["options"] == options_for(kind, row["head_dim"], capability, shared_memory)
        assert set(row["kernels"]) == {"forward", "backward"}
        for kernel in row["kernels"].values():
            assert kernel["shared_memory"] <= shared_memory
            assert kernel["spilled"] < 1000  # bytes per thread: torch's own tiles spilled up to 55,440


def test_the_kernel_is_not_told_that_every_token_sees_something_in_the_first_tile() -> None:
    """It takes the safe path of its softmax: rows that see nothing in the first tile that they look at exist."""
    tree, branch = map(torch.from_numpy, row(ROWS["short"]))
    sees = visible_to(tree, branch)
    queries, keys = torch.arange(len(tree))[:, None], torch.arange(32)[None, :]
    none = torch.zeros((), dtype=torch.long)
    assert not sees(none, none, queries, keys).any(1).all()
    for capability, shared_memory in CARDS.values():
        for kind in (torch.bfloat16, torch.float32):
            assert not options_for(kind, 64, capability, shared_memory).get("ROWS_GUARANTEED_SAFE")


# ---------------------------------------------------------------------------------------------- the head


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """Every product of matrices that the head makes: the kinds of both factors, and of the result."""
    found: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []
    plain: Any = torch.mm

    def recorded(left: Tensor, right: Tensor, **keywords: torch.dtype) -> Tensor:
        out: Tensor = plain(left, right, **keywords)
        found.append((left.dtype, right.dtype, keywords.get("out_dtype", out.dtype)))
        return out

    monkeypatch.setattr(torch, "mm", recorded)
    return found


def test_on_a_gpu_the_head_of_a_model_in_halves_multiplies_bfloat16_and_sums_float32(
    products: list[tuple[torch.dtype, torch.dtype, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of float32 numbers were two fifths of a step on an H100."""
    monkeypatch.setattr(chunked_head, "_on_gpu", lambda _: True)
    half, wide = torch.bfloat16, torch.float32
    with FakeTensorMode():  # tensors without their numbers: the CPU has no such product
        hidden, weight = torch.empty(40, 16, dtype=half), torch.empty(64, 16, dtype=half)
        targets = torch.zeros(40, dtype=torch.long)
        logps, _ = chunked_logps(hidden, weight, None, targets)
        assert logps.dtype == wide and products == [(half, half, wide)]
        context = SimpleNamespace(
            saved_tensors=(hidden, weight, None, targets, logps, logps),
            needs_input_grad=(True, True, False),
            scale=1.0,
        )
        gradients = chunked_head._ChunkedHead.backward(context, logps, None)
    assert [gradient.dtype for gradient in gradients[:2] if gradient is not None] == [half, half]
    assert products == [(half, half, wide)] * 4  # logits, logits again, and both gradients


def test_the_halved_head_and_its_gradients_are_those_of_float64_to_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_head, "TOKENS", 16)
    monkeypatch.setattr(chunked_head, "VOCABULARY", 100)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 64, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(300, 64, generator=generator) / 8).bfloat16().requires_grad_()
    targets = torch.randint(0, 300, (48,), generator=generator)
    factors = torch.randn(48, generator=generator)
    found, _ = chunked_logps(hidden, weight, None, targets)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.log_softmax(exact[0] @ exact[1].t(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)  # products are exact, sums float32
    ours = torch.autograd.grad((found * factors).sum(), [hidden, weight])
    theirs = torch.autograd.grad((expected * factors).sum(), exact)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine.double() - wanted).norm() < 4e-3 * wanted.norm()
