"""Peak memory of a worker in PPO and DPO with a real model: in full, sharded over two workers, and with adapters.

    python benchmarks/rlhf_memory.py [--model FOLDER]    # SmolLM2-135M-Instruct, about 5 minutes on two cores

Every case runs in processes of its own, one after another, on random tokens of fixed lengths: what a step holds does
not depend on which tokens they are. Weights are handed over as to generation actors, as one copy in the worker's
memory. Prints a table, and writes it to benchmarks/results/rlhf_memory.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prefarena.config import DPO, Generation, LoRA, Optimisation, PPOTraining, RewardModel
from prefarena.data.tables import write_rows
from prefarena.generation.interface import Sampling
from prefarena.generation.shared import BUCKET_BYTES, MOST_BUCKETS, buckets
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.load import load_tokenizer, new_reward_model, save_policy
from prefarena.modeling.lora import add_adapters, merge_adapters, save_adapter
from prefarena.records import PROMPTS, REFERENCED_PAIRS, Rollout
from prefarena.stage_files import ADAPTER, MEMORY
from prefarena.stages import read_manifest
from prefarena.training.jobs import Job, OffPolicyJob, OnPolicyJob
from prefarena.training.on_policy import train_on_policy
from prefarena.training.run_job import run_job
from tests.helpers.real_model import smollm2
from tests.helpers.workers import OneOfMany

#: Few enough for two cores: what is held does not depend on how many passes there are, as long as a step has several.
PROMPT, RESPONSE, ROWS, PASS = 96, 32, 8, 4
LORA = LoRA(rank=16)
#: Which trainings, on how many workers; each is (method, adapters, workers).
CASES = {
    "PPO in full": ("ppo", None, 1),
    "PPO in full, FSDP2 on two workers": ("ppo", None, 2),
    "PPO with adapters": ("ppo", LORA, 1),
    "PPO with adapters, FSDP2 on two workers": ("ppo", LORA, 2),
    "DPO in full": ("dpo", None, 1),
    "DPO with adapters": ("dpo", LORA, 1),
}
COMPARED = (
    ("PPO in full, FSDP2 on two workers", "PPO in full"),
    ("PPO with adapters", "PPO in full"),
    ("PPO with adapters", "DPO with adapters"),
    ("PPO in full", "DPO in full"),
)
RESULTS = Path(__file__).parent / "results" / "rlhf_memory.txt"


class RandomRollouts:
    """A rollout source that takes the weights as generation actors do, and answers with random tokens."""

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        # Ray puts copies into its object store, which stay mapped into the worker.
        filled = buckets(named_tensors, torch.float32, BUCKET_BYTES)
        self.sent = deque((bucket.data.copy() for bucket in filled), maxlen=MOST_BUCKETS)

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> RandomRollouts:
        self.prompts, self.version = prompts, version
        return self

    def result(self) -> list[Rollout]:
        return [
            Rollout(prompt, tokens(i, RESPONSE), [-1.0] * RESPONSE, True, self.version)
            for i, prompt in enumerate(self.prompts)
        ]

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return self.submit(prompts, sampling, version).result()


def tokens(seed: int, number: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 1000, number).tolist()


def job_of(name: str, folder: Path, model: str) -> Job:
    """The job of a case, its inputs written to `folder`."""
    method, lora, _ = CASES[name]
    stage = str(folder / "stage")
    if method == "dpo":
        rows = {
            "id": [str(i) for i in range(ROWS)], "prompt_ids": [tokens(i, PROMPT) for i in range(ROWS)],
            "chosen_ids": [tokens(100 + i, RESPONSE) for i in range(ROWS)],
            "rejected_ids": [tokens(200 + i, RESPONSE) for i in range(ROWS)],
            "label": [1.0] * ROWS, "source": ["random"] * ROWS,
            "ref_chosen_logp": [-300.0] * ROWS, "ref_rejected_logp": [-300.0] * ROWS,
        }  # fmt: skip
        write_rows(pa.Table.from_pydict(rows, REFERENCED_PAIRS), folder / "pairs" / "part.parquet", REFERENCED_PAIRS)
        training = Optimisation(
            num_steps=2,
            batch_size=ROWS,
            micro_batch_tokens=PASS * (PROMPT + 2 * RESPONSE),
            lora=lora,
            log_every=1,
        )
        return OffPolicyJob(stage, "dpo", model, 0, DPO(training=training), str(folder / "pairs"))
    prompts = {
        "id": [str(i) for i in range(ROWS)], "prompt_ids": [tokens(i, PROMPT) for i in range(ROWS)],
        "covered": [True] * ROWS, "split": ["train"] * ROWS,
    }  # fmt: skip
    write_rows(pa.table(prompts), folder / "prompts.parquet", PROMPTS)
    reward = reward_model(folder, model, lora)
    ppo = PPOTraining(
        num_iterations=1, rollouts_per_iteration=ROWS, num_epochs=2, num_minibatches=1, micro_batch_size=PASS, lora=lora
    )
    return OnPolicyJob(
        stage, "ppo", model, 0, training=ppo, reward=JudgeSpec(RewardModel(), reward, model), critic=reward,
        prompts=str(folder / "prompts.parquet"), covered_only=True, generators=("none",), generation=Generation(),
        response_limit=RESPONSE,
    )  # fmt: skip


def reward_model(folder: Path, model: str, lora: LoRA | None) -> str:
    """A new reward model, as adapters of the policy where the policy trains adapters."""
    made = new_reward_model(model, 0)
    made.config.pad_token_id = load_tokenizer(model).pad_token_id
    if lora is not None:
        add_adapters(made, lora, 0)
        save_adapter(made, model, folder / "rm" / ADAPTER)
        merge_adapters(made)
    save_policy(made, load_tokenizer(model), folder / "rm" / "model")
    return str(folder / "rm" / "model")


def run_one(rank: int, name: str, job: Job, root: str) -> None:
    """One worker of a case."""
    torch.set_num_threads(1)
    number = CASES[name][2]
    if number > 1:
        rendezvous = f"file://{root}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=number)
    worker = OneOfMany(job.stage_dir, rank, number, "fsdp")
    if isinstance(job, OnPolicyJob):
        costs = train_on_policy(job, worker, RandomRollouts())["costs"]
    else:
        run_job(job, worker)
        costs = read_manifest(Path(job.stage_dir))["costs"]
    found = {key: costs[key] for key in ("peak_memory_mib", "predicted_memory_mib")}
    if rank == 0:
        print((Path(job.stage_dir) / MEMORY).read_text(), flush=True)
    (Path(root) / f"{rank}.json").write_text(json.dumps(found | {"process": worker.first_memory_mib}))
    if number > 1:
        torch.distributed.destroy_process_group()


def measure(name: str, model: str) -> dict[str, float]:
    """Of the worker of a case that took most."""
    with tempfile.TemporaryDirectory() as root:
        prepared = [sys.executable, __file__, "--model", model, "--case", name, "--root", root]
        subprocess.run([*prepared, "--prepare"], check=True)
        subprocess.run(prepared, check=True)
        found = [json.loads(path.read_text()) for path in sorted(Path(root).glob("*.json"))]
    return max(found, key=lambda one: one["peak_memory_mib"])


def run_case(name: str, root: str) -> None:
    job = torch.load(Path(root) / "job.pt", weights_only=False)
    if CASES[name][2] == 1:
        run_one(0, name, job, root)
    else:
        torch.multiprocessing.spawn(run_one, (name, job, root), nprocs=CASES[name][2])


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Peak, process and prediction in MiB; and what is beyond the process, over that of another case."""
    beyond = {name: one["peak_memory_mib"] - one["process"] for name, one in found.items()}
    lines = [f"{'':42} {'peak':>7} {'process':>8} {'beyond':>7} {'predicted':>10} {'predicted/peak':>15}"]
    for name, one in found.items():
        peak, process, predicted = one["peak_memory_mib"], one["process"], one["predicted_memory_mib"]
        near = predicted / peak
        lines.append(f"{name:42} {peak:7.0f} {process:8.0f} {beyond[name]:7.0f} {predicted:10.0f} {near:15.2f}")
    for name, other in COMPARED:
        if name in beyond and other in beyond:
            peaks = found[name]["peak_memory_mib"] / found[other]["peak_memory_mib"]
            lines.append(
                f"{name} over {other}: {beyond[name] / beyond[other]:.2f} beyond the process, {peaks:.2f} in all"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; SmolLM2-135M-Instruct where none is given")
    parser.add_argument("--case", choices=list(CASES), help="one case only")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = arguments.model or smollm2()
    if arguments.prepare:
        folder = Path(arguments.root)
        torch.save(job_of(arguments.case, folder, model), folder / "job.pt")
    elif arguments.root:
        run_case(arguments.case, arguments.root)
    else:
        found: dict[str, Any] = {}
        for name in [arguments.case] if arguments.case else CASES:
            found[name] = measure(name, model)
            print(name, found[name], flush=True)
        lines = [f"{model.rsplit('/', 1)[-1]}, float32; MiB of one worker", "", *table(found)]
        print("\n".join(lines))
        if not arguments.case:
            RESULTS.write_text("\n".join([f"$ python benchmarks/{Path(__file__).name}", *lines]) + "\n")


if __name__ == "__main__":
    main()
