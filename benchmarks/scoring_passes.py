"""Log-probs without gradients, in passes of different sizes on this machine's CPU.

    python -m benchmarks.scoring_passes [--repeats N] [--threads N]

The same 64 sequences go through each model in passes of 64, 32, 16, 8 and 4 sequences, in turns; shown are medians and
ratios to the fastest, and the pages that the system had to make anew. Behind `largest_scored` in data/plan.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prefarena.modeling.arithmetic import in_weights
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.training import process_memory
from tests.helpers.real_model import smollm2

NUM_SEQUENCES = 64
SIZES = (64, 32, 16, 8, 4)


@dataclass(frozen=True)
class Side:
    """A model, and the lengths in tokens of all its prompts and of all its responses."""

    name: str
    module: LogProbs
    prompt: int
    response: int


def sides() -> Iterator[Side]:
    """The Llama of benchmarks/ppo_step.py with its equal lengths, and SmolLM2 with those of HH-RLHF, cut."""
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    yield Side("Llama, width 256, float32", LogProbs(AutoModelForCausalLM.from_config(small).eval()), 128, 64)
    model = in_weights(load_policy(smollm2()), "bfloat16")
    yield Side("SmolLM2-135M, bfloat16", LogProbs(model), 120, 36)


def measure(side: Side, repeats: int) -> None:
    random, vocab_size = np.random.default_rng(0), side.module.model.config.vocab_size
    prompts = random.integers(3, vocab_size, (NUM_SEQUENCES, side.prompt)).tolist()
    responses = [[ids] for ids in random.integers(3, vocab_size, (NUM_SEQUENCES, side.response)).tolist()]
    seconds, pages = defaultdict[int, list[float]](list), defaultdict[int, list[int]](list)
    for repeat in range(repeats + 1):
        for size in SIZES:
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            for at in range(0, NUM_SEQUENCES, size):
                sequence_logps(side.module, prompts[at : at + size], responses[at : at + size])
            if repeat:  # the first time holds what is done only once
                seconds[size].append(time.perf_counter() - started)
                pages[size].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    print(f"\n{side.name}: {NUM_SEQUENCES} sequences of {side.prompt} + {side.response} tokens")
    print(f"  {'sequences':>9}  {'tokens':>6}  {'seconds':>7}  {'ratio':>5}  {'new pages':>9}")
    for size in SIZES:
        ratio, tokens = medians[size] / min(medians.values()), size * (side.prompt + side.response)
        print(f"  {size:>9}  {tokens:>6}  {medians[size]:>7.3f}  {ratio:>5.2f}  {statistics.median(pages[size]):>9.0f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times that each size is timed")
    parser.add_argument("--threads", type=int, default=1, help="of torch; a worker has one by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    process_memory.keep_few_kernels()
    process_memory.return_tensors(at_once=False)  # as workers do
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}; medians of {arguments.repeats}, interleaved")
    for side in sides():
        measure(side, arguments.repeats)


if __name__ == "__main__":
    main()
