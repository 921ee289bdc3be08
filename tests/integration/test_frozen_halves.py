"""Frozen weights that are held in bfloat16, under a training in bfloat16: nothing that is computed changes by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy import SharedGenerator, make_job, metric_rows
from test_roles import PROMPTS, RESPONSES, disturb
from workers import OneOfMany

from prefarena.config import GRPOTraining, LoRA, PPOTraining
from prefarena.modeling.heads import token_values
from prefarena.modeling.load import load_policy, load_tokenizer, save_policy
from prefarena.modeling.logprobs import Sequences, token_logps
from prefarena.training import on_policy_models
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.learner import prepare
from prefarena.training.on_policy import train_on_policy
from prefarena.training.on_policy_models import OnPolicyModels, load_models
from prefarena.training.worker import Worker

COMMON: dict[str, Any] = {
    "num_iterations": 2, "num_epochs": 1, "num_minibatches": 2, "micro_batch_size": 4, "warmup_iterations": 0,
    "rollouts_per_iteration": 16, "learning_rate": 1e-3, "precision": "bfloat16",
}  # fmt: skip
TRAININGS = {
    "ppo": PPOTraining(**COMMON),
    "ppo of adapters": PPOTraining(**COMMON, lora=LoRA(rank=4)),
    "grpo of adapters": GRPOTraining(**COMMON, lora=LoRA(rank=4), group_size=4),
}
#: Of what the two runs log: what is measured in seconds differs.
COMPARED = ("policy/loss", "value/loss", "kl/k3", "grad_norm", "logp_gap/max", "entropy")


def not_halved(_: torch.nn.Module) -> None:
    """In place of `halve_products`."""


def weights_of(models: OnPolicyModels) -> dict[str, torch.Tensor]:
    held = models.reference if models.body is None else models.body
    return dict(held.named_parameters())


def computed(
    folder: Path, policy: str, name: str
) -> tuple[dict[str, torch.Tensor], OnPolicyModels, dict[str, torch.dtype]]:
    """Log-probs, values and gradients after something was learnt; and the dtypes that weights were held in at first."""
    worker = Worker(str(folder / "job"))
    models = load_models(make_job(folder, policy, TRAININGS[name]), worker)
    kinds = {key: one.dtype for key, one in weights_of(models).items()}
    for module in models.to_prepare():
        prepare(module, TRAININGS[name], worker)
    models.place_frozen(worker, "bfloat16")
    for role in models.learned if models.body is not None else ():
        disturb(models, role)
    sequences = Sequences.of(PROMPTS, RESPONSES, torch.device("cpu"))
    found = {"reference": token_logps(models.reference, sequences), "policy": token_logps(models.policy, sequences)}
    if models.critic is not None:
        found["values"] = token_values(models.critic, sequences)
    sum(found[key].sum() for key in found if key != "reference").backward()  # type: ignore[union-attr]
    for role, module in models.learned.items():
        found |= {f"{role}.{key}": one.grad for key, one in module.named_parameters() if one.grad is not None}
    return found, models, kinds


@pytest.mark.parametrize("name", TRAININGS)
def test_one_worker_computes_the_same_bits(
    tmp_path: Path, tiny_policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved, models, small = computed(tmp_path / "halved", tiny_policy, name)
    monkeypatch.setattr(on_policy_models, "halve_products", not_halved)
    whole, _, large = computed(tmp_path / "whole", tiny_policy, name)
    assert halved.keys() == whole.keys() and any(".lora_" in key or ".weight" in key for key in whole)
    for key, value in whole.items():
        assert value.dtype == torch.float32 and torch.equal(halved[key], value), key
    if models.body is None:
        assert torch.equal(halved["policy"], halved["reference"])  # as it is before the first step
    assert set(large.values()) == {torch.float32}
    for key, dtype in small.items():
        product = "_proj." in key and "lora_" not in key
        assert dtype == (torch.bfloat16 if product else torch.float32), key


def test_float32_trainings_hold_float32(tmp_path: Path, tiny_policy: str) -> None:
    plain = {"precision": "float32"}
    for training in TRAININGS.values():
        job = make_job(tmp_path, tiny_policy, training.model_copy(update=plain))
        models = load_models(job, Worker(job.stage_dir))
        assert {one.dtype for one in weights_of(models).values()} == {torch.float32}


def run_sharded(rank: int, jobs: list[OnPolicyJob], root: Path, halves: bool) -> None:
    torch.set_num_threads(1)
    if not halves:
        on_policy_models.halve_products = not_halved  # type: ignore[assignment]
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    for job in jobs:
        worker = OneOfMany(job.stage_dir, rank, 2, "fsdp")
        train_on_policy(job, worker, SharedGenerator(job.policy, Path(job.stage_dir).parent, worker))
    torch.distributed.destroy_process_group()


def test_sharded_workers_compute_the_same_bits(tmp_path: Path, tiny_policy: str) -> None:
    start = load_policy(tiny_policy)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.copy_(parameter.bfloat16())  # so that generators in float32 get the same numbers, too
    save_policy(start, load_tokenizer(tiny_policy), tmp_path / "policy")
    tiny_policy = str(tmp_path / "policy")
    jobs: dict[bool, list[OnPolicyJob]] = {}
    for halves in (True, False):
        root = tmp_path / str(halves)
        jobs[halves] = [make_job(root / name, tiny_policy, training) for name, training in TRAININGS.items()]
        torch.multiprocessing.spawn(run_sharded, (jobs[halves], root, halves), nprocs=2)
    for name, *pair in zip(TRAININGS, jobs[True], jobs[False], strict=True):
        halved, whole = (metric_rows(job) for job in pair)
        assert halved[0]["kl/k3"] == 0.0 and halved[1]["kl/k3"] > 0
        for key in COMPARED:
            assert [row.get(key) for row in halved] == [row.get(key) for row in whole], (name, key)


def test_the_saved_policy_has_the_weights_that_were_not_halved(tmp_path: Path, tiny_policy: str) -> None:
    job = make_job(tmp_path, tiny_policy, TRAININGS["grpo of adapters"])
    worker = Worker(job.stage_dir)
    train_on_policy(job, worker, SharedGenerator(job.policy, tmp_path, worker))
    start, end = (load_policy(path).state_dict() for path in (tiny_policy, job.model_dir))
    moved = [key for key, value in start.items() if not torch.equal(value, end[key])]
    assert moved and all("_proj" in key for key in moved)
    for key in moved:  # by an adapter of rank 4 and nothing else; what halves lose would be of every rank
        assert torch.linalg.svdvals(end[key] - start[key])[4:].max() < 1e-6
