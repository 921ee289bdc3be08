"""How time and money of each method grow on paper: Llamas of 1, 7, 13 and 70 billion parameters on 1 to 64 H100s.

    python benchmarks/on_paper.py             # writes the table in docs/estimate.md
    python benchmarks/on_paper.py --only 1B   # prints the rows of one model

Each row is what `prefarena estimate --gpus NxH100` says of a comparison on 60,000 pairs with prompts and responses of
HH-RLHF's lengths: DPO, MPO and the reward model in one pass, PPO and GRPO with 120 iterations of 512 rollouts. No
weights are made, no card is used, and nothing is measured: the seconds are counted FLOPs and bytes at published shares
of a card's peaks (platform/prefarena/estimate/hardware.py). What fits is in benchmarks/what_fits.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from random_pairs import hh_lengths
from transformers import LlamaConfig

from pipelines.estimate_tables import shown
from prefarena.config import Comparison, parse_config
from prefarena.estimate.hardware import CARDS, Cards
from prefarena.estimate.lengths import Data, Rows
from prefarena.estimate.result import by_entry, device_hours, estimate, price_of
from prefarena.estimate.speeds import OnCards
from prefarena.estimate.stages import planned
from prefarena.estimate.trainings import Workload

PAGE = Path(__file__).parents[1] / "docs" / "estimate.md"
BEGIN, END = "<!-- on-paper -->", "<!-- /on-paper -->"
NUM_PAIRS, PRICE = 60_000, 2.5
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip
#: Of each model, cards in all, and the engines that generate among them: (actors, cards of each).
ROWS = [
    ("1B", 1, (1, 1)), ("1B", 8, (4, 1)),
    ("7B", 8, (2, 1)), ("7B", 16, (4, 1)), ("7B", 64, (16, 1)),
    ("13B", 16, (2, 2)), ("13B", 64, (8, 2)),
    ("70B", 64, (2, 8)),
]  # fmt: skip


def config_of(number: int, engines: tuple[int, int]) -> Comparison:
    """Four entries on so many cards; what does not generate is trained on all that are not engines."""
    actors, each = engines
    beside = number == 1
    workers = 1 if beside else number - actors * each
    halved = {"precision": "bfloat16", "activation_checkpointing": True, "learning_rate": 1e-6}
    # Passes that fit everywhere (benchmarks/what_fits.py), so that none has to be looked for.
    pairs = {**halved, "micro_batch_tokens": 4096, "batch_size": -(-64 // workers) * workers, "num_epochs": 1}
    rollouts = {**halved, "num_iterations": 120, "rollouts_per_iteration": 512, "num_epochs": 1, "num_minibatches": 4}
    rollouts["micro_batch_size"] = 4
    reward = {"kind": "learned", "training": pairs}
    entries = [
        {"name": "dpo", "method": {"kind": "dpo", "training": pairs}},
        {"name": "mpo", "method": {"kind": "mpo", "demonstration_weight": 0.002, "training": pairs}},
        {"name": "ppo", "method": {"kind": "rlhf", "reward": reward, "training": rollouts}},
        {"name": "grpo", "method": {"kind": "grpo", "reward": reward, "training": rollouts}},
    ]
    resources: dict[str, Any] = {"use_gpu": True, "num_workers": workers, "sharding": "fsdp" if workers > 1 else "none"}
    generation: dict[str, Any] = {"num_actors": actors, "tensor_parallel": each, "gpu_memory_utilization": 0.85}
    generation["weight_sync"] = "ipc" if beside else "nccl"
    if beside:
        resources["gpus_per_worker"] = 0.75
        generation |= {"gpus": 0.25, "gpu_memory_utilization": 0.25}
    return parse_config({
        "task": {"kind": "text", "data": "pairs.jsonl", "max_prompt_tokens": 512, "max_response_tokens": 256},
        "model": {"kind": "pretrained", "path": "llama"}, "judge": {"kind": "function", "function": "judge:score"},
        "reference": {"train": False}, "entries": entries, "resources": resources, "generation": generation,
    })  # fmt: skip


def rows_of(model: str, number: int, engines: tuple[int, int]) -> list[str]:
    """A line for each entry."""
    config = config_of(number, engines)
    sample = np.array(hh_lengths(1000, seed=0), np.int64)
    pairs = Rows(NUM_PAIRS, sample[:, 0], np.minimum(sample[:, 1:], 256))
    few = pairs.taking(2000)
    data = Data(pairs, few, pairs.single(), few.taking(0), pairs.single())
    settings = LlamaConfig.from_dict({"vocab_size": 32000, "tie_word_embeddings": False, **MODELS[model]})
    stages = estimate(
        planned(Workload(config, settings, data, {}, 256)), OnCards(Cards(CARDS["H100"], number), config), {}
    )
    found = []
    for cost in by_entry(stages):
        hours, price = device_hours(cost.device_seconds), price_of(cost.device_seconds, PRICE)
        wall = cost.seconds.times(1 / 3600)
        cells = (model, str(number), cost.entry, f"{cost.ratio:.1f}", shown(wall), shown(hours), shown(price))
        found.append(f"| {' | '.join(cells)} |")
    return found


HEADER = (
    "| parameters | cards | entry | ratio | hours | card-hours | at 2.50 an hour |",
    "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="print the rows of one model and write nothing")
    only = parser.parse_args().only
    lines = list(HEADER)
    for model, number, engines in ROWS:
        if only in (None, model):
            lines += rows_of(model, number, engines)
            print("\n".join(lines[-4:]), flush=True)
    if only is None:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        table = "\n".join(lines)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
