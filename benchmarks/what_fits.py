"""What fits on cards of 80 GB: DPO, PPO and GRPO of Llamas of 7, 13 and 70 billion parameters, by their shapes alone.

    python benchmarks/what_fits.py            # writes benchmarks/results/what_fits.txt
    python benchmarks/what_fits.py --only 7B  # prints the rows of one model

It asks what `prefarena doctor` asks, for each row: what a worker predicts before its first step. No weights are made.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from prefarena.cluster.capacity import share_beside_engine
from prefarena.cluster.needs import Lengths, trainings
from prefarena.config import Comparison, parse_config
from prefarena.modeling.room import USABLE

RESULT = Path(__file__).parent / "results" / "what_fits.txt"
GIB = 2**30
#: Of an H100 of 80 GB, as torch counts it.
CARD = int(79.1 * GIB)
LENGTHS = Lengths(prompt=512, response=512)
MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
#: Of a card, what Ray is told that a worker takes whose card an engine that sleeps is on.
WORKER_OF_SLEEPERS = 0.9
METHODS = {"DPO": "dpo", "PPO": "rlhf", "GRPO": "grpo"}


@dataclass(frozen=True)
class Row:
    """workers: on a card each; of on-policy methods engines have others, except where `beside` says how much of the
    worker's card one takes. size: rollouts, or pairs, in a pass. asleep: engines are on the workers' cards and sleep
    while these learn (`generation.sleep_mode`). offloaded: weights and optimizer are in the host's memory.
    """

    model: str
    method: str
    adapters: bool
    workers: int
    size: int
    beside: float | None = None
    asleep: bool = False
    offloaded: bool = False


ROWS = [
    Row("7B", "DPO", False, 8, 4),
    Row("7B", "DPO", True, 1, 4),
    Row("7B", "PPO", False, 6, 1),
    Row("7B", "PPO", False, 7, 4),
    Row("7B", "PPO", True, 1, 4, beside=0.3),
    Row("7B", "GRPO", False, 4, 4),
    Row("7B", "GRPO", True, 1, 4, beside=0.3),
    Row("13B", "DPO", False, 8, 4),
    Row("13B", "DPO", True, 1, 1),
    Row("13B", "DPO", True, 2, 4),
    Row("13B", "PPO", False, 15, 1),
    Row("13B", "PPO", False, 31, 1),
    Row("13B", "PPO", True, 1, 1),
    Row("13B", "GRPO", False, 15, 1),
    Row("13B", "GRPO", True, 1, 1),
    Row("70B", "DPO", False, 64, 1),
    Row("70B", "DPO", True, 8, 1),
    Row("70B", "PPO", False, 64, 1),
    Row("70B", "PPO", True, 7, 1),
    Row("70B", "GRPO", False, 64, 1),
    Row("70B", "GRPO", True, 7, 1),
    Row("7B", "PPO", False, 8, 4, beside=0.5, asleep=True),
    Row("7B", "GRPO", False, 8, 4, beside=0.5, asleep=True),
    Row("13B", "PPO", False, 8, 1, beside=0.4, asleep=True),
    Row("13B", "PPO", True, 1, 1, beside=0.5, asleep=True),
    Row("7B", "DPO", False, 1, 1, offloaded=True),
    Row("7B", "PPO", False, 1, 1, beside=0.3, offloaded=True),
    Row("13B", "PPO", False, 2, 1, offloaded=True),
    Row("70B", "DPO", False, 8, 1, offloaded=True),
    Row("70B", "PPO", False, 16, 1, offloaded=True),
]


def config_of(row: Row) -> Comparison:
    """A comparison of this entry alone, with the settings that save memory and cost no exactness."""
    halved = {"precision": "bfloat16", "activation_checkpointing": True}
    adapters = {"lora": {"rank": 16}} if row.adapters else {}
    training: dict[str, Any] = {**halved, **adapters}
    method: dict[str, Any] = {"kind": METHODS[row.method], "training": training}
    if row.method == "DPO":
        training["micro_batch_tokens"] = row.size * (LENGTHS.prompt + 2 * LENGTHS.response)
        training["batch_size"] = 64 * row.workers
    else:
        training["micro_batch_size"] = row.size
        method["reward"] = {"kind": "learned", "training": {**halved, **adapters}}
    resources: dict[str, Any] = {"use_gpu": True, "num_workers": row.workers, "sharding": "fsdp"}
    generation: dict[str, Any] = {"gpus": 1}
    if row.offloaded:
        resources["cpu_offload"] = True
    if row.asleep:  # Ray is told of small shares, since the engine's memory is given back while a worker learns
        resources["gpus_per_worker"] = WORKER_OF_SLEEPERS
        asleep = {"gpus": 1 - WORKER_OF_SLEEPERS, "num_actors": row.workers, "sleep_mode": "keep"}
        generation = {**asleep, "gpu_memory_utilization": row.beside}
    elif row.beside is not None:
        resources["gpus_per_worker"] = 1 - row.beside
        generation = {"gpus": row.beside, "gpu_memory_utilization": row.beside}
    return parse_config({
        "task": {"kind": "text", "data": "pairs.jsonl"}, "model": {"kind": "pretrained", "path": "llama"},
        "judge": {"kind": "function", "function": "judge:score"}, "reference": {"train": False},
        "entries": [{"name": "one", "method": method}], "resources": resources, "generation": generation,
    })  # fmt: skip


def told(row: Row) -> str:
    """One line of the table."""
    started, config = time.perf_counter(), config_of(row)
    [training] = [one for one in trainings(config) if one.where == "entries.one.method.training"]
    settings = LlamaConfig.from_dict({**MODELS[row.model], "vocab_size": 32000, "tie_word_embeddings": False})
    need = training.need(settings, LENGTHS, training.sizes[0])
    assert need is not None
    part = share_beside_engine(config) if training.on_policy else config.resources.gpus_per_worker
    room = part * CARD
    verdict = "fits" if need.total <= USABLE * room else "tight" if need.total <= room else "no"
    awake = need.weights + need.optimizer + (row.beside or 0) * CARD
    if row.asleep and awake > CARD:
        verdict = "no"
    where = "asleep" if row.asleep else "beside" if row.beside is not None else "-" if row.method == "DPO" else "apart"
    sizes = "".join(
        f"{one / GIB:>8.1f}" for one in (need.weights, need.gradients, need.optimizer, need.activations, need.total)
    )
    seconds = time.perf_counter() - started
    weights = "adapters" if row.adapters else "in full"
    return (
        f"{row.model:<5}{row.method:<6}{weights:<9}{row.workers:>7}{row.size:>5} {where:<7}{sizes}{room / GIB:>8.1f}"
        f"{f'{awake / GIB:.1f}' if row.asleep else '-':>8}{f'{need.host / GIB:.1f}' if row.offloaded else '-':>8}"
        f"  {verdict:<6}{seconds:>5.0f} s"
    )


HEADER = (
    "model method         workers pass engine  weights  grads  optim.  passes    need    room"
    "   awake    host         took"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="print the rows of one model and write nothing")
    only = parser.parse_args().only
    lines = [HEADER]
    print(HEADER, flush=True)
    for row in ROWS:
        if only in (None, row.model):
            lines.append(told(row))
            print(lines[-1], flush=True)
            if only is None:
                RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
