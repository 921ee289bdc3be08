"""Part "kernels" of benchmarks/gpu_acceptance.py: what a training step computes. Needs torch and transformers alone."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acceptance import HERE, Check, Outcome, Setting
from random_pairs import TokenPairs, hh_lengths, random_pairs
from sides import last_error
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefarena.modeling.attention_trial import TOLERANCE, Heads, difference
from prefarena.modeling.chunked_head import chunked_logps
from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.modeling.memory import size_of, training_memory
from prefarena.modeling.packing import pack
from prefarena.modeling.parts import whole
from prefarena.training.sharding import shard

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Largest difference of a token's log-prob from float64 (nats), and of all gradients, relative to their norm.
_LIMITS = {"float32": (1e-4, 1e-4), "bfloat16": (0.1, 0.05)}
#: As tests/integration/test_memory.py has it for CPUs.
_MEMORY = 0.2


def here(setting: Setting) -> dict[str, Any]:
    """The device, and the versions that matter for it."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": "cpu"}
    if not setting.tiny:
        card: Any = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "num_gpus": torch.cuda.device_count(), "cuda": torch.version.cuda or "none"}
        found |= {"memory_mib": card.total_memory // 2**20, "shared_memory": card.shared_memory_per_block_optin}
    return found


def tidy() -> None:
    """Give back what a check has left on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- model and pairs


def new_model(setting: Setting, **changed: int) -> LlamaForCausalLM:
    """In float32 on the CPU; its weights are large enough that attention and answers are far from uniform."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 256}
    if not setting.tiny:
        sizes = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1408, "vocab_size": 8192}
    sizes |= {"num_attention_heads": 4 if setting.tiny else 8, "num_key_value_heads": 2, **changed}
    config = LlamaConfig(**sizes, max_position_embeddings=1024, initializer_range=sizes["hidden_size"] ** -0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


def new_pairs(setting: Setting, vocabulary: int, count: int = 8) -> TokenPairs:
    """Some longer than a block of FlexAttention."""
    lengths = hh_lengths(count, seed=3)
    return random_pairs(np.minimum(lengths, 70) if setting.tiny else lengths, vocabulary, seed=4)


def ready(model: LlamaForCausalLM, setting: Setting, kind: str) -> LogProbs:
    """The model as training has it on the device. Raises RuntimeError where it is not packed there."""
    model.to(setting.device)
    module = LogProbs(model, 1024, attends_in=KINDS[kind])
    if not module.packed:
        raise RuntimeError("; ".join(module.notes))
    if kind == "bfloat16":
        compute_in_halves(module)
    return module


def split(pairs: TokenPairs) -> tuple[list[list[int]], list[list[list[int]]]]:
    return [prompt for prompt, _, _ in pairs], [answers for _, *answers in pairs]


def gradients(module: nn.Module) -> Tensor:
    """All of them in a row, in float64 on the CPU."""
    found = [whole(each.grad) for each in module.parameters() if each.grad is not None]
    return torch.cat([gradient.detach().cpu().double().flatten() for gradient in found])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def exact(model: LlamaForCausalLM, pairs: TokenPairs, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of response tokens and gradients of their weighted sum: in float64 on the CPU, sequence by sequence."""
    wide, found = copy.deepcopy(model).cpu().double(), []
    for prompt, *answers in pairs:
        for answer in answers:
            logits = wide(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    logps = torch.cat(found)
    (logps * weights).sum().backward()
    return logps.detach(), gradients(wide)


# ------------------------------------------------------------------------------------------------------ the checks


def packed_and_padded(kind: str, setting: Setting, outcome: Outcome) -> None:
    """Both layouts against float64; packing adds no error that padding has not."""
    model = new_model(setting)
    pairs = new_pairs(setting, model.config.vocab_size)
    num_tokens = sum(len(answer) for _, *answers in pairs for answer in answers)
    weights = torch.randn(num_tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / num_tokens
    exact_logps, exact_gradients = exact(model, pairs, weights)
    module = ready(model, setting, kind)
    logp_limit, gradient_limit = _LIMITS[kind]
    errors = {}
    for layout in ("padded", "packed"):
        batch = pack(*split(pairs), shared=layout == "packed", device=setting.device)
        module.zero_grad(set_to_none=True)
        logps, _ = module(batch)
        (logps * weights.to(logps)).sum().backward()
        gaps = (logps.detach().cpu().double() - exact_logps).abs()
        errors[layout] = float(gaps.mean())
        outcome.note(f"{layout}: mean difference of a token's log-prob, nats", float(gaps.mean()))
        outcome.at_most(f"{layout}: largest difference of a token's log-prob, nats", float(gaps.max()), logp_limit)
        gap = relative(gradients(module), exact_gradients)
        outcome.at_most(f"{layout}: gradients' difference, relative", gap, gradient_limit)
    ratio = errors["packed"] / max(errors["padded"], logp_limit / 100)  # below that both are rounding
    outcome.at_most("packed over padded: mean differences", ratio, 2.0)


def attention(size: int, kind: str, setting: Setting, outcome: Outcome) -> None:
    """FlexAttention's kernel, forward and backward; on a CPU its own arithmetic, and attention tree by tree."""
    heads, dtype = Heads(size, 4 if setting.tiny else 8, 2), KINDS[kind]
    layouts = {"tree by tree": False, "FlexAttention": True} if setting.tiny else {"FlexAttention": None}
    for name, in_blocks in layouts.items():
        gap = difference(heads, dtype, setting.device, exact=True, in_blocks=in_blocks)
        outcome.at_most(f"{name}: largest difference, relative to the largest value", gap, TOLERANCE[dtype])


def head_values(setting: Setting, outcome: Outcome) -> None:
    """Log-probs, entropies and gradients of bfloat16 hidden states against float64."""
    tokens, vocabulary, width = (700, 5000, 64) if setting.tiny else (4000, 20000, 512)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).bfloat16()
    weight = (torch.randn(vocabulary, width, generator=random) / math.sqrt(width)).bfloat16().float()
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    up = torch.randn(2, tokens, generator=random)
    found = []
    for device, width_of in ((setting.device, None), ("cpu", torch.float64)):
        inputs = [each.detach().to(device, width_of or each.dtype).requires_grad_() for each in (hidden, weight)]
        if width_of is None:
            logps, entropy = chunked_logps(inputs[0], inputs[1], None, targets.to(device), entropy=True)
        else:
            whole_row = torch.log_softmax(inputs[0] @ inputs[1].t(), -1)
            logps, entropy = whole_row.gather(1, targets[:, None])[:, 0], -(whole_row.exp() * whole_row).sum(-1)
        assert entropy is not None
        (torch.stack([logps, entropy]) * up.to(logps)).sum().backward()
        parts = [logps, entropy, *(each.grad for each in inputs if each.grad is not None)]
        found.append([part.detach().cpu().double() for part in parts])
    (logps, entropy, *ours), (exact_logps, exact_entropy, *theirs) = found
    outcome.at_most("log-probs: largest difference, nats", float((logps - exact_logps).abs().max()), 1e-3)
    outcome.at_most("entropies: largest difference, nats", float((entropy - exact_entropy).abs().max()), 1e-3)
    for name, one, other in zip(("hidden states", "weight"), ours, theirs, strict=True):
        outcome.at_most(f"gradient of {name}: difference, relative", relative(one, other), 1e-2)


class Head(nn.Module):
    """A head of these sizes, and hidden states before it."""

    def __init__(self, tokens: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(tokens, width))
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))

    def forward(self) -> Tensor:
        targets = torch.zeros(len(self.hidden), dtype=torch.long, device=self.hidden.device)
        return chunked_logps(self.hidden, self.weight, None, targets)[0].sum()


def head_memory(setting: Setting, outcome: Outcome) -> None:
    """Twice the tokens and twice the vocabulary take little more; whole logits would take four times as much.

    Counted with shapes in place of numbers on a CPU, measured on a GPU.
    """
    first = (2048, 16384) if setting.tiny else (8192, 65536)
    beyond, sizes = [], [first, (2 * first[0], 2 * first[1])]
    for tokens, vocabulary in sizes:
        if setting.tiny:
            with torch.device("meta"):
                head = Head(tokens, vocabulary, 128)
            need = training_memory(head, [lambda module: module()], bfloat16=True)
            assert need is not None
            beyond.append(need.activations)
            continue
        head = Head(tokens, vocabulary, 128).cuda().bfloat16()
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = held_by_gpu()
        loss = head()
        loss.backward()
        beyond.append(torch.cuda.max_memory_allocated() - before)
    logits = [4 * tokens * vocabulary for tokens, vocabulary in sizes]
    outcome.note("beyond inputs and gradients, MiB", [round(size / 2**20, 1) for size in beyond])
    outcome.note("what logits would take, MiB", [round(size / 2**20, 1) for size in logits])
    growth = (beyond[1] - beyond[0]) / (logits[1] - logits[0])
    outcome.at_most("growth, relative to that of logits", growth, 0.05)


def held_by_gpu() -> int:
    """Bytes; the peak is counted from here."""
    tidy()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def zero_log_ratios(setting: Setting, outcome: Outcome) -> None:
    """A policy and its reference with the same weights, scored in passes of the same rows in bfloat16."""
    model = new_model(setting)
    pairs = new_pairs(setting, model.config.vocab_size)
    reference = ready(copy.deepcopy(model), setting, "bfloat16")
    policy = ready(model, setting, "bfloat16")
    for layout in ("packed", "padded"):
        batch = pack(*split(pairs), shared=layout == "packed", device=setting.device)
        with torch.no_grad():
            theirs, _ = reference(batch)
        ours, _ = policy(batch)
        outcome.must(ours.requires_grad, "the policy's log-probs have no gradient")
        ratios = ours.detach() - theirs
        outcome.at_most(f"{layout}: largest log-ratio of a token, nats", float(ratios.abs().max()), 0.0)
        ratios = batch.sums(ours.detach()) - batch.sums(theirs)
        outcome.at_most(f"{layout}: largest log-ratio of a response, nats", float(ratios.abs().max()), 0.0)


def same_bits(setting: Setting, outcome: Outcome) -> None:
    """The same step twice, to the last bit; and what sums that keep their order take, beside those that need not."""
    module = ready(new_model(setting), setting, "bfloat16")
    pairs = new_pairs(setting, module.model.config.vocab_size, 8 if setting.tiny else 24)
    batch = pack(*split(pairs), device=setting.device)
    on_gpu = not setting.tiny

    def step(in_rows: bool) -> None:
        module.zero_grad(set_to_none=True)
        logps, _ = module(batch)
        (-batch.sums(logps, in_rows).sum() / len(pairs)).backward()
        if on_gpu:
            torch.cuda.synchronize()

    seconds = {}
    for in_rows in (True, False):
        found, times = list[Tensor](), list[float]()
        for _ in range(3 if setting.tiny else 12):
            began = time.perf_counter()
            step(in_rows)
            times.append(time.perf_counter() - began)
            if len(found) < 3:  # the first one compiles, and may choose other kernels
                found.append(gradients(module))
        seconds[in_rows] = statistics.median(times[2:])
        title = "in order" if in_rows else "as threads come"
        outcome.note(f"seconds per step, sums {title}", seconds[in_rows])
        differing = int((found[1] != found[2]).sum())
        if in_rows:
            outcome.at_most("gradients that differ when the step is repeated, sums in order", differing, 0)
        else:
            outcome.note("gradients that differ when the step is repeated, sums as threads come", differing)
    outcome.note("seconds in order, over those as threads come", seconds[True] / seconds[False])


def step_memory(setting: Setting, outcome: Outcome) -> None:
    """One optimizer step on the GPU against what is predicted for it."""
    model = new_model(setting, hidden_size=1024, num_hidden_layers=8, intermediate_size=2816, vocab_size=32000)
    pairs = new_pairs(setting, model.config.vocab_size, 24)
    module = LogProbs(model, 1024)

    def loss(twin: nn.Module) -> Tensor:
        device = next(twin.parameters()).device
        return -sequence_logps(twin, *split(pairs), device=device)[0].sum() / len(pairs)

    predicted = training_memory(module, [loss], bfloat16=True, accumulates=False)
    assert predicted is not None
    before = held_by_gpu()
    module = ready(model, setting, "bfloat16")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    for _ in range(2):  # the first one also has what kernels and libraries keep
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        total = loss(module)
        total.backward()
        optimizer.step()
    measured = torch.cuda.max_memory_allocated() - before
    outcome.note("weights, MiB", size_of(module.parameters()) / 2**20)
    outcome.note("predicted, MiB", predicted.total / 2**20)
    outcome.note("measured, MiB", measured / 2**20)
    outcome.at_most("difference, relative", abs(predicted.total / measured - 1), _MEMORY)


# --------------------------------------------------------------------------------------------------------- sharded


def loss_of(module: nn.Module, pairs: TokenPairs, setting: Setting, device: torch.device) -> Tensor:
    logps, _ = sequence_logps(module, *split(pairs), device=device)
    return -logps.sum() / 100  # whatever share of them these pairs are


def sharded_step(rank: int, world_size: int, setting: Setting, folder: str) -> None:
    """Losses and gradients of a sharded model, each worker on its share of the pairs; rank 0 writes them."""
    device = torch.device(setting.device, rank) if setting.device == "cuda" else torch.device("cpu")
    backend = "nccl" if setting.device == "cuda" else "gloo"
    if setting.device == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    found = {}
    for kind in KINDS:
        model = new_model(setting)
        pairs = new_pairs(setting, model.config.vocab_size)
        module: Any = LogProbs(model, 1024, device, KINDS[kind])
        module = shard(module, world_size, device, "bfloat16" if kind == "bfloat16" else "float32")
        loss = loss_of(module, pairs[rank::world_size], setting, device) * world_size  # gradients are averaged
        loss.backward()
        torch.distributed.all_reduce(loss.detach())
        found[kind] = {"loss": float(loss) / world_size, "gradients": gradients(module)}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


def fsdp(world_size: int, setting: Setting, outcome: Outcome) -> None:
    """FSDP2 against the plain model on the same pairs."""
    folder = Path(setting.scratch) / f"fsdp-{uuid.uuid4().hex}"
    folder.mkdir()
    if world_size == 1:
        sharded_step(0, 1, setting, str(folder))
    else:
        torch.multiprocessing.spawn(sharded_step, (world_size, setting, str(folder)), nprocs=world_size)
    found = torch.load(folder / "found.pt")
    for kind, (_, limit) in _LIMITS.items():
        module = ready(new_model(setting), setting, kind)
        device = next(module.parameters()).device
        loss = loss_of(module, new_pairs(setting, module.model.config.vocab_size), setting, device)
        loss.backward()
        gap = abs(found[kind]["loss"] / float(loss) - 1)
        outcome.at_most(f"{kind}: loss, relative", gap, 1e-5 if kind == "float32" else 1e-2)
        outcome.at_most(f"{kind}: gradients, relative", relative(found[kind]["gradients"], gradients(module)), limit)


# -------------------------------------------------------------------------------------------------- the benchmark


def benchmark(title: str, setting: Setting, outcome: Outcome) -> None:
    """benchmarks/gpu.py with ours beside plain PyTorch or TRL: they agree, and each is timed."""
    out = Path(setting.scratch) / "gpu.json"
    size = ["--tiny", "--steps", "1", "--batch-size", "2"] if setting.tiny else ["--steps", "8"]
    sides = ["ours", "plain PyTorch"] if title == "plain PyTorch" else ["ours", "TRL online", "TRL precomputed"]
    command = [sys.executable, str(HERE / "gpu.py"), *size, "--repeats", "1" if setting.tiny else "2"]
    done = subprocess.run(
        [*command, "--sides", *sides, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if not out.exists():
        raise RuntimeError(
            last_error(done.stderr) or f"gpu.py ended with status {done.returncode}: {done.stderr[-300:]}"
        )
    result = json.loads(out.read_text(encoding="utf-8"))
    outcome.note("parity", result["parity"])
    outcome.note("sides", result.get("sides", {}))
    outcome.must(done.returncode == 0, f"it ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    for side in sides:
        found = result.get("sides", {}).get(side, {})
        outcome.must("seconds_per_step" in found, f"{side} was not timed: {found}")


def on_gpus(why: str) -> Callable[[Setting], str | None]:
    return lambda setting: why if setting.tiny else None


def no_trl(_: Setting) -> str | None:
    return None if importlib.util.find_spec("trl") else "TRL is not installed here"


def no_second_gpu(setting: Setting) -> str | None:
    """What takes two of them, and on a CPU two processes."""
    if setting.gpus < 2:
        return "--multi-gpu was not given"
    if not setting.tiny and torch.cuda.device_count() < 2:
        return f"there is {torch.cuda.device_count()} GPU here"
    return None


_MEASURED = (
    "a GPU's allocator is measured; tests/integration/test_memory.py holds the prediction against a process on a CPU"
)
CHECKS = [
    *(Check(f"packed and padded rows, {kind}", partial(packed_and_padded, kind)) for kind in KINDS),
    *(
        Check(f"tree attention, heads of {size}, {kind}", partial(attention, size, kind))
        for size in (64, 128, 256)
        for kind in KINDS
    ),
    Check("head by tiles, bfloat16: values", head_values),
    Check("head by tiles, bfloat16: memory", head_memory),
    Check("log-ratios at step 0, bfloat16", zero_log_ratios),
    Check("the same step twice, bfloat16", same_bits),
    Check("memory of a training step", step_memory, on_gpus(_MEASURED)),
    Check("FSDP2 on one rank", partial(fsdp, 1)),
    Check("FSDP2 on two ranks", partial(fsdp, 2), no_second_gpu),
    Check("benchmarks/gpu.py, plain PyTorch", partial(benchmark, "plain PyTorch"), limit_s=420),
    replace(Check("benchmarks/gpu.py, TRL", partial(benchmark, "TRL"), no_trl), limit_s=420),
]
