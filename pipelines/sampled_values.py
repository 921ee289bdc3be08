"""Models' values of an evaluation's samples, part by part: log-probs of policy and reference, and scores.

The Ray task that makes measures of them computes what is missing (`sampled.score_samples`). Before it, several tasks
may each compute a share of all parts (`start_filling`), which it then finds. Parts are the same, whoever computes them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from pipelines.kept_rollouts import KeptValues, Share, Wanted, training_of
from pipelines.policy_scores import ScoredWith, Scorer, along
from prefarena.config import Evaluation
from prefarena.data.tables import read_rows
from prefarena.evaluation.best_of_n import pick_best
from prefarena.judges.silence import check_scores
from prefarena.judges.spec import Judge, JudgeSpec, load_judge, usage_of
from prefarena.judges.usage import Usage
from prefarena.modeling.arithmetic import Arithmetic, named
from prefarena.records import Rollout
from prefarena.settings.judges import is_model

#: The reward that best-of-n picks by, the judge, the reward that was learned from, and policy and reference themselves.
Kind = Literal["reward", "judge", "proxy", "policy"]


@dataclass(frozen=True)
class SampledJob:
    """One evaluation from samples, as it is sent to a Ray task.

    judge: none where the policy is compared with the reference rather than scored (pipelines/wins.py); its responses
    are kept then. best_of: samples of which the one that `reward` scores highest is kept; 1 for a policy, which keeps
    them all. device: of the models that score. arithmetic: of the policies; judges name theirs. kept: where log-probs
    and scores are kept until it has ended. of_reference: what the reference answers to the same prompts, for the
    forward KL; without it there is none. groups: behind the held-out prompts, names of groups of other prompts and the
    number of prompts in each, all with as many samples; they are measured apart. is_snapshot: of a policy on the way,
    of which a trajectory needs scores and the KL alone: no held-out pairs are scored, and it has no `of_reference`.
    proxy: the reward that the policy learned from, which is not the judge. kept_for_all: where values of the reference
    that the evaluations of all policies want are kept until they have ended.
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
    is_snapshot: bool = False
    proxy: JudgeSpec | None = None
    kept_for_all: Path | None = None

    def values(self) -> KeptValues:
        """Where models' values are kept while this evaluation is under way."""
        return KeptValues(self.kept, self.kept_for_all)

    def parts(self, num_samples: int, settings: Evaluation) -> dict[str, slice]:
        """Where the samples of each group lie among `num_samples` of them; those on held-out prompts are named ""."""
        sizes = {name: number * settings.samples_per_prompt for name, number in self.groups}
        found, start = {"": slice(0, num_samples - sum(sizes.values()))}, num_samples - sum(sizes.values())
        for name, size in sizes.items():
            found[name], start = slice(start, start + size), start + size
        return found


def scored_by_proxy(rollouts: list[Rollout], job: SampledJob, settings: Evaluation) -> list[Rollout]:
    """What the reward that a policy learned from scores: its samples, and the reference's on held-out prompts."""
    held_out = job.parts(len(rollouts), settings)[""]
    return [*rollouts, *list(job.of_reference)[held_out]]


def prompts_and_responses(rollouts: Sequence[Rollout]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the responses, [N] each."""
    return [rollout.prompt_ids for rollout in rollouts], [rollout.response_ids for rollout in rollouts]


# --------------------------------------------------------------------------------------------- judges


class _Scores:
    """A judge that is a model; its weights are read for the first part that is missing."""

    def __init__(self, spec: JudgeSpec, settings: Evaluation, device: str) -> None:
        self._spec, self._batch_size, self._device = spec, settings.batch_size, device
        self._judge: Judge | None = None

    def wanted(self, rollouts: list[Rollout]) -> Wanted:
        spec = self._spec
        training = training_of(spec.path) if spec.path else None
        given_by = ["scores", spec.settings.model_dump(mode="json"), training, self._batch_size, self._device]
        return Wanted([*given_by, *named(spec.arithmetic)], *prompts_and_responses(rollouts), self._score)

    def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        if self._judge is None:
            self._judge = load_judge(self._spec, self._batch_size, self._device)
        return self._judge.score(prompts, responses)


def judged(
    spec: JudgeSpec, rollouts: list[Rollout], settings: Evaluation, job: SampledJob
) -> tuple[np.ndarray, Usage | None]:
    """A judge's scores [N] of rollouts, nan where it is silent, and what it was asked for them.

    Those of a model are kept in parts. An endpoint keeps its answers itself, and a function sees all rows at once.
    Raises JudgeError where it is silent about more of them than its settings allow.
    """
    usage = None
    if is_model(spec.settings):
        scores = job.values().complete(_Scores(spec, settings, job.device).wanted(rollouts))
    else:
        judge = load_judge(spec, settings.batch_size, job.device)
        scores = judge.score(*prompts_and_responses(rollouts))
        usage = usage_of(judge)
    check_scores(scores, spec)
    return scores, usage


# ------------------------------------------------------------------------------------------- policies


class Policies:
    """The policy of an evaluation and its reference, not held at the same time unless they are small, or their heads
    are more than linear maps. As a context it lets go of their weights in the end.
    """

    def __init__(self, job: SampledJob, settings: Evaluation) -> None:
        scored_with = ScoredWith(settings.batch_size, job.device, job.arithmetic)
        self._policy = Scorer(job.policy, scored_with)
        self._reference = self._policy if job.policy == job.reference else Scorer(job.reference, scored_with)
        self._job, self._temperature = job, settings.temperature

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for scorer in (self._policy, self._reference):
            scorer.__exit__(*error)

    @cached_property
    def pairs(self) -> DistinctResponses:
        """The responses of the held-out pairs."""
        return distinct_responses(held_out_pairs(self._job))

    def wanted(self, rollouts: list[Rollout], num_held_out: int) -> dict[str, Wanted]:
        """Of held-out pairs' distinct responses (`distinct_responses`) log-probs by both policies, `pairs` and
        `ref_pairs`; `along` all samples what `along_samples` has. Where the policy is the reference, `ref_pairs` alone,
        and in place of `along` its `own` log-probs of the first `num_held_out` samples, which takes no reference
        beside it. Of a snapshot `along` alone.

        The reference scores pairs where passes of other shapes, as those of the table, are rounded far apart.
        """
        job, temperature, found = self._job, self._temperature, dict[str, Wanted]()
        if job.is_snapshot:
            return {"along": along(self._policy, self._reference, *prompts_and_responses(rollouts), temperature)}
        pairs = self.pairs
        if job.policy == job.reference:
            found["own"] = self._policy.logps(*prompts_and_responses(rollouts[:num_held_out]), temperature)
        else:
            found["pairs"] = self._policy.logps(pairs.prompts, pairs.responses, 1.0)
            both = prompts_and_responses([*rollouts, *job.of_reference])
            found["along"] = along(self._policy, self._reference, *both, temperature)
        if job.policy == job.reference or job.arithmetic != "float32":
            of_reference = self._reference.logps(pairs.prompts, pairs.responses, 1.0)
            found["ref_pairs"] = replace(of_reference, is_shared=True)
        return found


@dataclass(frozen=True)
class DistinctResponses:
    """N responses, each with its prompt, and where among them those of pairs are: `chosen` and `rejected` [P]."""

    prompts: list[list[int]]
    responses: list[list[int]]
    chosen: np.ndarray
    rejected: np.ndarray


def distinct_responses(pairs: pa.Table) -> DistinctResponses:
    """The responses of pairs, each once: of pairs that are drawn, many have a response in common."""
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    columns = [pairs[name].to_pylist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    rows = [
        [places.setdefault((tuple(prompt), tuple(response)), len(places)) for response in responses]
        for prompt, *responses in zip(*columns, strict=True)
    ]
    sides = np.array(rows, np.int64).reshape(-1, 2)
    prompts, responses = [list(prompt) for prompt, _ in places], [list(response) for _, response in places]
    return DistinctResponses(prompts, responses, sides[:, 0], sides[:, 1])


def held_out_pairs(job: SampledJob) -> pa.Table:
    """The held-out pairs, with the reference's log-probs as they were computed for training."""
    return read_rows(job.logps / "test_pairs")


# ---------------------------------------------------------------------------------------------- ahead


@dataclass(frozen=True)
class Filled:
    """The cost of values computed ahead by a task: its seconds, and the phase of the evaluation that it belongs to."""

    phase: int
    seconds: float


def seconds_of(filled: Sequence[Filled]) -> tuple[float, float]:
    """The seconds that phases took one after another, and those of all tasks together."""
    longest: dict[int, float] = {}
    for one in filled:
        longest[one.phase] = max(longest.get(one.phase, 0.0), one.seconds)
    return sum(longest.values()), sum(one.seconds for one in filled)


def start_filling(
    rollouts: Any, job: SampledJob, settings: Evaluation, kinds: Sequence[Kind], options: dict[str, Any], number: int
) -> list[Any]:
    """Start `number` Ray tasks, with these options, that each compute a share of the values of these kinds.

    rollouts: a reference to them. Returns the tasks, each of which ends in a `Filled`; none where one task is to
    compute all. Which samples a judge is asked about hangs on what the reward says, so they come in two phases, and in
    none where every task would have to ask an endpoint or a function for it.
    """
    import ray

    asked = [kind for kind in kinds if _computed_by_a_model(kind, job)]
    if number == 1 or not asked or not (job.reward is None or is_model(job.reward.settings)):
        return []
    task, tasks = ray.remote(**options)(fill_share), list[Any]()
    phases = [tuple(kind for kind in asked if (kind == "reward") == first) for first in (True, False)]
    for phase, own in enumerate(phases):
        before = tuple(tasks)
        shares = [Share(place, number) for place in range(number)] if own else []
        tasks += [task.remote(rollouts, job, settings, own, phase, share, *before) for share in shares]
    return tasks


def _computed_by_a_model(kind: Kind, job: SampledJob) -> bool:
    if kind == "policy":
        return job.reward is None  # nobody knows the log-probs of best-of-n
    spec = {"reward": job.reward, "judge": job.judge, "proxy": job.proxy}[kind]
    return spec is not None and is_model(spec.settings)


def fill_share(
    rollouts: list[Rollout],
    job: SampledJob,
    settings: Evaluation,
    kinds: Sequence[Kind],
    phase: int,
    share: Share,
    *_: Filled,
) -> Filled:
    """Compute a share of the models' values. Runs in a Ray task; the last arguments are those of the phase before."""
    started, kept = time.perf_counter(), job.values()
    if "reward" in kinds and job.reward is not None:
        share = kept.fill([_Scores(job.reward, settings, job.device).wanted(rollouts)], share)
    elif job.reward is not None:
        rollouts = best_of(rollouts, judged(job.reward, rollouts, settings, job)[0], job)
    if "judge" in kinds and job.judge is not None:
        share = kept.fill([_Scores(job.judge, settings, job.device).wanted(rollouts)], share)
    if "proxy" in kinds and job.proxy is not None:
        scored = scored_by_proxy(rollouts, job, settings)
        share = kept.fill([_Scores(job.proxy, settings, job.device).wanted(scored)], share)
    if "policy" in kinds:
        with Policies(job, settings) as policies:
            num_held_out = job.parts(len(rollouts), settings)[""].stop
            kept.fill(policies.wanted(rollouts, num_held_out).values(), share)
    return Filled(phase, time.perf_counter() - started)


def best_of(rollouts: list[Rollout], ranking: np.ndarray, job: SampledJob) -> list[Rollout]:
    """The sample that ranks highest among every `job.best_of` samples."""
    return [rollouts[index] for index in pick_best(ranking, job.best_of)]
