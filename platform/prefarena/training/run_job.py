"""A job from its start to its finished stage, on one worker: load, train, save, write the manifest.

A job that cannot go on ends in a failed stage instead: its numbers are no longer numbers, its memory ran out, its judge
cannot be used. The jobs after it go on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prefarena.failures import reason_of
from prefarena.generation.interface import GeneratorLostError, RolloutSource
from prefarena.judges.spec import Judge
from prefarena.modeling.arithmetic import attends_in, products_of
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.lora import add_adapters
from prefarena.settings.off_policy import Pairwise
from prefarena.settings.ranked import Ranked
from prefarena.settings.unpaired import Unpaired
from prefarena.stages import write_failure, write_manifest
from prefarena.training.drawing import PairDrawer
from prefarena.training.guard import TrainingDivergedError
from prefarena.training.jobs import Drawing, Job, OffPolicyJob, OnPolicyJob, ReferenceJob, RewardModelJob
from prefarena.training.loading import Loader
from prefarena.training.off_policy import train
from prefarena.training.online import OnlineTerm, ReplayTerm
from prefarena.training.ranked import RankedTerm
from prefarena.training.reward_model import train_reward_model
from prefarena.training.saving import keep_snapshot, save_as_it_is, save_trained
from prefarena.training.storage import full_disk_named
from prefarena.training.terms import (
    LikelihoodTerm,
    PreferenceTerm,
    Shares,
    Term,
    regularising,
)
from prefarena.training.unpaired import UnpairedTerm
from prefarena.training.worker import Worker


def run_job(job: Job, worker: Worker, source: RolloutSource | None = None, judge: Judge | None = None) -> None:
    """Run `job` to its manifest, or to its failure. Every worker of the group calls this; rank 0 writes.

    source, judge: replace the generators and the reward named by a job whose policy responds while it learns.

    Raises StorageFullError where there is no room for what it writes; its last checkpoint is whole then. Raises
    GeneratorLostError, and leaves the stage as it is, where new generation actors may help.
    """
    with full_disk_named(job.name, worker.stage_dir), products_of(job.arithmetic):
        _run(job, worker, source, judge)
    worker.drop_garbage()


def _run(job: Job, worker: Worker, source: RolloutSource | None, judge: Judge | None) -> None:
    try:
        contents = _contents(job, worker, source, judge)
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


def _contents(job: Job, worker: Worker, source: RolloutSource | None, judge: Judge | None) -> dict[str, Any]:
    """The contents of the job's manifest, once its model is saved."""
    match job:
        case OffPolicyJob(drawing=Drawing() as drawing):
            return _train_online(job, drawing, worker, source, judge)
        case ReferenceJob() | OffPolicyJob():
            return _train_policy(job, worker)
        case RewardModelJob():
            return train_reward_model(job, worker)
        case OnPolicyJob():
            from prefarena.training.on_policy import train_on_policy

            return train_on_policy(job, worker, source, judge)
        case _:
            raise TypeError(f"no loop for {type(job).__name__}")


def _train_online(
    job: OffPolicyJob, drawing: Drawing, worker: Worker, source: RolloutSource | None, judge: Judge | None
) -> dict[str, Any]:
    drawer = PairDrawer(job, drawing, worker, load_tokenizer(job.policy).pad_token_id, source, judge)
    try:
        return _train_policy(job, worker, drawer)
    finally:
        drawer.leave()


def _train_policy(job: ReferenceJob | OffPolicyJob, worker: Worker, drawer: PairDrawer | None = None) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.policy)
    settings = job.training if isinstance(job, ReferenceJob) else job.method.training

    model = Loader(worker).policy(job.policy)
    if settings.lora is not None:
        add_adapters(model, settings.lora, job.seed)
    module = LogProbs(model, job.max_length, worker.device, attends_in(settings.precision))
    worker.note_padding(module.notes)
    terms = _terms(job, worker, tokenizer.pad_token_id, module.packed, drawer)
    has_adapters, plain = settings.lora is not None, partial(load_policy, job.policy)

    def keep(step: int) -> None:
        save = partial(save_as_it_is, model, tokenizer, worker, plain, job.policy, has_adapters=has_adapters)
        keep_snapshot(job.stage_dir, step, worker, save)

    counts: dict[str, Any] = train(module, terms, settings, worker, keep)
    pairs: dict[str, Any] = {}
    if isinstance(terms[0], PreferenceTerm) and worker.rank == 0:
        pairs = {"pairs": terms[0].origin(counts["num_steps"])}
        counts |= {name: pairs["pairs"].pop(name) for name in ("num_tokens_generated",) if name in pairs["pairs"]}
    if drawer is not None:
        counts |= drawer.judge_calls()
        counts["num_flops"] += drawer.flops()
    save_trained(model, job, tokenizer, worker, plain, has_adapters=has_adapters)
    # The generators' devices are held all the while.
    beside = len(job.drawing.generators) if isinstance(job, OffPolicyJob) and job.drawing is not None else 0
    return {"costs": worker.costs(num_beside=beside, **counts), **pairs}


def _terms(
    job: ReferenceJob | OffPolicyJob, worker: Worker, pad_id: int, packed: bool, drawer: PairDrawer | None
) -> list[Term]:
    if isinstance(job, ReferenceJob):
        shares = Shares(job.training, worker.world_size, job.seed, packed)
        return [LikelihoodTerm(job.demonstrations, shares, pad_id, loss_on=job.loss_on)]
    method = job.method
    shares = Shares(method.training, worker.world_size, job.seed, packed)
    own = _method_term(job, shares, pad_id)
    if drawer is not None and isinstance(method, Pairwise):
        own = OnlineTerm(job, method, shares, pad_id, worker, drawer)
    return [own, *regularising(job.regulariser, shares, pad_id)]


def _method_term(job: OffPolicyJob, shares: Shares, pad_id: int) -> Term:
    """The term of the method itself."""
    method = job.method
    if isinstance(method, Pairwise) and job.replayed is not None:
        return ReplayTerm(job, method, shares, pad_id)
    if isinstance(method, Pairwise):
        return PreferenceTerm(job.pairs, method, shares, pad_id)
    if isinstance(method, Ranked):
        return RankedTerm(job.pairs, method, shares, pad_id)
    if isinstance(method, Unpaired) and job.responses is not None:
        return UnpairedTerm(job.responses, method, shares, pad_id, pairs=job.pairs)
    raise TypeError(f"{method.kind} learns from {method.learns_from}, but the job has none")
