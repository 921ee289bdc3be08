"""Prefarena's side of the timing in benchmarks/ppo_step.py.

    python ppo_ours.py SPEC

Starts Ray and a generation actor, then waits for lines on stdin: a JSON with `name` and `mode` each. It runs a job of a
few iterations for each line and answers with a JSON line, the phases' seconds of every iteration. The trainer runs in
this process, without Ray Train, which would add nothing to an iteration of one worker.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from prefarena.config import Generation, PPOTraining, RewardModel
from prefarena.judges.spec import JudgeSpec
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy import OnPolicyTrainer
from prefarena.training.worker import Worker

Mode = Literal["synchronous", "asynchronous"]


def make_job(spec: dict[str, Any], name: str, mode: Mode) -> OnPolicyJob:
    """TRL's objective in our terms: no clipping of scores and gradients, no penalty for a missing eos."""
    training = PPOTraining(
        num_iterations=spec["iterations"],
        rollouts_per_iteration=spec["rollouts"],
        num_epochs=spec["epochs"],
        num_minibatches=spec["minibatches"],
        micro_batch_size=spec["micro_batch"],
        learning_rate=spec["learning_rate"],
        critic_learning_rate=spec["learning_rate"],
        warmup_iterations=0,
        max_grad_norm=1e9,
        kl_coef=spec["kl_coef"],
        clip=spec["clip"],
        value_clip=spec["value_clip"],
        discount=spec["discount"],
        gae_lambda=spec["gae_lambda"],
        reward_clip=1e9,
        missing_eos_penalty=0.0,
        temperature=spec["temperature"],
        importance_cap=2.0 if mode == "asynchronous" else None,
        mode=mode,
        checkpoint_every=10_000,
    )
    return OnPolicyJob(
        stage_dir=str(Path(spec["policy"]).parent / "stages" / name), name=name, policy=spec["policy"], seed=0,
        training=training, reward=JudgeSpec(RewardModel(), spec["reward"], spec["policy"]), critic=spec["reward"],
        prompts=spec["prompts_table"], covered_only=True, generators=("bench",), generation=Generation(),
        response_limit=spec["response_limit"],
    )  # fmt: skip


def run_block(spec: dict[str, Any], name: str, mode: Mode, source: Any) -> list[dict[str, float]]:
    """A job of a few iterations from the start; the first of an asynchronous one waits for its rollouts."""
    job = make_job(spec, name, mode)
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir), source)
    rows = []
    for iteration in range(spec["iterations"]):
        began = time.perf_counter()
        metrics = trainer.run(iteration)
        row = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
        rows.append(row | {"total": time.perf_counter() - began, "response_length": metrics["response_length"]})
    return rows


def main() -> None:
    import ray

    from prefarena.generation.fleet import Generators

    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    ray.init(
        "local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    generation = Generation(cpus=spec["threads"], start_timeout_s=900)
    source = Generators.start(spec["policy"], generation, spec["max_length"], False, names=("bench",), seed=0)
    for line in sys.stdin:
        asked = json.loads(line)
        print("RESULT " + json.dumps(run_block(spec, asked["name"], asked["mode"], source)), flush=True)
    source.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
