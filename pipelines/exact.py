"""Exact evaluation on the enumerable language: tables of scores, measures of every policy, the optimum.

An evaluation stage holds `row.json`, for win rates between entries `logps.npy`, and of an on-policy entry, or one that
keeps snapshots, `trajectory.json`: the policy before training, its snapshots on the way and the final one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.annotate import ExactReference
from pipelines.jobs import judge_spec
from pipelines.plan import SeedPlan, Trained, model_of, policy_of
from prefarena.cluster.waiting import Failed, outcomes_within
from prefarena.config import BestOfN, Comparison, LanguageTask, OffPolicyMethod, OnPolicyMethod, RewardModel
from prefarena.data.tables import read_rows
from prefarena.evaluation.agreement import estimator_spread
from prefarena.evaluation.best_of_n import best_of_n_logps, kl_bound, numbers_up_to
from prefarena.evaluation.enumeration import Enumeration, Responses, enumerate_responses, enumerate_scores
from prefarena.evaluation.exact import Frontier, exact_metrics, expected_scores, frontiers, groups, win_rates
from prefarena.evaluation.preferences import preference_accuracy
from prefarena.judges.silence import check_scores
from prefarena.judges.spec import JudgeSpec, load_judge
from prefarena.mirror import bring, workspace
from prefarena.modeling.load import load_policy, load_reward_model
from prefarena.stage_files import BEST_OF_CURVE, EXACT, LOGPS, ROW, SCORES, SNAPSHOTS, TRAJECTORY
from prefarena.stages import Stage, costs_of, write_json, write_manifest
from prefarena.tasks.language import EOS_ID, Language, unpadded

_SHARES = 4  # tasks that share the scoring of one table, which takes far longer than listing a policy
_AT_EACH_STEP = ("kl", "reward", "proxy_reward", "frontier_reward", "regret", "entropy")


@dataclass(frozen=True)
class ExactJob:
    """One exact evaluation, as it is sent to a Ray task.

    policy: the model to list. reward: the entry's own, as a table of scores or the string "gold"; None where it has
    none that can be listed. best_of: n if the policy is the best of n samples of the reference by that reward.
    snapshots: the folder of an entry's policies on the way; num_steps: updates of its final one; group: the prompts
    that it samples on, or has pairs of.
    """

    task: LanguageTask
    policy: str
    pairs: Path
    logps: Path
    folder: Path
    keep_logps: bool
    reward: Path | str | None = None
    best_of: int | None = None
    snapshots: Path | None = None
    num_steps: int = 0
    group: str = "all"


def exact_job(config: Comparison, plan: SeedPlan, trained: Trained | None, folder: Path) -> ExactJob:
    """The evaluation of an entry, or of the reference."""
    keep = config.evaluation.win_matrix
    shared = (plan.pairs.folder, plan.logps.folder, folder, keep)
    if trained is None:
        return ExactJob(language_of(plan), model_of(plan.reference), *shared)
    method, policy = trained.entry.method, policy_of(plan, trained)
    reward = trained.scores.folder / SCORES if trained.scores else "gold" if _is_gold(method) else None
    if isinstance(method, BestOfN):
        return ExactJob(language_of(plan), policy, *shared, reward=reward, best_of=method.n)
    if isinstance(method, OnPolicyMethod) and trained.training is not None:
        group = "covered" if method.prompts == "covered" else "all"
        snapshots, num_steps = trained.training.folder / SNAPSHOTS, method.training.num_iterations
        return ExactJob(language_of(plan), policy, *shared, reward, None, snapshots, num_steps, group)
    if isinstance(method, OffPolicyMethod) and method.training.num_snapshots and trained.training is not None:
        snapshots, num_steps = trained.training.folder / SNAPSHOTS, trained.training.manifest()["costs"]["num_steps"]
        return ExactJob(language_of(plan), policy, *shared, None, None, snapshots, num_steps, "covered")
    return ExactJob(language_of(plan), policy, *shared)


def _is_gold(method: Any) -> bool:
    return getattr(getattr(method, "reward", None), "kind", None) == "gold"


def language_of(plan: SeedPlan) -> LanguageTask:
    if not isinstance(plan.task, LanguageTask):
        raise TypeError("only the enumerable language is evaluated exactly")
    return plan.task


# ------------------------------------------------------------------------------------ tables of scores


def start_scoring(plan: SeedPlan, trained: Trained) -> list[Any]:
    """Start the Ray tasks that score every response by the entry's own reward; `collect_scores` waits for them."""
    import ray

    reward = getattr(trained.entry.method, "reward", None)
    if reward is None:
        raise TypeError(f"{trained.entry.name} has no reward")
    task = ray.remote(num_cpus=1)(score_responses)
    spec = judge_spec(plan, reward, trained.reward_model)
    return [task.remote(language_of(plan), spec, share) for share in range(_SHARES)]


def collect_scores(running: list[Any], stage: Stage, limit_s: float) -> Failed | None:
    """Wait for the parts of a table [P, N], `limit_s` at most for each, and finish its stage.

    Returns the failure of a part where there is one; the stage is then left unfinished.
    """
    parts = outcomes_within(running, limit_s, f"the scores of every response ({stage.label})")
    failed = next((part for part in parts if isinstance(part, Failed)), None)
    if failed is not None:
        return failed
    folder, seconds = stage.begin(), sum(part[1] for part in parts)
    np.save(folder / SCORES, np.concatenate([part[0] for part in parts]))
    write_manifest(folder, {"costs": costs_of(seconds)})
    return None


def score_responses(task: LanguageTask, spec: JudgeSpec, share: int) -> tuple[np.ndarray, float]:
    """Scores [P', N] of every response to a share of the prompts, and the seconds that it took."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    language = Language(task)
    prompt_ids = [language.prompt_ids[row] for row in np.array_split(np.arange(task.num_prompts), _SHARES)[share]]
    responses = Responses.listed(language.vocab_size, task.response_limit, EOS_ID)
    if not prompt_ids:
        return np.zeros((0, len(responses.lengths))), 0.0
    if isinstance(spec.settings, RewardModel) and spec.path is not None:
        found = enumerate_scores(load_reward_model(spec.path), prompt_ids, task.response_limit, EOS_ID)
    else:
        judge, listed = load_judge(spec), [unpadded(row) for row in responses.sequences]
        found = np.stack([judge.score([prompt] * len(listed), listed) for prompt in prompt_ids])
        check_scores(found, spec)  # a table has no room for silence
    return found, time.perf_counter() - started


# ------------------------------------------------------------------------------------------- policies


def evaluate_exactly(job: ExactJob) -> None:
    """Exact measures of a policy, its held-out preference accuracy, and its exact win rate over the reference."""
    started = time.perf_counter()
    workspace(job.folder)
    for path in (job.reward, job.snapshots):
        if isinstance(path, Path):
            bring(path)
    language, reference = Language(job.task), ExactReference.load(job.pairs / EXACT)
    limits = frontiers(reference.ref_logps, reference.rewards, reference.covered)
    own = reference.rewards if job.reward == "gold" else np.load(job.reward) if job.reward is not None else None
    policy = _listed(job, language, reference, own)
    row = _measures(policy.logps, reference, limits, own)
    if job.snapshots is not None:
        write_json(job.folder / TRAJECTORY, list(_trajectory(job, language, reference, limits, own, row)))
    wins = win_rates([policy.logps, reference.ref_logps], reference.rewards)
    row |= {"win_rate": float(wins.win_rate[0, 1]), "win_rate_stderr": float(wins.stderr[0, 1])}
    test = read_rows(job.logps / "test_pairs")
    rows = language.prompt_rows(test["prompt_ids"].to_pylist())
    chosen = policy.response_logps(rows, test["chosen_ids"].to_pylist())
    rejected = policy.response_logps(rows, test["rejected_ids"].to_pylist())
    row |= preference_accuracy(
        chosen, rejected, float_column(test, "ref_chosen_logp"), float_column(test, "ref_rejected_logp")
    )
    if job.best_of is not None and own is not None:
        row["kl_bound"] = kl_bound(job.best_of)
        write_json(job.folder / BEST_OF_CURVE, [_best_of(number, reference, own) for number in _numbers(job.best_of)])
    if job.keep_logps:
        np.save(job.folder / LOGPS, policy.logps)
    finish_evaluation(job.folder, row, started)


def _listed(job: ExactJob, language: Language, reference: ExactReference, own: np.ndarray | None) -> Enumeration:
    """The policy on every prompt: best-of-n from the reference's table, others from their models."""
    if job.best_of is None:
        return enumerate_responses(load_policy(job.policy), language.prompt_ids, job.task.response_limit, EOS_ID)
    if own is None:
        raise TypeError("best-of-n needs a reward that scores every response")
    responses = Responses.listed(language.vocab_size, job.task.response_limit, EOS_ID)
    return Enumeration(responses, best_of_n_logps(reference.ref_logps, own, job.best_of))


def _measures(
    logps: np.ndarray, reference: ExactReference, limits: dict[str, Frontier], own: np.ndarray | None
) -> dict[str, float]:
    """The exact row of a policy, and the expectation of its entry's own reward."""
    row = exact_metrics(logps, reference.ref_logps, reference.rewards, reference.covered, reference.lengths, limits)
    return row if own is None else row | expected_scores(logps, own, reference.covered)


def _trajectory(
    job: ExactJob,
    language: Language,
    reference: ExactReference,
    limits: dict[str, Frontier],
    own: np.ndarray | None,
    final: dict[str, float],
) -> Iterator[dict[str, float]]:
    """The rows of the policy after 0 updates, of every snapshot in order, and after the last update.

    Those of snapshots also tell how far one rollout's estimate of the KL is spread.
    """
    yield _at_step(0, _measures(reference.ref_logps, reference, limits, own), job.group)
    kept = job.snapshots.glob("[0-9]*") if job.snapshots else []
    for folder in sorted(kept, key=lambda folder: int(folder.name)):
        policy = enumerate_responses(load_policy(folder), language.prompt_ids, job.task.response_limit, EOS_ID)
        mask = groups(reference.covered)[job.group]
        spread = estimator_spread(policy.responses, policy.logps[mask], reference.ref_logps[mask])
        yield _at_step(int(folder.name), _measures(policy.logps, reference, limits, own), job.group) | spread
    yield _at_step(job.num_steps, final, job.group)


def _numbers(most: int) -> list[int]:
    """The numbers 1, 2, 4, … of samples, up to 64 and `most`: enough points to fit a law to the best of each."""
    return sorted({*numbers_up_to(64), *numbers_up_to(most)})


def _best_of(number: int, reference: ExactReference, own: np.ndarray) -> dict[str, float]:
    """Exact means over all prompts of the best of `number` samples by its own reward."""
    logps = best_of_n_logps(reference.ref_logps, own, number)
    probabilities = np.exp(logps)
    values = {"kl": logps - reference.ref_logps, "reward": reference.rewards, "proxy_reward": own}
    return {"step": number} | {
        name: float(np.where(probabilities > 0, probabilities * value, 0.0).sum(axis=1).mean())
        for name, value in values.items()
    }


def _at_step(step: int, row: dict[str, float], group: str) -> dict[str, float]:
    """A trajectory's row: names without a group are means over the prompts of `ExactJob.group`."""
    plain = {name: row[f"{name}/{group}"] for name in _AT_EACH_STEP if f"{name}/{group}" in row}
    return {"step": step, **plain, **{key: value for key, value in row.items() if "/" in key}}


def read_trajectory(stage: Stage) -> list[dict[str, float]]:
    """The trajectory of an evaluation stage; empty where its entry has none."""
    return _read_rows(stage.folder / TRAJECTORY)


def read_best_of_curve(stage: Stage) -> list[dict[str, float]]:
    """The measures of the best of ever more samples, from an evaluation stage of best-of-n; else empty."""
    return _read_rows(stage.folder / BEST_OF_CURVE)


def _read_rows(path: Path) -> list[dict[str, float]]:
    bring(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def float_column(table: Any, column: str) -> np.ndarray:
    """A column of numbers, float64 [N]."""
    return table[column].to_numpy().astype(np.float64)


def finish_evaluation(
    folder: Path, row: dict[str, float], started: float, ahead: tuple[float, float] = (0.0, 0.0), /, **counts: int
) -> None:
    """Write row.json and the manifest; `started` is of `time.perf_counter`.

    ahead: the time spent before that, in elapsed seconds and in device-seconds.
    """
    write_json(folder / ROW, {key: float(value) for key, value in row.items()})
    own = time.perf_counter() - started
    write_manifest(folder, {"costs": costs_of(own + ahead[0], own + ahead[1], **counts)})


# ------------------------------------------------------------------------------------------ the optimum


def exact_frontier(plan: SeedPlan) -> dict[str, list[tuple[float, float]]]:
    """Points (KL, reward) of the optimal frontier by group of prompts."""
    exact = ExactReference.load(plan.pairs.folder / EXACT)
    limits = frontiers(exact.ref_logps, exact.rewards, exact.covered)
    return {group: [(float(kl), float(reward)) for kl, reward in limit.curve()] for group, limit in limits.items()}


def exact_optimum(plan: SeedPlan, kl_covered: float) -> dict[str, float]:
    """The measures of the best possible policy at a KL on the covered prompts, the same beta on all prompts."""
    exact = ExactReference.load(plan.pairs.folder / EXACT)
    limits = frontiers(exact.ref_logps, exact.rewards, exact.covered)
    inverse_temperature = limits["covered"].optimum_at(kl_covered).inverse_temperature
    logps = limits["all"].logps(inverse_temperature)
    row = exact_metrics(logps, exact.ref_logps, exact.rewards, exact.covered, exact.lengths, limits)
    wins = win_rates([logps, exact.ref_logps], exact.rewards)
    return row | {"win_rate": float(wins.win_rate[0, 1]), "win_rate_stderr": float(wins.stderr[0, 1])}
