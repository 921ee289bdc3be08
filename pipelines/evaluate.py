"""Measure every policy on the same footing: `python -m pipelines.evaluate CONFIG`, or `prefarena evaluate`.

The enumerable language is measured exactly. Text is measured on held-out prompts, from vLLM samples that are scored
by the judge, and on held-out pairs. An evaluation stage holds `row.json` (the measures) and what win rates between
entries need.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from pipelines.annotate import ExactReference
from pipelines.plan import SeedPlan, model_of, response_limit, unique
from pipelines.progress import stage_line
from pipelines.train import start_generator
from prefarena.config import Comparison, Evaluation, LanguageTask
from prefarena.data.tables import read_rows
from prefarena.evaluation.enumeration import enumerate_responses
from prefarena.evaluation.exact import exact_metrics, frontiers, win_rates
from prefarena.evaluation.preferences import preference_accuracy
from prefarena.evaluation.sampled import prompt_clusters, response_logps, rollout_logps, sampled_metrics, win_rate
from prefarena.generation.interface import Sampling
from prefarena.judges.models import RewardModelJudge
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.records import Rollout
from prefarena.stages import Stage, write_json, write_manifest
from prefarena.tasks.language import EOS_ID, Language


def evaluate(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Run every evaluation that is not finished; training must be. Needs Ray."""
    work: dict[Stage, tuple[SeedPlan, str]] = {}
    for plan in plans:
        work[plan.evaluation] = (plan, model_of(plan.reference))
        work |= {trained.evaluation: (plan, model_of(trained.training)) for trained in plan.trained}
    waiting = {stage: found for stage, found in work.items() if not stage.finished}
    if not waiting:
        return
    with stage_line(console, f"evaluating {', '.join(stage.label for stage in unique(list(waiting)))}"):
        if isinstance(config.task, LanguageTask):
            _evaluate_exactly(config, waiting)
        else:
            _evaluate_from_samples(config, waiting, console)


# ------------------------------------------------------------------------------------ exact evaluation


def _evaluate_exactly(config: Comparison, waiting: dict[Stage, tuple[SeedPlan, str]]) -> None:
    import ray

    task = ray.remote(num_cpus=1)(evaluate_exactly)
    running = [
        task.remote(
            _language(plan), model, plan.pairs.folder, plan.logps.folder, stage.begin(), config.evaluation.win_matrix
        )
        for stage, (plan, model) in waiting.items()
    ]
    ray.get(running)


def _language(plan: SeedPlan) -> LanguageTask:
    if not isinstance(plan.task, LanguageTask):
        raise TypeError("only the enumerable language is evaluated exactly")
    return plan.task


def evaluate_exactly(task: LanguageTask, model: str, pairs: Path, logps: Path, folder: Path, keep_logps: bool) -> None:
    """Exact measures of a policy, its held-out preference accuracy, and its exact win rate over the reference."""
    started = time.perf_counter()
    language, reference = Language(task), ExactReference.load(pairs / "exact.npz")
    policy = enumerate_responses(load_policy(model), language.prompt_ids, task.response_limit, EOS_ID)
    row = exact_metrics(policy.logps, reference.ref_logps, reference.rewards, reference.covered, reference.lengths)
    wins = win_rates([policy.logps, reference.ref_logps], reference.rewards)
    row |= {"win_rate": float(wins.win_rate[0, 1]), "win_rate_stderr": float(wins.stderr[0, 1])}
    test = read_rows(logps / "test_pairs")
    rows = language.prompt_rows(test["prompt_ids"].to_pylist())
    chosen = policy.response_logps(rows, test["chosen_ids"].to_pylist())
    rejected = policy.response_logps(rows, test["rejected_ids"].to_pylist())
    row |= preference_accuracy(chosen, rejected, _float(test, "ref_chosen_logp"), _float(test, "ref_rejected_logp"))
    if keep_logps:
        np.save(folder / "logps.npy", policy.logps)
    _finish(folder, row, started)


def _float(table: Any, column: str) -> np.ndarray:
    return table[column].to_numpy().astype(np.float64)


def _finish(folder: Path, row: dict[str, float], started: float, **counts: int) -> None:
    write_json(folder / "row.json", {key: float(value) for key, value in row.items()})
    wall = time.perf_counter() - started
    write_manifest(folder, {"costs": {"wall_seconds": wall, "device_seconds": wall, **counts}})


def exact_frontier(plan: SeedPlan) -> dict[str, list[tuple[float, float]]]:
    """Points (KL, reward) of the optimal frontier by group of prompts."""
    exact = ExactReference.load(plan.pairs.folder / "exact.npz")
    limits = frontiers(exact.ref_logps, exact.rewards, exact.covered)
    return {group: [(float(kl), float(reward)) for kl, reward in limit.curve()] for group, limit in limits.items()}


def exact_optimum(plan: SeedPlan, kl_covered: float) -> dict[str, float]:
    """The measures of the best possible policy at a KL on the covered prompts, the same beta on all prompts."""
    exact = ExactReference.load(plan.pairs.folder / "exact.npz")
    limits = frontiers(exact.ref_logps, exact.rewards, exact.covered)
    inverse_temperature = limits["covered"].optimum_at(kl_covered).inverse_temperature
    logps = limits["all"].logps(inverse_temperature)
    row = exact_metrics(logps, exact.ref_logps, exact.rewards, exact.covered, exact.lengths, limits)
    wins = win_rates([logps, exact.ref_logps], exact.rewards)
    return row | {"win_rate": float(wins.win_rate[0, 1]), "win_rate_stderr": float(wins.stderr[0, 1])}


# ------------------------------------------------------------------------------ evaluation from samples


def _evaluate_from_samples(config: Comparison, waiting: dict[Stage, tuple[SeedPlan, str]], console: Console) -> None:
    import ray

    settings = config.evaluation
    generator = start_generator(config, next(iter(waiting.values()))[0], console)
    scorer = ray.remote(num_cpus=1, num_gpus=1 if config.resources.use_gpu else 0)(score_samples)
    running = []
    try:
        for stage, (plan, model) in waiting.items():
            prompts = held_out_prompts(plan, settings) * settings.samples_per_prompt
            sampling = Sampling(response_limit(plan.task), settings.temperature, settings.seed)
            generator.load_checkpoint(model, stage.key)
            started = time.perf_counter()
            rollouts = generator.generate(prompts, sampling, stage.key)
            seconds = time.perf_counter() - started
            if plan.judge is None:
                raise TypeError("a text task has a judge")
            paths = (model, model_of(plan.reference), model_of(plan.judge), plan.logps.folder, stage.begin())
            running.append(scorer.remote(rollouts, *paths, settings, seconds))
        ray.get(running)
    finally:
        generator.stop()


def held_out_prompts(plan: SeedPlan, settings: Evaluation) -> list[list[int]]:
    """The first held-out prompts in the order of their ids, which are hashes: a sample without a choice."""
    table = read_rows(plan.pairs.folder / "prompts")
    rows = [row["prompt_ids"] for row in table.to_pylist() if row["split"] == "test"]
    return rows[: settings.num_prompts]


def score_samples(
    rollouts: list[Rollout],
    model: str,
    reference: str,
    judge: str,
    logps: Path,
    folder: Path,
    settings: Evaluation,
    generation_seconds: float,
) -> None:
    """Measures of a policy from its samples, and its held-out preference accuracy. Runs in a Ray task."""
    started = time.perf_counter() - generation_seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows a task the GPUs that it was given
    policy, reference_policy = load_policy(model), load_policy(reference)
    for module in (policy, reference_policy):
        torch.nn.Module.to(module, device)
    pad_id = load_tokenizer(model).pad_token_id
    own = rollout_logps(policy, rollouts, pad_id, settings.batch_size, settings.temperature)
    ref = rollout_logps(reference_policy, rollouts, pad_id, settings.batch_size, settings.temperature)
    scores = RewardModelJudge(judge, settings.batch_size, device).score(
        [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    )
    row = sampled_metrics(rollouts, own, ref, scores)
    test = read_rows(logps / "test_pairs")
    prompts = test["prompt_ids"].to_pylist()
    chosen, rejected = (
        response_logps(policy, prompts, test[f"{side}_ids"].to_pylist(), pad_id, settings.batch_size)
        for side in ("chosen", "rejected")
    )
    row |= preference_accuracy(chosen, rejected, _float(test, "ref_chosen_logp"), _float(test, "ref_rejected_logp"))
    gap = [sum(rollout.token_logps) for rollout in rollouts] - own
    row["logp_gap/max"] = float(np.abs(gap).max())
    np.savez(folder / "scores.npz", scores=scores, clusters=prompt_clusters(rollouts))
    tokenizer = load_tokenizer(model)
    samples = [
        {"prompt": tokenizer.decode(r.prompt_ids), "response": tokenizer.decode(r.response_ids), "score": float(score)}
        for r, score in zip(rollouts[:20], scores, strict=False)
    ]
    write_json(folder / "samples.json", samples)
    _finish(folder, row, started, num_tokens_generated=sum(len(r.response_ids) for r in rollouts))


# ------------------------------------------------------------------------------------------- win rates


def pairwise_wins(plan: SeedPlan, stages: list[Stage]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates [K, K] between the policies of K evaluation stages (row beats column), and standard errors."""
    if isinstance(plan.task, LanguageTask):
        rewards = ExactReference.load(plan.pairs.folder / "exact.npz").rewards
        wins = win_rates([np.load(stage.folder / "logps.npy") for stage in stages], rewards)
        return wins.win_rate, wins.stderr
    arrays = [np.load(stage.folder / "scores.npz") for stage in stages]
    estimates = [[win_rate(a["scores"], a["clusters"], b["scores"], b["clusters"]) for b in arrays] for a in arrays]
    rates = np.array([[cell.mean for cell in row] for row in estimates])
    return rates, np.array([[cell.stderr for cell in row] for row in estimates])


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
