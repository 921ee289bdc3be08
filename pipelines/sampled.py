"""An evaluation's results from a policy's samples: scores, divergence from the reference, and measures.

Here are the Ray tasks that end an evaluation; `evaluate.py` draws the samples and hands them out. What models say
of them is computed as `sampled_values.py` tells.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.exact import finish_evaluation, float_column
from pipelines.sampled_values import (
    DistinctResponses,
    Filled,
    Policies,
    SampledJob,
    best_of,
    held_out_pairs,
    judged,
    scored_by_proxy,
    seconds_of,
)
from pipelines.samples import write_samples
from pipelines.wins import write_responses
from prefarena.config import Evaluation, FunctionJudge
from prefarena.evaluation.best_of_n import best_of_curve, kl_bound
from prefarena.evaluation.preferences import preference_accuracy
from prefarena.evaluation.sampled import (
    clusters_of,
    demonstration_metrics,
    divergence_metrics,
    k1_and_k3,
    prompt_clusters,
    sampled_metrics,
    score_metrics,
)
from prefarena.judges.spec import JudgeSpec
from prefarena.judges.usage import Usage, total_costs
from prefarena.mirror import workspace
from prefarena.modeling.load import load_tokenizer
from prefarena.records import Rollout
from prefarena.settings.judges import is_same_function
from prefarena.stage_files import BEST_OF_CURVE, SAMPLE_SCORES
from prefarena.stages import write_json


def score_samples(
    rollouts: list[Rollout], job: SampledJob, settings: Evaluation, generation_seconds: float, *filled: Filled
) -> None:
    """Measures of a policy from its samples, and its held-out preference accuracy. Runs in a Ray task.

    filled: what was computed ahead.
    """
    started = time.perf_counter() - generation_seconds
    workspace(job.folder)
    num_tokens, usages = sum(len(rollout.response_ids) for rollout in rollouts), list[Usage | None]()
    if job.reward is not None:
        ranking, used = judged(job.reward, rollouts, settings, job)
        usages.append(used)
        _keep_curve(rollouts, ranking, job, settings)
        rollouts = best_of(rollouts, ranking, job)
    scores = None
    if job.judge is not None:
        scores, used = judged(job.judge, rollouts, settings, job)
        usages.append(used)
    parts = job.parts(len(rollouts), settings)
    held_out, kls = parts[""], None
    if job.reward is not None:
        row = {"kl_bound": kl_bound(job.best_of), "num_silent_rewards": int(np.isnan(ranking).sum())}
    else:
        row, kls = _policy_row(rollouts, held_out, job, settings)
    for name, part in parts.items():
        row |= {_in_group(key, name): value for key, value in _group_row(rollouts, scores, kls, job, part).items()}
    if job.proxy is not None:
        found, used = _proxy_row(job.proxy, rollouts, parts, job, settings)
        row, usages = row | found, [*usages, used]
    rollouts = rollouts[held_out]
    if scores is not None:
        scores = scores[held_out]
        _keep_scores(job.folder, rollouts, scores, None if kls is None else kls.along[held_out])
    else:
        write_responses(job.folder, rollouts)
    write_samples(job.folder, load_tokenizer(job.policy), rollouts, scores)
    counts = {"num_tokens_generated": num_tokens, **total_costs(usages)}
    finish_evaluation(job.folder, row, started, seconds_of(filled), **counts)


def _keep_curve(drawn: list[Rollout], ranking: np.ndarray, job: SampledJob, settings: Evaluation) -> None:
    """Keep the measures of the best of ever more samples on held-out prompts, where the judge is a function.

    Every sample is scored for them rather than the best alone, which any other judge is not asked for.
    """
    if job.judge is None or job.reward is None or not isinstance(job.judge.settings, FunctionJudge):
        return
    held_out = job.parts(len(drawn) // job.best_of, settings)[""].stop * job.best_of
    scores, _ = judged(job.judge, drawn[:held_out], settings, job)
    is_proxy = not is_same_function(job.reward.settings, job.judge.settings)
    rows = best_of_curve(ranking[:held_out], scores, job.best_of, is_proxy=is_proxy)
    write_json(job.folder / BEST_OF_CURVE, rows)


def score_frontier(
    rollouts: list[Rollout], job: SampledJob, settings: Evaluation, generation_seconds: float, *filled: Filled
) -> None:
    """The judge's scores of many samples of the reference, from which the frontier is estimated. Runs in a Ray task."""
    started = time.perf_counter() - generation_seconds
    workspace(job.folder)
    if job.judge is None:
        raise TypeError("a frontier is of scores")
    scores, usage = judged(job.judge, rollouts, settings, job)
    _keep_scores(job.folder, rollouts, scores)
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    row: dict[str, float] = {"num_silent": int(np.isnan(scores).sum())}
    counts = {"num_tokens_generated": num_tokens, **total_costs([usage])}
    finish_evaluation(job.folder, row, started, seconds_of(filled), **counts)


def _keep_scores(folder: Path, rollouts: list[Rollout], scores: np.ndarray, kls: np.ndarray | None = None) -> None:
    """Keep the scores from which win rates and regret are computed."""
    kept = {"scores": scores, "clusters": prompt_clusters(rollouts)} | ({} if kls is None else {"kl": kls})
    np.savez(folder / SAMPLE_SCORES, allow_pickle=False, **kept)


class _Kls(NamedTuple):
    """KL(pi || pi_ref) along each sample of the policy [N], and KL(pi_ref || pi) along each of the reference's [M]."""

    along: np.ndarray
    beside: np.ndarray


def _policy_row(
    rollouts: list[Rollout], held_out: slice, job: SampledJob, settings: Evaluation
) -> tuple[dict[str, float], _Kls]:
    """The measures that need the policy's log-probs of its samples or of held-out pairs, and all KLs."""
    samples, kept = rollouts[held_out], job.values()
    with Policies(job, settings) as policies:
        values = {name: kept.complete(one) for name, one in policies.wanted(rollouts, held_out.stop).items()}
    if job.policy == job.reference:
        compared = np.zeros((len(rollouts) + len(job.of_reference), 2))
        own = ref = values["own"]
    else:
        compared = values["along"].reshape(-1, 4)
        own, ref = compared[held_out, 2], compared[held_out, 3]
    row = k1_and_k3(own, ref, prompt_clusters(samples))
    row |= {} if job.is_snapshot else _pairs_row(values, policies.pairs, job)
    gap = [sum(rollout.token_logps) for rollout in samples] - own
    row["logp_gap/max"] = float(np.abs(gap).max())
    return row, _Kls(compared[: len(rollouts), 0], compared[len(rollouts) :, 1])


def _pairs_row(values: dict[str, np.ndarray], pairs: DistinctResponses, job: SampledJob) -> dict[str, float]:
    """The measures of held-out pairs, from the policies' log-probs of them."""
    test = held_out_pairs(job)
    # The log-ratios of the reference are zero. Columns of the pairs come from other batches, and differ by rounding.
    own = values["ref_pairs" if job.policy == job.reference else "pairs"]
    chosen, rejected = own[pairs.chosen], own[pairs.rejected]
    if "ref_pairs" in values:
        ref_chosen, ref_rejected = values["ref_pairs"][pairs.chosen], values["ref_pairs"][pairs.rejected]
    else:
        ref_chosen, ref_rejected = (float_column(test, f"ref_{side}_logp") for side in ("chosen", "rejected"))
    row = preference_accuracy(chosen, rejected, ref_chosen, ref_rejected)
    return row | demonstration_metrics(chosen, ref_chosen, clusters_of(test["prompt_ids"].to_pylist()))


def _group_row(
    rollouts: list[Rollout], scores: np.ndarray | None, kls: _Kls | None, job: SampledJob, part: slice
) -> dict[str, float]:
    """The measures of every group of prompts: scores, lengths, and how far the policy is from the reference."""
    own, others = rollouts[part], list(job.of_reference)[part]
    row = sampled_metrics(own, None, None, None if scores is None else scores[part])
    if kls is not None:
        row |= divergence_metrics(kls.along[part], prompt_clusters(own), kls.beside[part], prompt_clusters(others))
    return row


def _proxy_row(
    proxy: JudgeSpec, rollouts: list[Rollout], parts: dict[str, slice], job: SampledJob, settings: Evaluation
) -> tuple[dict[str, float], Usage | None]:
    """What the reward that a policy learned from says of it, and of the reference on held-out prompts; what was asked.

    The standard deviation over the reference's samples is the unit in which gains by different rewards are compared.
    """
    scores, usage = judged(proxy, scored_by_proxy(rollouts, job, settings), settings, job)
    row: dict[str, float] = {}
    for name, part in parts.items():
        found = score_metrics("proxy_reward", scores[part], prompt_clusters(rollouts[part]))
        row |= {_in_group(key, name): value for key, value in found.items()}
    others, beside = list(job.of_reference)[parts[""]], scores[len(rollouts) :]
    if of_reference := score_metrics("reference_proxy_reward", beside, prompt_clusters(others)):
        row |= of_reference | {"reference_proxy_reward_sd": float(np.nanstd(beside))}
    return row, usage


def _in_group(key: str, group: str) -> str:
    """`KEY/GROUP`, and of a standard error `KEY/GROUP_stderr`; the key itself of held-out prompts, named ""."""
    plain = f"{key.removesuffix('_stderr')}/{group}" + ("_stderr" if key.endswith("_stderr") else "")
    return plain if group else key
