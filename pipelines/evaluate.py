"""Measure every policy on the same footing: `prefarena evaluate`.

The enumerable language is measured exactly. Text is measured on held-out prompts, from vLLM samples that are scored
by the judge, and on held-out pairs. An evaluation stage holds `row.json` (the measures) and what win rates between
entries need.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from pipelines.annotate import ExactReference
from pipelines.claims import settle
from pipelines.exact import (
    collect_scores,
    evaluate_exactly,
    exact_job,
    finish_evaluation,
    float_column,
    start_scoring,
)
from pipelines.jobs import judge_spec, response_limit
from pipelines.kept_rollouts import KeptValues, training_of
from pipelines.plan import SeedPlan, Trained, is_pairwise, model_of, policy_of, unique
from pipelines.progress import fail, stage_line
from pipelines.reference import scoring_options
from pipelines.samples import write_samples
from pipelines.sampling import Sampler
from pipelines.wins import judge_wins, write_responses
from prefarena.cluster.waiting import Failed, outcomes_within
from prefarena.config import BestOfN, Comparison, Evaluation, LanguageTask
from prefarena.data.tables import read_rows
from prefarena.errors import EntryError, JudgeError, UserError, WaitTimeoutError
from prefarena.evaluation.best_of_n import kl_bound, pick_best
from prefarena.evaluation.exact import win_rates
from prefarena.evaluation.preferences import preference_accuracy
from prefarena.evaluation.sampled import prompt_clusters, response_logps, sampled_metrics, win_rate
from prefarena.generation.interface import Sampling
from prefarena.judges.spec import JudgeSpec, load_judge, may_be_silent, usage_of
from prefarena.judges.usage import Usage, total_costs
from prefarena.mirror import bring, workspace
from prefarena.modeling.arithmetic import Arithmetic, in_weights, named
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.records import Rollout
from prefarena.stages import Stage

Work = list[tuple[Stage, SeedPlan, Trained | None]]  # an evaluation, and the entry it is of; none: the reference


def evaluate(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Run every evaluation that is not finished, of what is trained; failed entries have none. Needs Ray."""
    work: Work = []
    for plan in plans:
        work.append((plan.evaluation, plan, None))
        work += [(trained.evaluation, plan, trained) for trained in plan.trained if not trained.failure]
    evaluating, waited_for = _evaluate_from_samples, "samples and their scores"
    if isinstance(config.task, LanguageTask):
        evaluating, waited_for = _evaluate_exactly, "processes that go through every response"
        _score_responses(config, [one for one in work if not one[0].finished], console)
        work = [one for one in work if one[2] is None or not one[2].failure]

    def do(waiting: Work) -> None:
        with stage_line(console, _title([stage for stage, _, _ in waiting]), waited_for):
            evaluating(config, waiting, console)

    settle(console, {one[0].folder: one for one in work}, do)
    judge_wins(config, plans, console)


def _title(stages: list[Stage]) -> str:
    return f"evaluating {', '.join(stage.label for stage in unique(stages))}"


def _score_responses(config: Comparison, waiting: Work, console: Console) -> None:
    """The tables of rewards that are not the gold one, which exact evaluations read."""
    tables = {
        trained.scores.folder: (trained.scores, plan, trained)
        for _, plan, trained in waiting
        if trained and trained.scores
    }

    def do(unscored: list[tuple[Stage, SeedPlan, Trained]]) -> None:
        title = f"scoring every response by {', '.join(stage.label for stage, _, _ in unscored)}"
        with stage_line(console, title, "tasks that score"):
            scoring = [(stage, start_scoring(plan, trained)) for stage, plan, trained in unscored]
            for stage, running in scoring:
                outcome = collect_scores(running, stage, config.resources.task_timeout_s)
                if isinstance(outcome, Failed):
                    fail(stage, outcome.reason, console)

    settle(console, tables, do)


def _evaluate_exactly(config: Comparison, waiting: Work, console: Console) -> None:
    import ray

    task = ray.remote(num_cpus=1)(evaluate_exactly)
    jobs = [exact_job(config, plan, trained, stage.begin()) for stage, plan, trained in waiting]
    what = _title([stage for stage, _, _ in waiting])
    outcomes = outcomes_within([task.remote(job) for job in jobs], config.resources.task_timeout_s, what)
    fail_entries(waiting, outcomes, console)


def fail_entries(waiting: Work, outcomes: list[Any], console: Console) -> None:
    """Mark as failed the evaluations whose outcome is `Failed`. Raises UserError where that is the reference's own."""
    for (stage, _, trained), outcome in zip(waiting, outcomes, strict=True):
        if isinstance(outcome, Failed):
            if trained is None:
                raise UserError(f"the reference policy, which every entry needs, cannot be evaluated: {outcome.reason}")
            fail(stage, outcome.reason, console)


# ------------------------------------------------------------------------------ evaluation from samples


def _evaluate_from_samples(config: Comparison, waiting: Work, console: Console) -> None:
    import ray

    settings, outcomes = config.evaluation, dict[Stage, Any]()
    # Scorers run beside the generators, which hold their own share of the GPUs.
    scorer, running = ray.remote(**scoring_options(config.resources))(score_samples), dict[Stage, Any]()
    with Sampler(config, waiting[0][1], console) as sampler:
        for stage, plan, trained in waiting:
            job = sampled_job(config, plan, trained, stage.begin())
            job = replace(job, kept=sampler.folder_of(stage.key))
            prompts = held_out_prompts(plan, settings) * settings.samples_per_prompt
            prompts = [prompt for prompt in prompts for _ in range(job.best_of)]
            sampling = Sampling(response_limit(plan.task), settings.temperature, settings.seed)
            started = time.perf_counter()
            try:
                rollouts = sampler.sample(job.policy, stage.key, prompts, sampling)
            except (EntryError, WaitTimeoutError) as error:
                outcomes[stage] = Failed(str(error))
                continue
            running[stage] = scorer.remote(rollouts, job, settings, time.perf_counter() - started)
        what = _title([stage for stage, _, _ in waiting])
        scored = outcomes_within(list(running.values()), config.resources.task_timeout_s, what)
        outcomes |= zip(running, scored, strict=True)
        fail_entries(waiting, [outcomes[stage] for stage, _, _ in waiting], console)
        for stage, outcome in outcomes.items():
            if not isinstance(outcome, Failed):  # else they are there when it is tried again
                sampler.forget(stage.key)


def held_out_prompts(plan: SeedPlan, settings: Evaluation) -> list[list[int]]:
    """The first held-out prompts in the order of their ids, which are hashes: a sample without a choice."""
    table = read_rows(plan.pairs.folder / "prompts")
    rows = [row["prompt_ids"] for row in table.to_pylist() if row["split"] == "test"]
    return rows[: settings.num_prompts]


@dataclass(frozen=True)
class SampledJob:
    """One evaluation from samples, as it is sent to a Ray task.

    judge: none where the policy is compared with the reference rather than scored (pipelines/wins.py); its responses
    are kept then. best_of: samples of which the one that `reward` scores highest is kept; 1 for a policy, which keeps
    them all. device: of the models that score. arithmetic: of the policies; judges name theirs. kept: where log-probs
    and scores are kept until it has ended.
    """

    policy: str
    reference: str
    judge: JudgeSpec | None
    logps: Path
    folder: Path
    best_of: int = 1
    reward: JudgeSpec | None = None
    device: str = "cpu"
    arithmetic: Arithmetic = "float32"
    kept: Path | None = None


def sampled_job(config: Comparison, plan: SeedPlan, trained: Trained | None, folder: Path) -> SampledJob:
    """The evaluation of an entry, or of the reference."""
    reference = model_of(plan.reference)
    judge = None if is_pairwise(config) else judge_spec(plan, config.judge, plan.judge)
    policy = policy_of(plan, trained) if trained else reference
    job = SampledJob(
        policy,
        reference,
        judge,
        plan.logps.folder,
        folder,
        device=config.resources.device,
        arithmetic=plan.scored_in,
    )
    if trained is None or not isinstance(trained.entry.method, BestOfN):
        return job
    method = trained.entry.method
    return replace(job, best_of=method.n, reward=judge_spec(plan, method.reward, trained.reward_model))


def score_samples(rollouts: list[Rollout], job: SampledJob, settings: Evaluation, generation_seconds: float) -> None:
    """Measures of a policy from its samples, and its held-out preference accuracy. Runs in a Ray task."""
    started = time.perf_counter() - generation_seconds
    workspace(job.folder)
    num_tokens, usages = sum(len(rollout.response_ids) for rollout in rollouts), list[Usage | None]()
    if job.reward is not None:
        ranking, used = _judged(job.reward, rollouts, settings, job)
        usages.append(used)
        rollouts = [rollouts[index] for index in pick_best(ranking, job.best_of)]
    scores = None
    if job.judge is not None:
        scores, used = _judged(job.judge, rollouts, settings, job)
        usages.append(used)
        np.savez(job.folder / "scores.npz", scores=scores, clusters=prompt_clusters(rollouts))
    else:
        write_responses(job.folder, rollouts)
    row = sampled_metrics(rollouts, None, None, scores) if job.reward else _policy_row(rollouts, scores, job, settings)
    if job.reward is not None:
        row |= {"kl_bound": kl_bound(job.best_of), "num_silent_rewards": int(np.isnan(ranking).sum())}
    write_samples(job.folder, load_tokenizer(job.policy), rollouts, scores)
    finish_evaluation(job.folder, row, started, num_tokens_generated=num_tokens, **total_costs(usages))


def _judged(
    spec: JudgeSpec, rollouts: list[Rollout], settings: Evaluation, job: SampledJob
) -> tuple[np.ndarray, Usage | None]:
    """A judge's scores [N] of rollouts, nan where it is silent, and what it was asked for them.

    Those of a model are kept in parts. An endpoint keeps its answers itself, and a function sees all rows at once.
    """
    judge = load_judge(spec, settings.batch_size, job.device)
    responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    if spec.settings.kind in ("learned", "classifier"):
        training = training_of(spec.path) if spec.path else None
        given_by = ["scores", spec.settings.model_dump(mode="json"), training, settings.batch_size, job.device]
        given_by += named(spec.arithmetic)
        scores = KeptValues(job.kept).complete(given_by, *responses, judge.score)
    else:
        scores = judge.score(*responses)
    if not may_be_silent(judge) and not np.isfinite(scores).all():
        num_bad = int((~np.isfinite(scores)).sum())
        raise JudgeError(
            f"the judge `{spec.settings.kind}` gave {num_bad} of {len(scores)} responses scores that are not finite "
            "numbers; look at its weights"
        )
    return scores, usage_of(judge)


def _policy_row(
    rollouts: list[Rollout], scores: np.ndarray | None, job: SampledJob, settings: Evaluation
) -> dict[str, float]:
    """What needs the policy's own log-probs, and the rest. Policy and reference are never held at the same time."""
    sampled = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    test = read_rows(job.logps / "test_pairs")
    pairs = {side: (test["prompt_ids"].to_pylist(), test[f"{side}_ids"].to_pylist()) for side in ("chosen", "rejected")}
    with _Scorer(job, job.policy, settings) as score:
        own = score(*sampled, settings.temperature)
        chosen, rejected = (score(*pairs[side], 1.0) for side in ("chosen", "rejected"))
    ref_chosen, ref_rejected = (float_column(test, f"ref_{side}_logp") for side in ("chosen", "rejected"))
    with _Scorer(job, job.reference, settings) as score:
        ref = score(*sampled, settings.temperature)
        if job.arithmetic != "float32":  # passes of other shapes, as those of the table, are rounded far apart
            ref_chosen, ref_rejected = (score(*pairs[side], 1.0) for side in ("chosen", "rejected"))
    row = sampled_metrics(rollouts, own, ref, scores)
    row |= preference_accuracy(chosen, rejected, ref_chosen, ref_rejected)
    gap = [sum(rollout.token_logps) for rollout in rollouts] - own
    return row | {"logp_gap/max": float(np.abs(gap).max())}


class _Scorer:
    """A policy's log-probs of responses, kept in parts; its weights are read for the first part that is missing."""

    def __init__(self, job: SampledJob, policy: str, settings: Evaluation) -> None:
        self._job, self._policy, self._settings = job, policy, settings
        self._model: PreTrainedModel | None = None

    def __enter__(self) -> Callable[[list[list[int]], list[list[int]], float], np.ndarray]:
        return self._score

    def __exit__(self, *_: object) -> None:
        self._model = None

    def _score(self, prompts: list[list[int]], responses: list[list[int]], temperature: float) -> np.ndarray:
        """log pi(y|x) [N], nats."""
        given_by = ["logps", training_of(self._policy), temperature, self._settings.batch_size, self._job.device]
        given_by += named(self._job.arithmetic)
        compute = partial(self._compute, temperature)
        return KeptValues(self._job.kept).complete(given_by, prompts, responses, compute)

    def _compute(self, temperature: float, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        if self._model is None:
            self._model = in_weights(load_policy(self._policy), self._job.arithmetic)
            torch.nn.Module.to(self._model, self._job.device)
        pad_id = load_tokenizer(self._policy).pad_token_id
        return response_logps(self._model, prompts, responses, pad_id, self._settings.batch_size, temperature)


# ------------------------------------------------------------------------------------------- win rates


def pairwise_wins(plan: SeedPlan, stages: list[Stage]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates [K, K] between the policies of K evaluation stages (row beats column), and standard errors."""
    if isinstance(plan.task, LanguageTask):
        rewards = ExactReference.load(plan.pairs.folder / "exact.npz").rewards
        for stage in stages:
            bring(stage.folder / "logps.npy")
        wins = win_rates([np.load(stage.folder / "logps.npy") for stage in stages], rewards)
        return wins.win_rate, wins.stderr
    for stage in stages:
        bring(stage.folder / "scores.npz")
    arrays = [np.load(stage.folder / "scores.npz") for stage in stages]
    estimates = [[win_rate(a["scores"], a["clusters"], b["scores"], b["clusters"]) for b in arrays] for a in arrays]
    rates = np.array([[cell.mean for cell in row] for row in estimates])
    return rates, np.array([[cell.stderr for cell in row] for row in estimates])
