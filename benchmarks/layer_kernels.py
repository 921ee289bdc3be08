"""What a compiled decoder layer is on each card: its kernels and the bytes that they move, beside it uncompiled.

    python benchmarks/layer_kernels.py [--out benchmarks/results/layer_kernels.json]
    python benchmarks/layer_kernels.py --cards H100 --shapes llama-1b

A layer with bfloat16 weights is compiled as `prefarena/modeling/compiled_layers.py` has it, forward and backward, for
a packed row of 16 pairs: by Inductor, Triton and CUDA's assembler, without any GPU, in the environment of
attention_kernels.py. Products of matrices stay cuBLAS's. Compiled is not run: bytes and kernels are counted, time is
not known from this. roofline.py reads the result.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absent_gpu import CARDS, Card, assembled, capturing, each_apart, kernels, lowered, pretend

SHAPES = ("llama-1b", "llama-7b")
PAIRS = 16


def compiled(card: Card, shape: str) -> dict[str, Any]:
    """A layer of this shape on this card: of each pass what it runs and moves, and what its kernels ask of the card."""
    from roofline import layer_parts, pairs_of

    pairs = pairs_of(shape, PAIRS)
    alone = layer_parts(shape, pairs)
    moved = [alone["elementwise"], alone["copies"]]
    graphs = _captured(card, shape, pairs)  # on the CPU, before pretending
    pretend(card)
    found: dict[str, Any] = {
        "tokens": sum(len(ids) for pair in pairs for ids in pair),
        "uncompiled": {"kernels": sum(part.num_operations for part in moved), "bytes": sum(p.bytes for p in moved)},
    }
    asked: list[dict[str, Any]] = []
    for name, graph, inputs in graphs:
        source, nodes = lowered(graph, inputs, backward=name == "backward")
        fused = [size for node, size in nodes if size and not (node.is_extern() or node.is_template())]
        found[name] = {
            "kernels": len(fused),
            "bytes": sum(fused),
            "products": sum(node.is_extern() for node, _ in nodes),
            "attention": sum(node.is_template() for node, _ in nodes),
        }
        for kernel in kernels(source):
            asked += [asdict(assembled(kernel._precompile_config(own).kernel, card)) for own in kernel.configs]
    most = {name: max(one[name] for one in asked) for name in ("shared_memory", "registers", "spilled")}
    return found | {"assembled": len(asked), "most": most}


def _captured(card: Card, shape: str, pairs: Any) -> list[tuple[str, Any, list[Any]]]:
    """The graphs of both passes of a layer whose tensors have no numbers."""
    import numpy as np
    import torch
    import torch.nn.attention.flex_attention as flex
    from roofline import model_of
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from prefarena.modeling import compiled_layers, flex_trees
    from prefarena.modeling.layers import decoder_layers
    from prefarena.modeling.tree_attention import NAME, Trees

    backend, graphs = capturing()
    there: Any = compiled_layers
    trees: Any = flex_trees
    there._on_gpu = trees._on_gpu = lambda _: True
    there.compiled_whole = lambda function: torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
    trees._card = torch.compiler.assume_constant_result(lambda _: (card.capability, card.shared_memory))
    flex._validate_device = lambda *_: None  # it refuses a backward pass on the CPU
    model = model_of(shape, num_layers=1)
    model.set_attn_implementation(NAME)
    lengths = [[len(ids) for ids in pair] for pair in pairs]
    size = -(-sum(map(sum, lengths)) // flex_trees.BLOCK) * flex_trees.BLOCK
    none = np.zeros(size, np.int64)
    config, half = model.config, torch.bfloat16
    with FakeTensorMode():
        (layer,) = decoder_layers(model)
        for part in layer.modules():
            for name, weight in [*part.named_parameters(recurse=False)]:
                setattr(part, name, nn.Parameter(torch.empty(weight.shape, dtype=half)))
        masks = [torch.empty(one.shape, dtype=torch.int32) for one in flex_trees.mask_arrays(none, none, lengths)]
        compiled_layers.compile_layers(model)
        out = layer(
            torch.empty(1, size, config.hidden_size, dtype=half, requires_grad=True),
            attention_mask=torch.empty(1, 1, 1, 1, dtype=torch.bool),
            position_ids=torch.empty(1, size, dtype=torch.long),
            position_embeddings=tuple(torch.empty(1, size, config.head_dim, dtype=half) for _ in range(2)),
            use_cache=False,
            trees=Trees((), flex_trees.mask_of(masks)),
        )
        out.sum().backward()
    return graphs


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| card | layer of | kernels uncompiled | compiled | MB uncompiled | compiled | most shared memory, B | of the "
        "card's, B | most spilled, B |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        passes = row["forward"], row["backward"]
        limit, most = CARDS[row["card"]].shared_memory, row["most"]
        fits = "" if most["shared_memory"] <= limit else " **too much**"
        number, size = (sum(one[name] for one in passes) for name in ("kernels", "bytes"))
        lines.append(
            f"| {row['card']} | {row['shape']} | {row['uncompiled']['kernels']} | {number} | "
            f"{row['uncompiled']['bytes'] / 1e6:,.0f} | {size / 1e6:,.0f} | {most['shared_memory']:,}{fits} | "
            f"{limit:,} | {most['spilled']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # card, shape: in the environment of its own
    options = parser.parse_args()
    if options.one:
        card, shape = options.one
        print(json.dumps(compiled(CARDS[card], shape)))
        return
    combinations = [{"card": card, "shape": shape} for card in options.cards for shape in options.shapes]
    each_apart(__file__, combinations, table, options.out)


if __name__ == "__main__":
    main()
