"""Decoder layers compiled whole, as on a GPU, on the CPU: what they compute, and how many graphs that takes.

"aot_eager" runs the graphs of both passes operation by operation, "inductor" compiles them; FlexAttention has no
backward pass of its own on CPUs, so rows of blocks are run by the first alone. That Inductor compiles the layers for
GPUs is shown by benchmarks/layer_kernels.py.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from models import random_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from prefarena.config import LoRA
from prefarena.modeling import compiled_layers, tree_attention
from prefarena.modeling.arithmetic import in_weights
from prefarena.modeling.compiled_layers import compile_layers, why_not_compiled
from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.layers import decoder_layers, recompute_layers
from prefarena.modeling.lora import add_adapters
from prefarena.modeling.packing import PackedBatch, pack
from prefarena.modeling.parts import whole
from prefarena.modeling.support import body_output
from prefarena.training.sharding import shard

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CPU = torch.device("cpu")
LONG = {"max_position_embeddings": 1024}
#: Bytes of shared memory that a block of threads may ask for (CUDA's programming guide).
CARDS = {"A100": 166912, "A10G": 101376, "L40S": 101376, "H100": 232448}
Counter = Any  # torch's is not typed


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Counter]]:
    """Has layers compile on the CPU, by a backend of torch's. Gives what counts the graphs."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "_on_gpu", lambda _: True)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # it refuses a backward pass on CPUs
    counter: list[Counter] = []

    def compile_by(backend: str) -> Counter:
        counter.append(CompileCounterWithBackend(backend))
        made: dict[Any, Any] = {}

        def of(function: Any) -> Any:
            return made.setdefault(function, torch.compile(function, backend=counter[-1], dynamic=True, fullgraph=True))

        monkeypatch.setattr(compiled_layers, "_compiled", of)
        return counter[-1]

    yield compile_by
    torch._dynamo.reset()


def batch(size: int, *, packed: bool) -> PackedBatch:
    """Two prompts, of `size` tokens and one, with three responses; a packed row is laid out for FlexAttention."""
    ids = iter(torch.randint(3, 14, (4 * size + 9,), generator=torch.Generator().manual_seed(size)).tolist())

    def some(count: int) -> list[int]:
        return [next(ids) for _ in range(count)]

    return pack([some(size), some(1)], [[some(size), some(3)], [some(4)]], shared=packed, in_blocks=True)


class Body(nn.Module):
    """A model without its head, as a module that can be sharded."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: PackedBatch) -> Tensor:
        return body_output(self.model, rows)


def results(model: PreTrainedModel | nn.Module, rows: PackedBatch) -> list[Tensor]:
    """What the body gives for the rows, and all gradients of a sum over it."""
    model.zero_grad()
    body = Body(model) if isinstance(model, PreTrainedModel) else model
    out = body(rows)[rows.sources].float()
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * factors).sum().backward()
    gradients = [whole(weight.grad).clone() for weight in model.parameters() if weight.grad is not None]
    return [out.detach(), *gradients]


def largest_gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest value of each tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)) for one, other in pairs)


def ready(family: str, *, packed: bool, **changed: Any) -> PreTrainedModel:
    model = random_model(family, **changed)
    if packed:
        model.set_attn_implementation(tree_attention.NAME)
    return model


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "phi3"])
def test_compiled_layers_compute_what_they_do_one_operation_at_a_time(
    family: str, packed: bool, compiled: Callable[[str], Counter]
) -> None:
    model = ready(family, packed=packed, **LONG)
    expected = results(model, rows := batch(70, packed=packed))
    counter = compiled("aot_eager")
    compile_layers(model)
    compile_layers(model)  # once is enough
    assert largest_gap(results(model, rows), expected) == 0.0
    assert counter.frame_count >= 1


def test_inductor_computes_the_same_within_rounding(compiled: Callable[[str], Counter]) -> None:
    model = ready("llama-tied", packed=False, **LONG)
    expected = results(model, rows := batch(70, packed=False))
    compiled("inductor")
    compile_layers(model)
    assert 0.0 < largest_gap(results(model, rows), expected) < 1e-5


def test_rows_of_every_length_with_gradients_and_without_share_three_graphs(
    compiled: Callable[[str], Counter],
) -> None:
    """One of rows that are one block, one of longer ones, one of padded rows."""
    model = ready("llama", packed=True, num_hidden_layers=3, **LONG)
    compiled("aot_eager")
    compile_layers(model)
    for size, packed in ((5, True), (70, True), (5, False)):
        results(model, batch(size, packed=packed))
    with torch.compiler.set_stance("fail_on_recompile"):
        for packed in (True, False):
            for size in (9, 40, 100, 130, 171, 60, 222):
                results(model, rows := batch(size, packed=packed))
                with torch.no_grad():
                    body_output(model, rows)


def test_scores_without_gradients_have_the_bits_of_training(compiled: Callable[[str], Counter]) -> None:
    """A policy that trains in halves of its weights, and a reference whose weights are halved."""
    policy, reference = (ready("llama", packed=False, **LONG) for _ in range(2))
    in_weights(reference, "bfloat16")
    module = Body(policy)
    compute_in_halves(module)
    compiled("inductor")
    for model in (policy, reference):
        compile_layers(model)
    rows = batch(70, packed=False)
    learnt = module(rows)
    with torch.no_grad():
        scored = (module(rows), body_output(reference, rows))
    assert learnt.requires_grad and all(torch.equal(learnt, one) and not one.requires_grad for one in scored)


@pytest.mark.parametrize("recomputed", [True, False], ids=["recomputed", "kept"])
def test_halved_layers_are_compiled(recomputed: bool, compiled: Callable[[str], Counter]) -> None:
    module = Body(ready("llama", packed=True, **LONG))
    compute_in_halves(module)
    expected = results(module, batch(70, packed=True))
    compiled("aot_eager")
    if recomputed:
        recompute_layers(module)
    compile_layers(module)
    assert largest_gap(results(module, batch(70, packed=True)), expected) == 0.0
    with torch.compiler.set_stance("fail_on_recompile"):
        results(module, batch(90, packed=True))
        with torch.no_grad():
            module(batch(90, packed=True))


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("recomputed", [True, False], ids=["recomputed", "kept"])
def test_adapters_and_recomputation_go_with_compiled_layers(
    adapted: bool, recomputed: bool, compiled: Callable[[str], Counter]
) -> None:
    model = ready("llama", packed=True, **LONG)
    if adapted:
        add_adapters(model, LoRA(rank=2), seed=0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)  # they add something
    expected = results(model, rows := batch(70, packed=True))
    compiled("aot_eager")
    compile_layers(model)
    if recomputed:
        recompute_layers(model)
        compile_layers(model)  # as a second module around the model does
    assert largest_gap(results(model, rows), expected) == 0.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sharded_layers_are_compiled(precision: Any, tmp_path: Path, compiled: Callable[[str], Counter]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain, model = (shard(Body(ready("llama", packed=True, **LONG)), 1, CPU, precision) for _ in range(2))
        counter = compiled("aot_eager")
        compile_layers(model)
        rows = batch(70, packed=True)
        assert largest_gap(results(model, rows), results(plain, rows)) == 0.0
        assert counter.frame_count >= 1
        nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
        calls = [node for node in nodes if node.target is flex.flex_attention_hop]
        sizes = [one.meta["example_value"].shape[-1] for call in calls for one in call.args[:3]]
        # FlexAttention's kernel cannot be built for heads of unknown size.
        assert len(sizes) >= 3 and {type(size) for size in sizes} == {int}
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_of_a_model_runs_its_own_layers(compiled: Callable[[str], Counter]) -> None:
    model = ready("llama", packed=True, **LONG)
    compiled("aot_eager")
    compile_layers(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in decoder_layers(twin)[0].parameters():
            weight.mul_(2)
    rows = batch(20, packed=True)
    before = results(model, rows)
    assert largest_gap(results(twin, rows), before) > 1e-3
    assert largest_gap(results(model, rows), before) == 0.0


def test_a_model_is_freed_although_its_layers_were_compiled(compiled: Callable[[str], Counter]) -> None:
    model = ready("llama", packed=True, **LONG)
    compiled("aot_eager")
    compile_layers(model)
    results(model, batch(20, packed=True))
    weights = [weakref.ref(weight) for weight in model.parameters()]
    del model
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_layers_are_tried_in_the_numbers_that_they_will_compute_in(
    packed: bool, compiled: Callable[[str], Counter]
) -> None:
    model = ready("gemma3", packed=packed, layer_types=["sliding_attention", "full_attention"], **LONG)
    counter = compiled("aot_eager")
    assert why_not_compiled(model, CPU, torch.bfloat16, packed) is None
    assert counter.frame_count >= 2  # one for each kind of layer
    assert model.dtype == torch.float32 and all(weight.grad is None for weight in model.parameters())


def test_layers_that_cannot_be_compiled_are_told_and_lack_of_memory_is_not(
    compiled: Callable[[str], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready("llama", packed=True, **LONG)
    layer = decoder_layers(model)[0]

    def asks_a_number(self: Any, hidden_states: Tensor, **others: Any) -> Tensor:
        return hidden_states * 2 if hidden_states.sum().item() > 0 else hidden_states

    monkeypatch.setattr(type(layer), "forward", asks_a_number)
    compiled("aot_eager")
    reason = why_not_compiled(model, CPU, torch.float32, True)
    assert reason is not None and "\n" not in reason

    def exhausted(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled_layers, "_compiled", lambda _: exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        why_not_compiled(model, CPU, torch.float32, True)


def test_compiled_layers_fit_every_card_and_move_a_third_of_the_bytes() -> None:
    """The table of benchmarks/layer_kernels.py, which compiles them."""
    rows = json.loads((RESULTS / "layer_kernels.json").read_text(encoding="utf-8"))
    assert [(row["card"], row["shape"]) for row in rows] == [
        (card, shape) for card in CARDS for shape in ("llama-1b", "llama-7b")
    ]
    for row in rows:
        number, size = (sum(row[name][what] for name in ("forward", "backward")) for what in ("kernels", "bytes"))
        assert number < row["uncompiled"]["kernels"] / 5 and size < row["uncompiled"]["bytes"] / 3
        assert row["forward"]["attention"] == row["backward"]["attention"] == 1  # in the layer's own graph
        assert row["most"]["shared_memory"] <= CARDS[row["card"]] and row["most"]["spilled"] < 1000
