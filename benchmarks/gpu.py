"""A preference step on one GPU: ours against TRL's DPOTrainer, where it is installed, and plain PyTorch.

    python benchmarks/gpu.py [--model llama-1b] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --tiny          a tiny model on the CPU, to try it

Needs torch >= 2.11 and transformers (with NumPy and tokenizers, which they bring), nothing else of Prefarena's. Weights
are random and so are tokens; lengths are HH-RLHF's. Master weights in float32, computation in bfloat16 on every side:
ours in copies of the weights, the others under autocast. First all sides must agree in float32: losses and gradient
norms of a few steps. Then each side, alone in a fresh process, runs one block that is not counted and `--repeats` more;
a block is one pass over the same pairs. The result is written after each of them. A side whose memory runs out is a
result, and the others go on.

Each side cuts its batch into passes of a size of its own. The defaults are for 80 GB at llama-1b, by what a pass was
counted to hold with shapes in place of numbers (`prefarena.modeling.memory`), at the longest shuffled batch, 753 tokens
a sequence: weights, gradients, Adam's moments and reference take 23 GiB, and plain PyTorch, which keeps logits of every
position, 5.3 GiB per pair beside them: 109 GiB for 16 pairs at once, 67 for 8, 46 for 4, which is the default, since
allocators waste some. TRL takes about 3.1 GiB per pair (73 for 16 were counted): 48 GiB for 8, its own default.

FLOPs are those that a step needs: of policy and, online, reference; no padding, no recomputation, the head at response
positions alone. `mfu` counts the prompt once where a side shares it, `mfu_unshared` twice on every side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_pairs import MAX_PROMPT, MAX_RESPONSE, TokenPairs, hh_lengths, random_pairs, word_tokenizer
from sides import HERE, Side, SideEndedError, machine, versions, write_result
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

#: Dense bfloat16 TFLOP/s by the vendor's data sheets, by what is in a device's name; the first that is counts. Cards of
#: one name differ by their form: an H100 without another word is the SXM one ("NVIDIA H100 80GB HBM3").
PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `tied`: the head is the embedding."""

    family: str
    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    def new(self, seed: int) -> PreTrainedModel:
        keywords: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": MAX_PROMPT + MAX_RESPONSE,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": self.tied,
        }
        torch.manual_seed(seed)
        if self.family == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**keywords)).float()
        return LlamaForCausalLM(LlamaConfig(**keywords)).float()


SHAPES = {
    "llama-1b": Shape("llama", 2048, 16, 32, 8, 8192, 128256, True),
    "qwen2-1.5b": Shape("qwen2", 1536, 28, 12, 2, 8960, 151936, True),
    "tiny": Shape("llama", 128, 2, 4, 2, 352, 1024, False),
}


@dataclass(frozen=True)
class Contender:
    script: str
    online: bool
    switches: dict[str, Any] = field(default_factory=dict)

    @property
    def shares_prompts(self) -> bool:
        return self.script == "step_packed.py"


@dataclass(frozen=True)
class Passes:
    """What goes through a model at once. tokens: of ours, at most; plain, trl: pairs of plain PyTorch and TRL."""

    tokens: int = 8192
    plain: int = 4
    trl: int = 8


def contenders(batch_size: int, passes: Passes) -> dict[str, Contender]:
    """All sides, by name; TRL's only where it is installed."""
    tokens, plain = passes.tokens, min(passes.plain, batch_size)
    found = {
        "ours": Contender("step_packed.py", False, {"order": "bucketed", "micro_batch_tokens": tokens}),
        "ours, shuffled": Contender("step_packed.py", False, {"order": "shuffled", "micro_batch_tokens": tokens}),
        "plain PyTorch": Contender("step_plain.py", True, {"order": "shuffled", "micro_batch": plain}),
    }
    if importlib.util.find_spec("trl") is None:
        return found
    size = min(passes.trl, batch_size)
    trl = {"micro_batch": size, "fused": True, "attention": "sdpa", "order": "shuffled", "precompute": False}
    recomputed = trl | {"checkpointing": True, "micro_batch": batch_size}  # a layer's input is all that it keeps
    return found | {
        "TRL online": Contender("trl_dpo.py", True, trl),
        "TRL precomputed": Contender("trl_dpo.py", False, trl | {"precompute": True}),
        "TRL precomputed, bucketed": Contender("trl_dpo.py", False, trl | {"precompute": True, "order": "bucketed"}),
        "TRL online, checkpointing": Contender("trl_dpo.py", True, recomputed),
    }


def write_spec(shape: Shape, device: str, num_steps: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """The model's folder, and what every side is told."""
    shape.new(seed=0).save_pretrained(str(folder / "policy"))
    word_tokenizer(shape.vocabulary).save_pretrained(str(folder / "policy"))
    pairs = random_pairs(hh_lengths(num_steps * batch_size, seed=0), shape.vocabulary, seed=1)
    sizes = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs]
    batches = np.argsort(sizes, kind="stable").reshape(num_steps, batch_size)
    return {
        "policy": str(folder / "policy"), "device": device, "pairs": pairs,
        "orders": {
            "shuffled": list(range(len(pairs))),
            "bucketed": np.random.default_rng(2).permutation(batches).reshape(-1).tolist(),
        },
        "batch_size": batch_size, "num_steps": num_steps, "max_length": MAX_PROMPT + MAX_RESPONSE, "pad": 0,
        "learning_rate": 1e-5, "betas": (0.9, 0.999), "epsilon": 1e-8, "max_grad_norm": 1.0, "beta": 0.1,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def run(contender: Contender, spec: dict[str, Any], folder: Path, num_blocks: int, **changed: Any) -> Any:
    """The blocks of one side in a process of its own, which writes in `folder`. Raises SideEndedError."""
    folder.mkdir(exist_ok=True)
    path = folder / "spec.json"
    path.write_text(json.dumps(spec | {"output": str(folder / "output")}), encoding="utf-8")
    switches = {"num_steps": spec["num_steps"], "log": False} | contender.switches | changed
    side = Side([sys.executable, str(HERE / contender.script), str(path), json.dumps(switches)], folder / "log", 1)
    try:
        return [side.block() for _ in range(num_blocks)]
    finally:
        side.end()


def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns; of a side that ended early why, as `out_of_memory` or `error`."""
    try:
        return work()
    except SideEndedError as error:
        return {"out_of_memory" if error.out_of_memory else "error": error.reason}


def parity(sides: dict[str, Contender], spec: dict[str, Any], folder: Path, num_steps: int) -> dict[str, Any]:
    """Largest relative differences from the plain side over the first steps, in float32.

    Of a side that ended early why it did; where that is the plain one, the first that did not takes its place.
    """
    exact = spec | {"bf16": False}

    def trace(name: str) -> dict[str, Any]:
        own = folder / f"parity-{list(sides).index(name)}"
        switches = {"num_steps": num_steps, "order": "bucketed", "log": True}
        return tried(lambda: run(sides[name], exact, own, 1, **switches)[0])

    # On a GPU one has its memory; on a CPU each has a core, and no times are taken.
    with ThreadPoolExecutor(1 if spec["device"] == "cuda" else len(os.sched_getaffinity(0))) as pool:
        traces = dict(zip(sides, pool.map(trace, sides), strict=True))
    ran = {name: found for name, found in traces.items() if "losses" in found}
    ended = {name: found for name, found in traces.items() if name not in ran}
    if not ran:
        return {"steps": num_steps, "relative": {}, "ended": ended, "same": False}
    base = ran.get("plain PyTorch") or next(iter(ran.values()))

    def largest(trace: dict[str, Any], key: str) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(trace[key], base[key], strict=True))

    found = {name: {key: largest(trace, key) for key in ("losses", "norms")} for name, trace in ran.items()}
    starts = max(abs(trace["losses"][0] - math.log(2)) for trace in ran.values())
    worst = max(starts, *(value for of_side in found.values() for value in of_side.values()))
    same = worst <= TOLERANCE
    return {"steps": num_steps, "first_loss_from_log_2": starts, "relative": found, "ended": ended, "same": same}


def needed_flops(shape: Shape, pairs: TokenPairs, *, shared: bool, online: bool) -> float:
    """Of forward and backward passes over all pairs: 6 a weight and token, 6 a layer, channel and attended token."""
    head_size = shape.width // shape.heads
    attention = shape.width * (2 * shape.width + 2 * head_size * shape.key_value_heads)
    body = shape.layers * (attention + 3 * shape.width * shape.intermediate)
    total = 0.0
    for prompt, *responses in pairs:
        begin = len(prompt)
        passes = [(begin, 0), *((len(ids), begin) for ids in responses)]
        times = (1 if shared else 2, 1, 1)
        for (own, before), count in zip(passes, times, strict=True):
            attended = own * before + own * own / 2
            total += count * (6 * body * own + 12 * shape.layers * shape.width * attended)
        total += sum(6 * shape.width * shape.vocabulary * len(ids) for ids in responses)
    return total * (4 / 3 if online else 1)


def peak_tflops(name: str) -> float | None:
    """Of the device of this name; None where it is not known, or is a part of a card (MIG)."""
    if "MIG" in name:
        return None
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def measured(
    contender: Contender, spec: dict[str, Any], shape: Shape, blocks: list[dict[str, Any]], peak: float | None
) -> dict[str, Any]:
    seconds, pairs = statistics.median(block["seconds"] for block in blocks), spec["pairs"]
    tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs)
    found = {
        "seconds_per_step": seconds / spec["num_steps"],
        "blocks": [block["seconds"] for block in blocks],
        "pairs_per_second": len(pairs) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mib": max(block["peak_mib"] for block in blocks),
    }
    if peak is None:
        return found
    counted = {"mfu": contender.shares_prompts, "mfu_unshared": False}
    flops = {
        name: needed_flops(shape, pairs, shared=shared, online=contender.online) for name, shared in counted.items()
    }
    return found | {name: value / seconds / (peak * 1e12) for name, value in flops.items()}


def compare(
    sides: dict[str, Contender],
    spec: dict[str, Any],
    shape: Shape,
    folder: Path,
    repeats: int,
    result: dict[str, Any],
    save: Callable[[], None],
) -> bool:
    """Parity, then the time of each side, into `result`, which is saved after each. Whether nothing went wrong.

    That memory runs out is nothing wrong.
    """  # fmt: skip
    result["parity"] = parity(sides, spec, folder, min(3, spec["num_steps"]))
    save()
    print(json.dumps(result, indent=2), flush=True)
    if not result["parity"]["same"]:
        print(
            f"the sides differ by more than {TOLERANCE:g}, or do not start at log 2: nothing is timed", file=sys.stderr
        )
        return False
    result["sides"] = {}
    halved = spec | {"bf16": True}
    for place, (title, side) in enumerate(sides.items()):

        def work(side: Contender = side, place: int = place) -> dict[str, Any]:
            blocks = run(side, halved, folder / f"time-{place}", 1 + repeats)[1:]
            return measured(side, spec, shape, blocks, result["peak_tflops"])

        result["sides"][title] = tried(work)
        save()
        print(f"{title:28}{json.dumps(result['sides'][title])}", flush=True)
    return not any("error" in found for found in [*result["parity"]["ended"].values(), *result["sides"].values()])


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--tiny", action="store_true", help="the tiny model on the CPU")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step")
    parser.add_argument("--tokens", type=int, default=Passes.tokens, help="most tokens of our passes")
    parser.add_argument("--plain-micro-batch", type=int, default=Passes.plain, help="pairs of plain PyTorch's passes")
    parser.add_argument(
        "--trl-micro-batch", type=int, default=Passes.trl, help="pairs of TRL's passes, but with checkpointing"
    )
    parser.add_argument("--steps", type=int, default=16, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=3, help="blocks that are counted")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="only these, such as ours and 'plain PyTorch'")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, where it is not a known one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    arguments = parser.parse_args()
    for name in ("plain", "trl"):
        size = min(getattr(arguments, f"{name}_micro_batch"), arguments.batch_size)
        if size < 1 or arguments.batch_size % size:
            parser.error(f"--{name}-micro-batch {size} does not divide a batch of {arguments.batch_size} pairs")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; give --tiny to try this on the CPU")
    return arguments


def main() -> None:
    arguments = read_arguments()
    device = "cpu" if arguments.tiny else "cuda"
    name = "tiny" if arguments.tiny else arguments.model
    passes = Passes(arguments.tokens, arguments.plain_micro_batch, arguments.trl_micro_batch)
    shape, sides = SHAPES[name], contenders(arguments.batch_size, passes)
    if unknown := sorted(set(arguments.sides or ()) - sides.keys()):
        sys.exit(f"there is no side {', '.join(unknown)} here; there are {', '.join(sides)}")
    sides = {title: side for title, side in sides.items() if arguments.sides is None or title in arguments.sides}
    card = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    result: dict[str, Any] = {
        "machine": machine(),
        "device": card,
        "versions": versions("torch", "transformers", *(["trl"] if "TRL online" in sides else [])),
        "model": {"name": name, **asdict(shape)},
        "batch_size": arguments.batch_size,
        "passes": {title: side.switches for title, side in sides.items()},
        "steps": arguments.steps,
        "peak_tflops": arguments.peak_tflops or peak_tflops(card),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = write_spec(shape, device, arguments.steps, arguments.batch_size, folder)
        save = partial(write_result, arguments.out, result)
        fine = compare(sides, spec, shape, folder, arguments.repeats, result, save)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
