"""Does the attention kernel fit each card? Compiled by Inductor, Triton and CUDA's assembler, without any GPU.

    python benchmarks/attention_kernels.py [--out benchmarks/results/attention_kernels.json]
    python benchmarks/attention_kernels.py --cards H100 --dims 64 --kinds bfloat16

For each card, kind of numbers and head size: FlexAttention with the tree mask and the options of
`prefarena/modeling/flex_trees.py`, forward and backward, and what one block of threads asks of the card. It makes an
environment of its own (`requirements/attention-kernels.txt`). Compiled is not run: speed is not known from this.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absent_gpu import CARDS, Card, assembled, capturing, each_apart, kernels, lowered, pretend

HEADS, KEY_VALUE_HEADS, TOKENS = 32, 8, 1024
DIMS, KINDS = (64, 128, 256), ("bfloat16", "float32", "tf32")


def compiled(card: Card, head_dim: int, kind: str) -> dict[str, Any]:
    """The options of one combination, and each of its kernels by its pass."""
    import torch
    import torch.nn.attention.flex_attention as flex

    from prefarena.modeling import flex_trees

    # As `modeling.arithmetic` has it, whose other imports this environment lacks.
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    numbers = torch.bfloat16 if kind == "bfloat16" else torch.float32
    graphs = _captured(flex, flex_trees, card, head_dim, numbers)  # on the CPU, before pretending
    pretend(card)
    found: dict[str, Any] = {}
    for name, graph, inputs in graphs:
        source = lowered(graph, inputs, backward=name == "backward")[0]
        for kernel in kernels(source, "triton_tem"):
            binaries = [kernel._precompile_config(config).kernel for config in kernel.configs]
            found[name] = max((asdict(assembled(one, card)) for one in binaries), key=lambda own: own["shared_memory"])
    options = flex_trees.options_for(numbers, head_dim, card.capability, card.shared_memory)
    return {"options": options, "kernels": found}


def _captured(flex: Any, flex_trees: Any, card: Card, head_dim: int, kind: Any) -> list[tuple[str, Any, list[Any]]]:
    """The graphs of both passes."""
    import numpy as np
    import torch

    backend, graphs = capturing()
    lengths = [[100, 120, 80], [200, 260, 40], [60, 100, 64]]
    sizes = [size for own in lengths for size in own]
    tree = np.repeat([index for index, own in enumerate(lengths) for _ in own], sizes)
    branch = np.repeat([place for own in lengths for place in range(len(own))], sizes)
    arrays = flex_trees.mask_arrays(tree, branch, lengths)
    blocks = flex_trees.mask_of([torch.from_numpy(array) for array in arrays])
    query, key, value = (
        torch.randn(1, count, TOKENS, head_dim, dtype=kind, requires_grad=True)
        for count in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    )
    flex._validate_device = lambda *_: None  # it refuses a backward pass on the CPU
    options = flex_trees.options_for(kind, head_dim, card.capability, card.shared_memory)
    call = torch.compile(flex.flex_attention, dynamic=True, backend=backend)
    out = call(query, key, value, block_mask=blocks, scale=head_dim**-0.5, enable_gqa=True, kernel_options=options)
    out.float().sum().backward()
    return graphs


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| card | numbers | head size | pass | shared memory, B | of the card's, B | registers | spilled, B |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for name, kernel in row["kernels"].items():
            limit = CARDS[row["card"]].shared_memory
            fits = "" if kernel["shared_memory"] <= limit else " **too much**"
            lines.append(
                f"| {row['card']} | {row['kind']} | {row['head_dim']} | {name} | {kernel['shared_memory']:,}{fits} | "
                f"{limit:,} | {kernel['registers']} | {kernel['spilled']:,} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--one", nargs=3, help=argparse.SUPPRESS
    )  # card, kind, head size: in the environment of its own
    options = parser.parse_args()
    if options.one:
        card, kind, head_dim = options.one
        print(json.dumps(compiled(CARDS[card], int(head_dim), kind)))
        return
    combinations = [
        {"card": card, "kind": kind, "head_dim": head_dim}
        for card in options.cards
        for kind in options.kinds
        for head_dim in options.dims
    ]
    each_apart(__file__, combinations, table, options.out)


if __name__ == "__main__":
    main()
