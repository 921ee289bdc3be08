"""Measure every policy on the same footing: `prefarena evaluate`.

The enumerable language is measured exactly. Text is measured on held-out prompts, from vLLM samples that are scored
by the judge, and on held-out pairs. An evaluation stage holds `row.json` (the measures) and what win rates between
entries need.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipelines.abilities import measure_abilities
from pipelines.annotate import ExactReference
from pipelines.asked_for import is_pairwise
from pipelines.claims import settle
from pipelines.exact import collect_scores, evaluate_exactly, exact_job, start_scoring
from pipelines.jobs import judge_spec, response_limit
from pipelines.on_the_way import measured_on_the_way
from pipelines.plan import SeedPlan, Trained, model_of, policy_of, unique
from pipelines.progress import fail, stage_line
from pipelines.reference import scoring_options
from pipelines.sampled import score_frontier, score_samples
from pipelines.sampled_values import Kind, SampledJob, start_filling
from pipelines.sampling import Sampler
from pipelines.wins import judge_wins
from prefarena.cluster.waiting import Failed, outcomes_within
from prefarena.config import BestOfN, Comparison, Evaluation, LanguageTask, TextTask
from prefarena.data.tables import read_rows
from prefarena.errors import EntryError, UserError, WaitTimeoutError
from prefarena.evaluation.exact import win_rates
from prefarena.evaluation.sampled import win_rate
from prefarena.generation.interface import Sampling
from prefarena.mirror import bring
from prefarena.records import Rollout
from prefarena.stage_files import EXACT, LOGPS, SAMPLE_SCORES
from prefarena.stages import Stage

#: Where the frontier's samples begin in the numbering of requests: they are others than those of any evaluation.
_FRONTIER_INDEX = 1 << 40
#: What models are asked in an evaluation, and for the frontier.
_OF_FEW: tuple[Kind, ...] = ("reward", "judge", "proxy", "policy")
_OF_MANY: tuple[Kind, ...] = ("judge",)
#: An evaluation, and the entry that it is of; none: the reference's own, or the scores behind the frontier.
Work = list[tuple[Stage, SeedPlan, Trained | None]]


def evaluate(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Run every evaluation that is not finished, of what is trained; failed entries have none. Needs Ray."""
    work: Work = []
    for plan in plans:
        work.append((plan.evaluation, plan, None))
        for trained in (one for one in plan.trained if not one.failure):
            work += [(stage, plan, trained) for stage in (trained.evaluation, *trained.on_the_way)]
        work += [(plan.frontier, plan, None)] if plan.frontier else []
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
    measure_abilities(config, plans, console)


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
    for (stage, plan, trained), outcome in zip(waiting, outcomes, strict=True):
        if isinstance(outcome, Failed):
            if trained is None and stage != plan.frontier:
                raise UserError(f"the reference policy, which every entry needs, cannot be evaluated: {outcome.reason}")
            fail(stage, outcome.reason, console)


# ------------------------------------------------------------------------------ evaluation from samples


def _evaluate_from_samples(config: Comparison, waiting: Work, console: Console) -> None:
    import ray

    settings, outcomes = config.evaluation, dict[Stage, Any]()
    # Scorers run beside the generators, which hold their own share of the GPUs.
    options, running = scoring_options(config.resources), dict[Stage, list[Any]]()
    num_scorers = config.resources.scoring.num_actors or config.resources.num_workers
    of_few, of_many = ray.remote(**options)(score_samples), ray.remote(**options)(score_frontier)
    with Sampler(config, waiting[0][1], console) as sampler:
        references = _ReferenceSamples(sampler, settings, {stage.key for stage, _, _ in waiting})
        # The first evaluation of a seed keeps what all want of the reference. No other process works on it: it is ours.
        first: dict[str, str] = {}
        for stage, plan, trained in waiting:
            job = sampled_job(config, plan, trained, stage.begin())
            keeper = first.setdefault(plan.evaluation.key, stage.key)
            job = replace(job, kept=sampler.folder_of(stage.key), kept_for_all=sampler.folder_of(keeper))
            if trained is not None and (snapshot := measured_on_the_way(trained, stage)) is not None:
                job = as_snapshot(job, snapshot[1])
            prompts, sampling = prompts_of(job, plan, settings), sampling_of(plan, settings)
            if stage == plan.frontier:
                prompts = held_out_prompts(plan, settings) * settings.frontier_samples
                sampling = replace(sampling, first_index=_FRONTIER_INDEX)
            started = time.perf_counter()
            try:
                rollouts = sampler.sample(job.policy, stage.key, prompts, sampling)
                spent = time.perf_counter() - started
                if trained is not None and job.reward is None and not job.is_snapshot:
                    job = replace(job, of_reference=references.of(plan, keeper))
            except (EntryError, WaitTimeoutError) as error:
                outcomes[stage] = Failed(str(error))
                continue
            scorer, kinds = (of_many, _OF_MANY) if stage == plan.frontier else (of_few, _OF_FEW)
            there = ray.put(rollouts)
            ahead = start_filling(there, job, settings, kinds, options, num_scorers)
            running[stage] = [*ahead, scorer.remote(there, job, settings, spent, *ahead)]
    # The engines have left with all samples drawn: scoring takes longer than that, and has their devices now.
    outcomes |= _ended(running, config.resources.task_timeout_s)
    fail_entries(waiting, [outcomes[stage] for stage, _, _ in waiting], console)
    for stage, outcome in outcomes.items():
        if not isinstance(outcome, Failed):  # else they are there when it is tried again
            sampler.forget(stage.key)


def _ended(running: dict[Stage, list[Any]], limit_s: float) -> dict[Stage, Any]:
    """The outcomes of the evaluations whose tasks these are; an evaluation has failed if one of its tasks has."""
    tasks = [task for own in running.values() for task in own]
    ended = iter(outcomes_within(tasks, limit_s, _title(list(running))))
    outcomes = {stage: [next(ended) for _ in own] for stage, own in running.items()}
    return {
        stage: next((one for one in found if isinstance(one, Failed)), found[-1]) for stage, found in outcomes.items()
    }


class _ReferenceSamples:
    """The reference's answers to the prompts that entries are measured on, as its own evaluation draws them.

    Where that evaluation is under way here, these are its samples; where it is finished, they are drawn again, which
    gives the same ones from the same engine.
    """

    def __init__(self, sampler: Sampler, settings: Evaluation, under_way: set[str]) -> None:
        self._sampler, self._settings, self._under_way = sampler, settings, under_way
        self._drawn: dict[str, list[Rollout]] = {}

    def of(self, plan: SeedPlan, keeper: str) -> list[Rollout]:
        """The samples for a seed. Raises what `Sampler.sample` raises.

        keeper: an evaluation that no other process works on, which keeps samples that are drawn again.
        """
        key = plan.evaluation.key
        if key not in self._drawn:
            version, kept = (key, key) if key in self._under_way else (f"{key}-again", keeper)
            prompts, sampling = sampled_on(plan, self._settings), sampling_of(plan, self._settings)
            self._drawn[key] = self._sampler.sample(model_of(plan.reference), version, prompts, sampling, kept)
        return self._drawn[key]


def sampled_on(plan: SeedPlan, settings: Evaluation) -> list[list[int]]:
    """The prompt of every sample of a policy, in order: held-out ones, then those of `coverage_prompts`."""
    groups = [held_out_prompts(plan, settings), *coverage_prompts(plan, settings).values()]
    return [prompt for group in groups for prompt in group * settings.samples_per_prompt]


def prompts_of(job: SampledJob, plan: SeedPlan, settings: Evaluation) -> list[list[int]]:
    """The prompt of every sample that an evaluation draws: a snapshot's are the held-out ones of `sampled_on`."""
    if job.is_snapshot:
        return held_out_prompts(plan, settings) * settings.samples_per_prompt
    return [prompt for prompt in sampled_on(plan, settings) for _ in range(job.best_of)]


def sampling_of(plan: SeedPlan, settings: Evaluation) -> Sampling:
    return Sampling(response_limit(plan.task), settings.temperature, settings.seed)


def coverage_prompts(plan: SeedPlan, settings: Evaluation) -> dict[str, list[list[int]]]:
    """Training prompts with pairs, `covered`, and without, `uncovered`: as many of each, the first by their ids.

    Empty where every training prompt has pairs.
    """
    if not isinstance(plan.task, TextTask) or plan.task.covered_share == 1:
        return {}
    rows = [row for row in read_rows(plan.pairs.folder / "prompts").to_pylist() if row["split"] == "train"]
    groups = {"covered": [row for row in rows if row["covered"]], "uncovered": [r for r in rows if not r["covered"]]}
    wanted = settings.num_prompts if settings.num_coverage_prompts is None else settings.num_coverage_prompts
    number = min(wanted, *map(len, groups.values()))
    return {name: [row["prompt_ids"] for row in group[:number]] for name, group in groups.items() if number}


def held_out_prompts(plan: SeedPlan, settings: Evaluation) -> list[list[int]]:
    """The first held-out prompts in the order of their ids, which are hashes: a sample without a choice."""
    table = read_rows(plan.pairs.folder / "prompts")
    rows = [row["prompt_ids"] for row in table.to_pylist() if row["split"] == "test"]
    return rows[: settings.num_prompts]


def sampled_job(config: Comparison, plan: SeedPlan, trained: Trained | None, folder: Path) -> SampledJob:
    """The evaluation of an entry, or of the reference."""
    reference = model_of(plan.reference)
    judge = None if is_pairwise(config) else judge_spec(plan, config.judge, plan.judge, may_be_silent=True)
    policy = policy_of(plan, trained) if trained else reference
    job = SampledJob(
        policy,
        reference,
        judge,
        plan.logps.folder,
        folder,
        device=config.resources.device,
        arithmetic=plan.scored_in,
        groups=tuple((name, len(group)) for name, group in coverage_prompts(plan, config.evaluation).items()),
    )
    if trained is None:
        return job
    method, proxy = trained.entry.method, config.proxy_of(trained.entry.method)
    if proxy is not None:
        job = replace(job, proxy=judge_spec(plan, proxy, trained.learned_from, may_be_silent=True))
    if not isinstance(method, BestOfN):
        return job
    reward = judge_spec(plan, method.reward, trained.reward_model, may_be_silent=True)
    return replace(job, best_of=method.n, reward=reward)


def as_snapshot(job: SampledJob, policy: Path) -> SampledJob:
    """The evaluation of an entry's policy on the way: on held-out prompts, and no more than trajectories read."""
    return replace(job, policy=str(policy), groups=(), is_snapshot=True)


# ------------------------------------------------------------------------------------------- win rates


def pairwise_wins(plan: SeedPlan, stages: list[Stage]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates [K, K] between the policies of K evaluation stages (row beats column), and standard errors."""
    if isinstance(plan.task, LanguageTask):
        rewards = ExactReference.load(plan.pairs.folder / EXACT).rewards
        for stage in stages:
            bring(stage.folder / LOGPS)
        wins = win_rates([np.load(stage.folder / LOGPS) for stage in stages], rewards)
        return wins.win_rate, wins.stderr
    for stage in stages:
        bring(stage.folder / SAMPLE_SCORES)
    arrays = [np.load(stage.folder / SAMPLE_SCORES) for stage in stages]
    estimates = [[win_rate(a["scores"], a["clusters"], b["scores"], b["clusters"]) for b in arrays] for a in arrays]
    rates = np.array([[cell.mean for cell in row] for row in estimates])
    return rates, np.array([[cell.stderr for cell in row] for row in estimates])
