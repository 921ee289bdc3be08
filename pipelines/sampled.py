"""What an evaluation computes from a policy's samples: its scores, its divergence from the reference, its measures.

Here are the Ray tasks; `evaluate.py` draws the samples and hands them out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.exact import finish_evaluation, float_column
from pipelines.kept_rollouts import KeptValues, training_of
from pipelines.policy_scores import ScoredWith, Scorer, divergences
from pipelines.samples import write_samples
from pipelines.wins import write_responses
from prefarena.config import Evaluation
from prefarena.data.tables import read_rows
from prefarena.errors import JudgeError
from prefarena.evaluation.best_of_n import kl_bound, pick_best
from prefarena.evaluation.preferences import preference_accuracy
from prefarena.evaluation.sampled import (
    clusters_of,
    demonstration_metrics,
    divergence_metrics,
    k1_and_k3,
    prompt_clusters,
    sampled_metrics,
)
from prefarena.judges.spec import JudgeSpec, load_judge, may_be_silent, usage_of
from prefarena.judges.usage import Usage, total_costs
from prefarena.mirror import workspace
from prefarena.modeling.arithmetic import Arithmetic, named
from prefarena.modeling.load import load_tokenizer
from prefarena.records import Rollout
from prefarena.stage_files import SAMPLE_SCORES


@dataclass(frozen=True)
class SampledJob:
    """One evaluation from samples, as it is sent to a Ray task.

    judge: none where the policy is compared with the reference rather than scored (pipelines/wins.py); its responses
    are kept then. best_of: samples of which the one that `reward` scores highest is kept; 1 for a policy, which keeps
    them all. device: of the models that score. arithmetic: of the policies; judges name theirs. kept: where log-probs
    and scores are kept until it has ended. of_reference: what the reference answers to the same prompts, for the
    forward KL; without it there is none. groups: behind the held-out prompts, names of groups of other prompts and the
    number of prompts in each, all with as many samples; they are measured apart.
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
    of_reference: Sequence[Rollout] = ()
    groups: tuple[tuple[str, int], ...] = ()

    def parts(self, num_samples: int, settings: Evaluation) -> dict[str, slice]:
        """Where the samples of each group lie among `num_samples` of them; those on held-out prompts are named ""."""
        sizes = {name: number * settings.samples_per_prompt for name, number in self.groups}
        found, start = {"": slice(0, num_samples - sum(sizes.values()))}, num_samples - sum(sizes.values())
        for name, size in sizes.items():
            found[name], start = slice(start, start + size), start + size
        return found


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
    parts = job.parts(len(rollouts), settings)
    held_out, kls = parts[""], None
    if job.reward is not None:
        row = {"kl_bound": kl_bound(job.best_of), "num_silent_rewards": int(np.isnan(ranking).sum())}
    else:
        row, kls = _policy_row(rollouts, held_out, job, settings)
    for name, part in parts.items():
        row |= {_in_group(key, name): value for key, value in _group_row(rollouts, scores, kls, job, part).items()}
    rollouts = rollouts[held_out]
    if scores is not None:
        scores = scores[held_out]
        _keep_scores(job.folder, rollouts, scores, None if kls is None else kls.along[held_out])
    else:
        write_responses(job.folder, rollouts)
    write_samples(job.folder, load_tokenizer(job.policy), rollouts, scores)
    finish_evaluation(job.folder, row, started, num_tokens_generated=num_tokens, **total_costs(usages))


def score_frontier(rollouts: list[Rollout], job: SampledJob, settings: Evaluation, generation_seconds: float) -> None:
    """The judge's scores of many samples of the reference, from which the frontier is estimated. Runs in a Ray task."""
    started = time.perf_counter() - generation_seconds
    workspace(job.folder)
    if job.judge is None:
        raise TypeError("a frontier is of scores")
    scores, usage = _judged(job.judge, rollouts, settings, job)
    _keep_scores(job.folder, rollouts, scores)
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    row: dict[str, float] = {"num_silent": int(np.isnan(scores).sum())}
    finish_evaluation(job.folder, row, started, num_tokens_generated=num_tokens, **total_costs([usage]))


def _keep_scores(folder: Path, rollouts: list[Rollout], scores: np.ndarray, kls: np.ndarray | None = None) -> None:
    """What win rates and regret are made of."""
    kept = {"scores": scores, "clusters": prompt_clusters(rollouts)} | ({} if kls is None else {"kl": kls})
    np.savez(folder / SAMPLE_SCORES, allow_pickle=False, **kept)


def _judged(
    spec: JudgeSpec, rollouts: list[Rollout], settings: Evaluation, job: SampledJob
) -> tuple[np.ndarray, Usage | None]:
    """A judge's scores [N] of rollouts, nan where it is silent, and what it was asked for them.

    Those of a model are kept in parts. An endpoint keeps its answers itself, and a function sees all rows at once.
    """
    judge = load_judge(spec, settings.batch_size, job.device)
    responses = _prompts(rollouts), _responses(rollouts)
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


class _Kls(NamedTuple):
    """KL(pi || pi_ref) along each sample of the policy [N], and KL(pi_ref || pi) along each of the reference's [M]."""

    along: np.ndarray
    beside: np.ndarray


def _policy_row(
    rollouts: list[Rollout], held_out: slice, job: SampledJob, settings: Evaluation
) -> tuple[dict[str, float], _Kls]:
    """What needs the policy's log-probs: of its samples on held-out prompts, and of held-out pairs; and all KLs.

    Policy and reference are not held at the same time, unless their heads are more than linear maps.
    """
    samples, both, temperature = rollouts[held_out], [*rollouts, *job.of_reference], settings.temperature
    sampled = _prompts(samples), _responses(samples)
    test = read_rows(job.logps / "test_pairs")
    pairs = {side: (test["prompt_ids"].to_pylist(), test[f"{side}_ids"].to_pylist()) for side in ("chosen", "rejected")}
    ref_chosen, ref_rejected = (float_column(test, f"ref_{side}_logp") for side in ("chosen", "rejected"))
    scored_with = ScoredWith(settings.batch_size, job.device, job.arithmetic, job.kept)
    with Scorer(job.policy, scored_with) as policy, Scorer(job.reference, scored_with) as reference:
        own = policy.logps(*sampled, temperature)
        chosen, rejected = (policy.logps(*pairs[side], 1.0) for side in ("chosen", "rejected"))
        kls = np.zeros((len(both), 2))
        if job.policy != job.reference:
            kls = divergences(policy, reference, _prompts(both), _responses(both), temperature)
        policy.release()
        ref = reference.logps(*sampled, temperature)
        if job.arithmetic != "float32":  # passes of other shapes, as those of the table, are rounded far apart
            ref_chosen, ref_rejected = (reference.logps(*pairs[side], 1.0) for side in ("chosen", "rejected"))
    row = k1_and_k3(own, ref, prompt_clusters(samples))
    row |= preference_accuracy(chosen, rejected, ref_chosen, ref_rejected)
    row |= demonstration_metrics(chosen, ref_chosen, clusters_of(pairs["chosen"][0]))
    gap = [sum(rollout.token_logps) for rollout in samples] - own
    row["logp_gap/max"] = float(np.abs(gap).max())
    return row, _Kls(kls[: len(rollouts), 0], kls[len(rollouts) :, 1])


def _group_row(
    rollouts: list[Rollout], scores: np.ndarray | None, kls: _Kls | None, job: SampledJob, part: slice
) -> dict[str, float]:
    """What is measured on every group of prompts: scores, lengths, and how far the policy is from the reference."""
    own, others = rollouts[part], list(job.of_reference)[part]
    row = sampled_metrics(own, None, None, None if scores is None else scores[part])
    if kls is not None:
        row |= divergence_metrics(kls.along[part], prompt_clusters(own), kls.beside[part], prompt_clusters(others))
    return row


def _in_group(key: str, group: str) -> str:
    """`KEY/GROUP`, and of a standard error `KEY/GROUP_stderr`; the key itself of held-out prompts, named ""."""
    plain = f"{key.removesuffix('_stderr')}/{group}" + ("_stderr" if key.endswith("_stderr") else "")
    return plain if group else key


def _prompts(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.prompt_ids for rollout in rollouts]


def _responses(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids for rollout in rollouts]
