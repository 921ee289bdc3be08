"""Peak memory of a worker in PPO and DPO with a real model: in full, sharded over two workers, and with adapters.

    python benchmarks/rlhf_memory.py [--model FOLDER]    # SmolLM2-135M-Instruct, about 5 minutes on two cores
    python benchmarks/rlhf_memory.py --gpu               # a model of Llama 3.2 1B's shape with random weights, bfloat16

Every case runs in processes of its own, one after another, on random tokens of fixed lengths: what a step holds does
not depend on which tokens they are. Weights are handed over as to generation actors, as one copy in the worker's
memory. Prints a table, and writes it to benchmarks/results/rlhf_memory.txt, or rlhf_memory_gpu.txt. On a GPU memory is
what torch has allocated there, and the cases on two workers are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from gpu import SHAPES
from random_pairs import word_tokenizer
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
from prefarena.training.worker import Worker
from tests.helpers.real_model import smollm2
from tests.helpers.workers import OneOfMany


@dataclass(frozen=True)
class Scale:
    """Tokens of prompts and responses, rows of a step and of a pass, and the arithmetic."""

    prompt: int
    response: int
    num_rows: int
    rows_per_pass: int
    precision: Literal["float32", "bfloat16"]


#: Few enough for two cores: what is held does not depend on how many passes there are, as long as a step has several.
ON_CPU = Scale(96, 32, 8, 4, "float32")
ON_GPU = Scale(256, 256, 16, 8, "bfloat16")
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
RESULTS = Path(__file__).parent / "results"


class RandomRollouts:
    """A rollout source that takes the weights as generation actors do, and answers with `response` random tokens."""

    def __init__(self, response: int) -> None:
        self.response = response

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        # Ray puts copies into its object store, which stay mapped into the worker.
        filled = buckets(named_tensors, torch.float32, BUCKET_BYTES)
        self.sent = deque((bucket.data.copy() for bucket in filled), maxlen=MOST_BUCKETS)

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> RandomRollouts:
        self.prompts, self.version = prompts, version
        return self

    def result(self) -> list[Rollout]:
        return [
            Rollout(prompt, tokens(i, self.response), [-1.0] * self.response, True, self.version)
            for i, prompt in enumerate(self.prompts)
        ]

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return self.submit(prompts, sampling, version).result()


def tokens(seed: int, number: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 1000, number).tolist()


def job_of(name: str, folder: Path, model: str, scale: Scale) -> Job:
    """The job of a case, its inputs written to `folder`."""
    method, lora, _ = CASES[name]
    stage, rows_of_step = str(folder / "stage"), range(scale.num_rows)
    if method == "dpo":
        rows = {
            "id": [str(i) for i in rows_of_step], "prompt_ids": [tokens(i, scale.prompt) for i in rows_of_step],
            "chosen_ids": [tokens(100 + i, scale.response) for i in rows_of_step],
            "rejected_ids": [tokens(200 + i, scale.response) for i in rows_of_step],
            "label": [1.0] * scale.num_rows, "source": ["random"] * scale.num_rows,
            "score_chosen": [None] * scale.num_rows, "score_rejected": [None] * scale.num_rows,
            "ref_chosen_logp": [-300.0] * scale.num_rows, "ref_rejected_logp": [-300.0] * scale.num_rows,
        }  # fmt: skip
        write_rows(pa.Table.from_pydict(rows, REFERENCED_PAIRS), folder / "pairs" / "part.parquet", REFERENCED_PAIRS)
        training = Optimisation(
            num_steps=2,
            batch_size=scale.num_rows,
            micro_batch_tokens=scale.rows_per_pass * (scale.prompt + 2 * scale.response),
            lora=lora,
            precision=scale.precision,
            log_every=1,
        )
        return OffPolicyJob(stage, "dpo", model, 0, DPO(training=training), str(folder / "pairs"))
    prompts = {
        "id": [str(i) for i in rows_of_step], "prompt_ids": [tokens(i, scale.prompt) for i in rows_of_step],
        "covered": [True] * scale.num_rows, "split": ["train"] * scale.num_rows,
    }  # fmt: skip
    write_rows(pa.table(prompts), folder / "prompts.parquet", PROMPTS)
    reward = reward_model(folder, model, lora)
    ppo = PPOTraining(
        num_iterations=1, rollouts_per_iteration=scale.num_rows, num_epochs=2, num_minibatches=1,
        micro_batch_size=scale.rows_per_pass, lora=lora, precision=scale.precision,
    )  # fmt: skip
    return OnPolicyJob(
        stage, "ppo", model, 0, training=ppo, reward=JudgeSpec(RewardModel(), reward, model), critic=reward,
        prompts=str(folder / "prompts.parquet"), covered_only=True, generators=("none",), generation=Generation(),
        response_limit=scale.response,
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


def run_one(rank: int, name: str, job: Job, root: str, gpu: bool) -> None:
    """One worker of a case."""
    number = CASES[name][2]
    if not gpu:
        torch.set_num_threads(1)
    if number > 1:
        rendezvous = f"file://{root}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=number)
    worker = Worker(job.stage_dir, "cuda") if gpu else OneOfMany(job.stage_dir, rank, number, "fsdp")
    if isinstance(job, OnPolicyJob):
        costs = train_on_policy(job, worker, RandomRollouts(job.response_limit))["costs"]
    else:
        run_job(job, worker)
        costs = read_manifest(Path(job.stage_dir))["costs"]
    found = {key: costs[key] for key in ("peak_memory_mib", "predicted_memory_mib")}
    if rank == 0:
        print((Path(job.stage_dir) / MEMORY).read_text(), flush=True)
    (Path(root) / f"{rank}.json").write_text(json.dumps(found | {"process": worker.first_memory_mib}))
    if number > 1:
        torch.distributed.destroy_process_group()


def measure(name: str, model: str, gpu: bool) -> dict[str, float]:
    """Of the worker of a case that took most."""
    with tempfile.TemporaryDirectory() as root:
        prepared = [sys.executable, __file__, "--model", model, "--case", name, "--root", root]
        prepared += ["--gpu"] if gpu else []
        subprocess.run([*prepared, "--prepare"], check=True)
        subprocess.run(prepared, check=True)
        found = [json.loads(path.read_text()) for path in sorted(Path(root).glob("*.json"))]
    return max(found, key=lambda one: one["peak_memory_mib"])


def run_case(name: str, root: str, gpu: bool) -> None:
    job = torch.load(Path(root) / "job.pt", weights_only=False)
    if CASES[name][2] == 1:
        run_one(0, name, job, root, gpu)
    else:
        torch.multiprocessing.spawn(run_one, (name, job, root, gpu), nprocs=CASES[name][2])


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


def random_llama(folder: str) -> str:
    """A model of Llama 3.2 1B's shape with random weights."""
    SHAPES["llama-1b"].new(seed=0).save_pretrained(folder)
    word_tokenizer(SHAPES["llama-1b"].vocabulary).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; SmolLM2-135M-Instruct where none is given")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with a model of Llama 3.2 1B's shape")
    parser.add_argument("--case", choices=list(CASES), help="one case only")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        job = job_of(arguments.case, Path(arguments.root), arguments.model, ON_GPU if arguments.gpu else ON_CPU)
        torch.save(job, Path(arguments.root) / "job.pt")
    elif arguments.root:
        run_case(arguments.case, arguments.root, arguments.gpu)
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = arguments.model or (random_llama(folder) if arguments.gpu else smollm2())
            report(arguments.case, model, arguments.gpu, arguments.model is None)


def report(case: str | None, model: str, gpu: bool, usual: bool) -> None:
    """Measure a case, or all of them; the table of all goes to the results, too."""
    chosen = [name for name, (_, _, number) in CASES.items() if number == 1 or not gpu]
    found: dict[str, Any] = {}
    for name in [case] if case else chosen:
        found[name] = measure(name, model, gpu)
        print(name, found[name], flush=True)
    called = "Llama 3.2 1B's shape" if gpu and usual else model.rsplit("/", 1)[-1]
    where = f"allocated on one {torch.cuda.get_device_name()}" if gpu else "of one worker"
    lines = [f"{called}, {(ON_GPU if gpu else ON_CPU).precision}; MiB {where}", "", *table(found)]
    print("\n".join(lines))
    if not case:
        command = f"$ python benchmarks/{Path(__file__).name}" + (" --gpu" if gpu else "")
        (RESULTS / f"rlhf_memory{'_gpu' if gpu else ''}.txt").write_text("\n".join([command, *lines]) + "\n")


if __name__ == "__main__":
    main()
