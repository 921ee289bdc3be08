"""A job from its start to its finished stage, on one worker: load, train, save, write the manifest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prefarena.data.tables import read_rows
from prefarena.judges.models import RewardModelJudge
from prefarena.modeling.heads import ScalarHead, last_token
from prefarena.modeling.load import load_policy, load_tokenizer, new_reward_model, save_policy
from prefarena.stages import write_manifest
from prefarena.training.jobs import Job, OffPolicyJob, OnPolicyJob, ReferenceJob, RewardModelJob
from prefarena.training.off_policy import train
from prefarena.training.terms import (
    LikelihoodTerm,
    PreferenceTerm,
    PretrainingTerm,
    RewardModelTerm,
    Shares,
    Term,
    collate_pairs,
)
from prefarena.training.worker import Worker


def run_job(job: Job, worker: Worker) -> None:
    """Run `job` to its manifest. Every worker of the group calls this; rank 0 writes."""
    match job:
        case ReferenceJob() | OffPolicyJob():
            contents = _train_policy(job, worker)
        case RewardModelJob():
            contents = _train_reward_model(job, worker)
        case OnPolicyJob():
            from prefarena.training.on_policy import train_on_policy

            contents = train_on_policy(job, worker)
        case _:
            raise TypeError(f"no loop for {type(job).__name__}")
    if worker.rank == 0:
        write_manifest(job.stage_dir, {"label": job.name, "seed": job.seed, **contents})


def _train_policy(job: ReferenceJob | OffPolicyJob, worker: Worker) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.policy)
    model = load_policy(job.policy)
    settings = job.training if isinstance(job, ReferenceJob) else job.method.training
    counts = train(model, _terms(job, worker, tokenizer.pad_token_id), settings, worker)
    if worker.rank == 0:
        save_policy(model, tokenizer, job.model_dir)
    return {"costs": worker.costs(**counts)}


def _terms(job: ReferenceJob | OffPolicyJob, worker: Worker, pad_id: int) -> list[Term]:
    if isinstance(job, ReferenceJob):
        shares = Shares(job.training, worker.world_size, job.seed)
        return [LikelihoodTerm(job.demonstrations, shares, pad_id, loss_on=job.loss_on)]
    method = job.method
    shares = Shares(method.training, worker.world_size, job.seed)
    terms: list[Term] = [PreferenceTerm(job.pairs, method, shares, pad_id)]
    if job.demonstrations is not None and method.demonstration_weight > 0:
        terms.append(
            LikelihoodTerm(
                job.demonstrations,
                shares,
                pad_id,
                weight=method.demonstration_weight,
                mean=method.demonstration_mean,
            )
        )
    if job.pretraining is not None and method.pretraining_weight > 0:
        terms.append(PretrainingTerm(job.pretraining, shares, pad_id, weight=method.pretraining_weight))
    return terms


def _train_reward_model(job: RewardModelJob, worker: Worker) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.policy)
    model = new_reward_model(job.policy, job.seed)
    settings = job.settings
    shares = Shares(settings.training, worker.world_size, job.seed)
    term = RewardModelTerm(job.pairs, shares, tokenizer.pad_token_id, centre_weight=settings.centre_weight)
    head = ScalarHead(model)
    counts = train(head, [term], settings.training, worker)
    contents: dict[str, Any] = {}
    if worker.rank == 0:
        samples = read_rows(job.samples)
        raw = RewardModelJudge.of(model).score(samples["prompt_ids"].to_pylist(), samples["response_ids"].to_pylist())
        model.config.reward_mean = float(raw.mean())
        model.config.reward_scale = float(max(raw.std(), 1e-6))
        held_out = pair_scores(head, job.test_pairs, tokenizer.pad_token_id, worker.device)
        contents["reward_model"] = _quality(*held_out)
        save_policy(model, tokenizer, job.model_dir)
    return {"costs": worker.costs(**counts), **contents}


@torch.no_grad()
def pair_scores(
    head: ScalarHead, path: str, pad_id: int, device: torch.device, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores of the chosen and the rejected responses of a table of pairs, [N] float64 each."""
    table = read_rows(path)
    chosen, rejected = [], []
    for start in range(0, table.num_rows, batch_size):
        sequences = collate_pairs(table.slice(start, batch_size).to_pydict(), pad_id).to(device)
        halves = last_token(head(sequences), sequences).double().cpu().chunk(2)
        chosen.append(halves[0].numpy())
        rejected.append(halves[1].numpy())
    return np.concatenate(chosen), np.concatenate(rejected)


def _quality(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Held-out accuracy with its binomial standard error, and the log loss (nats; ln 2 is chance)."""
    correct = np.where(chosen > rejected, 1.0, np.where(chosen == rejected, 0.5, 0.0))
    accuracy = float(correct.mean())
    return {
        "accuracy": accuracy,
        "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / len(correct))),
        "log_loss": float(np.logaddexp(0, rejected - chosen).mean()),
        "num_pairs": len(correct),
    }
