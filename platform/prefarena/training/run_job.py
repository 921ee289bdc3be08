"""A job from its start to its finished stage, on one worker: load, train, save, write the manifest.

A job that cannot go on ends in a failed stage instead: its numbers are no longer numbers, its memory ran out, its judge
cannot be used. The jobs after it go on.
"""

from __future__ import annotations

from typing import Any

from prefarena.failures import reason_of
from prefarena.generation.interface import GeneratorLostError
from prefarena.modeling.arithmetic import attends_in, products_of
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.lora import add_adapters
from prefarena.settings.off_policy import Pairwise
from prefarena.settings.ranked import Ranked
from prefarena.settings.unpaired import Unpaired
from prefarena.stages import write_failure, write_manifest
from prefarena.training.guard import TrainingDivergedError
from prefarena.training.jobs import Job, OffPolicyJob, OnPolicyJob, ReferenceJob, RewardModelJob
from prefarena.training.loading import Loader
from prefarena.training.off_policy import train
from prefarena.training.ranked import RankedTerm
from prefarena.training.reward_model import train_reward_model
from prefarena.training.saving import save_trained
from prefarena.training.storage import full_disk_named
from prefarena.training.terms import (
    LikelihoodTerm,
    PreferenceTerm,
    PretrainingTerm,
    Shares,
    Term,
)
from prefarena.training.unpaired import UnpairedTerm
from prefarena.training.worker import Worker


def run_job(job: Job, worker: Worker) -> None:
    """Run `job` to its manifest, or to its failure. Every worker of the group calls this; rank 0 writes.

    Raises StorageFullError where there is no room for what it writes; its last checkpoint is whole then. Raises
    GeneratorLostError, and leaves the stage as it is, where new generation actors may help.
    """
    with full_disk_named(job.name, worker.stage_dir), products_of(job.arithmetic):
        _run(job, worker)
    worker.drop_garbage()


def _run(job: Job, worker: Worker) -> None:
    try:
        contents = _contents(job, worker)
    except TrainingDivergedError as error:  # all workers meet it in the same step
        worker.flush()
        if worker.rank == 0:
            _fail(job, worker, str(error))
        return
    except Exception as error:
        reason = None if isinstance(error, GeneratorLostError) else reason_of(error)
        if reason is None:
            raise
        worker.flush()
        _fail(job, worker, reason)
        if worker.world_size > 1:  # the others wait for this worker; a new group goes on with the next job
            raise
        return
    worker.flush()
    if worker.rank == 0:
        write_manifest(
            job.stage_dir, {"label": job.name, "seed": job.seed, **contents, "faults": worker.stage_log.faults()}
        )
    worker.drop_checkpoints()


def _fail(job: Job, worker: Worker, reason: str) -> None:
    write_failure(job.stage_dir, reason, label=job.name, seed=job.seed, faults=worker.stage_log.faults())


def _contents(job: Job, worker: Worker) -> dict[str, Any]:
    """Of the job's manifest, when its model is saved."""
    match job:
        case ReferenceJob() | OffPolicyJob():
            return _train_policy(job, worker)
        case RewardModelJob():
            return train_reward_model(job, worker)
        case OnPolicyJob():
            from prefarena.training.on_policy import train_on_policy

            return train_on_policy(job, worker)
        case _:
            raise TypeError(f"no loop for {type(job).__name__}")


def _train_policy(job: ReferenceJob | OffPolicyJob, worker: Worker) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.policy)
    settings = job.training if isinstance(job, ReferenceJob) else job.method.training

    model = Loader(worker).policy(job.policy)
    if settings.lora is not None:
        add_adapters(model, settings.lora, job.seed)
    module = LogProbs(model, job.max_length, worker.device, attends_in(settings.precision))
    worker.note_padding(module.notes)
    counts = train(module, _terms(job, worker, tokenizer.pad_token_id, module.packed), settings, worker)
    save_trained(model, job, tokenizer, worker, lambda: load_policy(job.policy), has_adapters=settings.lora is not None)
    return {"costs": worker.costs(**counts)}


def _terms(job: ReferenceJob | OffPolicyJob, worker: Worker, pad_id: int, packed: bool) -> list[Term]:
    if isinstance(job, ReferenceJob):
        shares = Shares(job.training, worker.world_size, job.seed, packed)
        return [LikelihoodTerm(job.demonstrations, shares, pad_id, loss_on=job.loss_on)]
    method = job.method
    shares = Shares(method.training, worker.world_size, job.seed, packed)
    terms: list[Term] = [_method_term(job, shares, pad_id)]
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


def _method_term(job: OffPolicyJob, shares: Shares, pad_id: int) -> Term:
    """The method's own."""
    method = job.method
    if isinstance(method, Pairwise):
        return PreferenceTerm(job.pairs, method, shares, pad_id)
    if isinstance(method, Ranked):
        return RankedTerm(job.pairs, method, shares, pad_id)
    if isinstance(method, Unpaired) and job.responses is not None:
        return UnpairedTerm(job.responses, method, shares, pad_id)
    raise TypeError(f"{method.kind} learns from {method.learns_from}, and the job has none")
