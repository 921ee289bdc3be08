"""What one preference step must cost on a GPU, part by part, from counted FLOPs and bytes.

    python benchmarks/roofline.py [--card H100] [--pairs 16] [--out benchmarks/results/roofline.json]

The step's own code runs on shapes without numbers (torch's fake tensors): every operation is counted with its FLOPs and
the bytes that it reads and writes, and takes the longer of both at the card's peaks (vendor's data sheets). So nothing
here is measured: launches, imperfect kernels and waiting come on top, and a compiler that fuses operations saves bytes.
Attention is counted from the lengths, as FlexAttention runs it. Lengths are HH-RLHF's, and all pairs share one forward
pass. Four ways: under autocast with the head in float32, as norms leave it there; under autocast with the head in
bfloat16; in bfloat16 copies of the weights; and that with compiled layers, whose kernels are counted by
layer_kernels.py.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_pairs import TokenPairs, hh_lengths, random_pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from prefarena.modeling import chunked_head, logprobs
from prefarena.modeling.arithmetic import in_weights
from prefarena.modeling.logprobs import LogProbs, sequence_logps

MAX_TOKENS = 8192
_LEFT_OUT = "left out"
#: Operations that give a tensor without reading or writing one; those that give none ask about one.
_MOVE_NOTHING = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
WAYS = ("head in float32", "autocast", "bfloat16 weights", "compiled layers")
_LAYERS = Path(__file__).with_name("results") / "layer_kernels.json"


@dataclass(frozen=True)
class Card:
    """Dense peaks in FLOP/s, and bytes per second of its memory, by the vendor's data sheet."""

    half: float
    single: float
    memory: float


CARDS = {
    "H100": Card(989e12, 67e12, 3.35e12),
    "A100": Card(312e12, 19.5e12, 2.04e12),
    "L40S": Card(362e12, 91.6e12, 0.864e12),
}
SHAPES = {
    "llama-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                 "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 1000, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass
class Part:
    """flops: of matrix products; bytes: read and written; seconds: the longer of both for each operation."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    num_operations: int = 0

    def plus(self, other: Part, times: int = 1) -> Part:
        return Part(*(own + times * its for own, its in zip(vars(self).values(), vars(other).values(), strict=True)))


class Counted(TorchDispatchMode):
    """Counts operations by part: products, the head, copies between kinds of numbers, and all else (elementwise)."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.parts: dict[str, Part] = defaultdict(Part)
        self.inside: str | None = None  # the part that all operations belong to, where one is at work
        self._card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        moves_nothing = func.is_view or packet.__name__ in _MOVE_NOTHING or not isinstance(out, Tensor | tuple | list)
        if moves_nothing or self.inside == _LEFT_OUT:
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if packet.__name__ == "addmm_":  # the registry knows it by its product alone
            packet, args = torch.ops.aten.mm, args[1:]
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
        name = "products" if flops else "copies" if packet.__name__ in ("_to_copy", "copy_") else "elementwise"
        self.add(self.inside or name, flops, moved, tensors[0].element_size() < 4 if tensors else False)
        return out

    def add(self, name: str, flops: float, moved: float, half: bool) -> None:
        part, peak = self.parts[name], self._card.half if half else self._card.single
        part.flops, part.bytes = part.flops + flops, part.bytes + moved
        part.seconds += max(flops / peak, moved / self._card.memory)
        part.num_operations += 1

    @contextmanager
    def counting_as(self, name: str) -> Iterator[None]:
        before, self.inside = self.inside, name
        yield
        self.inside = before


def model_of(shape: str, num_layers: int | None = None) -> LlamaForCausalLM:
    """With shapes in place of weights; of so many layers, where that is given."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": num_layers} if num_layers else {})
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=MAX_TOKENS))  # type: ignore[arg-type]


def pairs_of(shape: str, number: int) -> TokenPairs:
    return random_pairs(hh_lengths(number, seed=0), SHAPES[shape]["vocab_size"], seed=1)


def step(shape: str, card: Card, pairs: TokenPairs, how: str) -> dict[str, Part]:
    """The parts of one step: forward and backward passes of all pairs, and AdamW. how: one of WAYS."""
    counted = Counted(card)
    passes = _with_compiled_layers if how == "compiled layers" else partial(_passes, how=how)
    counted.parts |= passes(shape, card, pairs)
    model = model_of(shape)
    _add_attention(counted, model.config, pairs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if how in ("bfloat16 weights", "compiled layers"):
        # The copies, 4 bytes read and 2 written, and the gradients, 2 read and 4 written.
        counted.add("copies", 0, 12 * parameters, half=True)
    # Read: weight, gradient, two moments; written: weight, two moments; 4 bytes each.
    counted.add("optimizer", 0, 28 * parameters, half=False)
    return dict(counted.parts)


def layer_parts(shape: str, pairs: TokenPairs, card: Card = CARDS["H100"]) -> dict[str, Part]:
    """What one more layer with bfloat16 weights adds to the passes, uncompiled and without its attention."""
    one, two = (_passes(shape, card, pairs, "bfloat16 weights", number) for number in (1, 2))
    return {name: part.plus(one[name], -1) for name, part in two.items()}


def _with_compiled_layers(shape: str, card: Card, pairs: TokenPairs) -> dict[str, Part]:
    """The passes, each layer's own operations replaced by the kernels that layer_kernels.py has counted."""
    (name,) = (name for name, own in CARDS.items() if own == card)
    rows = json.loads(_LAYERS.read_text(encoding="utf-8"))
    (row,) = (row for row in rows if (row["card"], row["shape"]) == (name, shape))
    assert row["tokens"] == sum(len(ids) for pair in pairs for ids in pair), "layer_kernels.py has other pairs"
    layer, number = layer_parts(shape, pairs, card), model_of(shape).config.num_hidden_layers
    one = _passes(shape, card, pairs, "bfloat16 weights", 1)
    parts = {name: part.plus(layer[name], -1) for name, part in one.items()}
    moved, kernels = (sum(row[side][what] for side in ("forward", "backward")) for what in ("bytes", "kernels"))
    parts["products"] = parts["products"].plus(layer["products"], number)
    parts["elementwise"] = parts["elementwise"].plus(Part(0.0, moved, moved / card.memory, kernels), number)
    return parts


def _passes(shape: str, card: Card, pairs: TokenPairs, how: str, num_layers: int | None = None) -> dict[str, Part]:
    """Forward and backward, without attention."""
    counted = Counted(card)
    empty = model_of(shape, num_layers)
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_a_gpu(counted, how != "head in float32"):
        model = in_weights(empty.to_empty(device="cpu"), "bfloat16" if how == "bfloat16 weights" else "float32")
        model.tie_weights()  # new tensors are each their own
        module = LogProbs.__new__(LogProbs)
        torch.nn.Module.__init__(module)
        module.model, module.packed, module.plain_head = model, True, True
        model.set_attn_implementation(_LEFT_OUT)
        prompts = [prompt for prompt, *_ in pairs]
        with counted:
            with torch.autocast("cpu", torch.bfloat16, enabled=how != "bfloat16 weights"):
                logps, _ = sequence_logps(module, prompts, [[chosen, rejected] for _, chosen, rejected in pairs])
                loss = -F.logsigmoid(logps[0::2] - logps[1::2]).mean()
            loss.backward()
    return counted.parts


class _NoAttention(torch.autograd.Function):
    """Shapes of attention, forward and backward, without an operation: it is counted from the lengths."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context.save_for_backward(query, key, value)
        return query.new_empty(query.transpose(1, 2).shape)

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors)


@contextmanager
def _as_on_a_gpu(counted: Counted, halved_head: bool) -> Iterator[None]:
    """The head in a GPU's tiles and kinds of numbers, told apart from the rest; attention left out."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        with counted.counting_as(_LEFT_OUT):
            return _NoAttention.apply(query, key, value), None

    def under_head(function: Any) -> Any:
        def run(*args: Any) -> Any:
            with counted.counting_as("head"), torch.autocast("cpu", enabled=False):
                return function(*args)

        return staticmethod(run)

    AttentionInterface.register(_LEFT_OUT, attention)
    AttentionMaskInterface.register(_LEFT_OUT, sdpa_mask)
    there: Any = chunked_head
    caller: Any = logprobs
    head, on_gpu, whole_head = there._ChunkedHead, there._on_gpu, caller.chunked_logps
    forward, backward = head.forward, head.backward
    head.forward, head.backward = under_head(forward), under_head(backward)
    there._on_gpu = lambda _: True
    if halved_head:
        caller.chunked_logps = lambda hidden, *args, **named: whole_head(hidden.bfloat16(), *args, **named)
    try:
        yield
    finally:
        head.forward, head.backward = staticmethod(forward), staticmethod(backward)
        there._on_gpu, caller.chunked_logps = on_gpu, whole_head


def _add_attention(counted: Counted, config: LlamaConfig, pairs: TokenPairs) -> None:
    """FlexAttention: 4 FLOPs a channel and visible pair forward, 10 backward; queries, keys and values pass once each
    way forward, and with their gradients backward."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width, narrow = config.hidden_size, config.hidden_size // heads * (config.num_key_value_heads or heads)
    visible = sum(
        own * before + own * own / 2
        for prompt, *answers in pairs
        for own, before in ((len(prompt), 0), *((len(ids), len(prompt)) for ids in answers))
    )
    tokens = sum(len(ids) for pair in pairs for ids in pair)
    forward, backward = 2 * tokens * (2 * width + 2 * narrow), 2 * tokens * (5 * width + 4 * narrow)
    for flops, moved in ((4, forward), (10, backward)):
        counted.add("attention", flops * width * visible * layers, moved * layers, half=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=sorted(CARDS), default="H100")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-1b", "llama-7b"])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    card, rows = CARDS[options.card], []
    for shape in options.shapes:
        pairs = pairs_of(shape, options.pairs)
        for how in WAYS:
            parts = step(shape, card, pairs, how)
            total = sum(part.seconds for part in parts.values())
            flops = sum(part.flops for part in parts.values())
            rows.append(
                {
                    "shape": shape, "how": how, "milliseconds": total * 1e3, "mfu": flops / total / card.half,
                    "parts": {name: vars(part) for name, part in sorted(parts.items())},
                }
            )  # fmt: skip
            shares = ", ".join(f"{name} {part.seconds * 1e3:.1f}" for name, part in sorted(parts.items()))
            print(f"{shape}, {how}: {total * 1e3:.1f} ms, MFU {rows[-1]['mfu']:.2f} at most ({shares})", flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"card": options.card, "pairs": options.pairs, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
