"""Win rates by a pairwise judge, which sees every policy's samples with the reference's, in both orders.

A `wins` stage holds `row.json`, and `games.npz` with what the judge said of every pair.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from pipelines.claims import settle
from pipelines.exact import finish_evaluation
from pipelines.jobs import judge_spec
from pipelines.plan import SeedPlan, Trained
from pipelines.progress import fail, stage_line
from prefarena.cluster.waiting import Failed, outcomes_within
from prefarena.config import Comparison
from prefarena.evaluation.pairwise import pairwise_metrics
from prefarena.evaluation.sampled import clusters_of
from prefarena.judges.spec import JudgeSpec, load_comparer
from prefarena.judges.usage import total_costs
from prefarena.mirror import bring, workspace
from prefarena.records import Rollout
from prefarena.stage_files import GAMES, RESPONSES
from prefarena.stages import Stage, write_text


@dataclass(frozen=True)
class WinsJob:
    """The comparison of one policy with the reference, as it is sent to a Ray task.

    own, reference: the folders of their evaluations.
    """

    judge: JudgeSpec
    own: Path
    reference: Path
    folder: Path


def judge_wins(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Finish or fail the stage of wins of every entry that was evaluated. Needs Ray."""
    wanted = {
        trained.wins.folder: (trained.wins, plan, trained)
        for plan in plans
        for trained in plan.trained
        if trained.wins is not None and not trained.failure
    }

    def do(waiting: list[tuple[Stage, SeedPlan, Trained]]) -> None:
        import ray

        task = ray.remote(num_cpus=1)(compare_pairs)
        what = f"comparing {', '.join(stage.label for stage, _, _ in waiting)} with the reference, pair by pair"
        with stage_line(console, what, "verdicts of the judge"):
            jobs = [wins_job(config, plan, trained, stage.begin()) for stage, plan, trained in waiting]
            outcomes = outcomes_within([task.remote(job) for job in jobs], config.resources.task_timeout_s, what)
            for (stage, _, _), outcome in zip(waiting, outcomes, strict=True):
                if isinstance(outcome, Failed):
                    fail(stage, outcome.reason, console)

    settle(console, wanted, do)


def wins_job(config: Comparison, plan: SeedPlan, trained: Trained, folder: Path) -> WinsJob:
    """The comparison of an entry with the reference of its seed."""
    judge = judge_spec(plan, config.judge, None)
    return WinsJob(judge, trained.evaluation.folder, plan.evaluation.folder, folder)


def compare_pairs(job: WinsJob) -> None:
    """Measures of a policy's responses against the reference's, pair by pair on equal prompts. Runs in a Ray task."""
    started = time.perf_counter()
    workspace(job.folder)
    own, other = read_responses(job.own), read_responses(job.reference)
    prompts = [prompt for prompt, _ in own]
    if prompts != [prompt for prompt, _ in other]:
        raise ValueError("win rates are paired by prompt, but the two policies answered different prompts")
    comparer = load_comparer(job.judge)
    games = comparer.compare(prompts, [response for _, response in own], [response for _, response in other])
    clusters = clusters_of(prompts)
    np.savez(job.folder / GAMES, first=games.first, second=games.second, asked=games.asked, clusters=clusters)
    row = pairwise_metrics(games.first, games.second, games.asked, clusters)
    finish_evaluation(job.folder, row, started, **total_costs([comparer.usage]))


def write_responses(folder: Path, rollouts: list[Rollout]) -> None:
    """Keep an evaluation's responses, in order, for `compare_pairs`."""
    rows = [[rollout.prompt_ids, rollout.response_ids] for rollout in rollouts]
    write_text(folder / RESPONSES, json.dumps(rows))


def read_responses(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of an evaluation, as `write_responses` left them."""
    bring(folder / RESPONSES)
    return [tuple(row) for row in json.loads((folder / RESPONSES).read_text(encoding="utf-8"))]


def reference_column(rows: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates [K + 1, K + 1] and errors of the reference and K entries, from the entries' rows.

    A pairwise judge compares entries with the reference alone: cells between two entries are nan.
    """
    number = len(rows) + 1
    rates, errors = np.full((number, number), np.nan), np.full((number, number), np.nan)
    np.fill_diagonal(rates, 0.5)
    np.fill_diagonal(errors, 0.0)
    for place, row in enumerate(rows, start=1):
        rates[place, 0] = row.get("win_rate", np.nan)
        rates[0, place] = 1 - rates[place, 0]
        errors[place, 0] = errors[0, place] = row.get("win_rate_stderr", np.nan)
    return rates, errors
