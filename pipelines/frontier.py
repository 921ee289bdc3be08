"""The estimated frontier of a text task, and how far below it entries lie, from what evaluations kept."""

from __future__ import annotations

import numpy as np

from pipelines.plan import SeedPlan
from prefarena.evaluation.estimated_frontier import EstimatedFrontier
from prefarena.mirror import bring
from prefarena.stage_files import SAMPLE_SCORES
from prefarena.stages import Stage


def load_frontier(plan: SeedPlan) -> EstimatedFrontier | None:
    """Load the frontier; None where it is not estimated, or its scores could not be obtained."""
    if plan.frontier is None or not plan.frontier.finished:
        return None
    arrays = kept_scores(plan.frontier)
    return EstimatedFrontier(arrays["scores"], arrays["clusters"])


def frontier_points(plan: SeedPlan) -> list[tuple[float, float, float]]:
    """Points (KL, reward, standard error of the reward) as far as the estimate can be trusted."""
    frontier = load_frontier(plan)
    return [(point.kl, point.reward, point.stderr) for point in frontier.curve()] if frontier else []


def regret_row(plan: SeedPlan, evaluation: Stage) -> dict[str, float]:
    """`frontier_reward` at a policy's own KL and its `regret`, with their errors.

    Empty where there is no frontier, where it is not trusted as far as the entry is from the reference, and for
    policies whose KL is not known.
    """
    frontier, arrays = load_frontier(plan), kept_scores(evaluation)
    if frontier is None or "kl" not in arrays:
        return {}
    known = ~np.isnan(arrays["scores"])
    both = np.isin(frontier.prompts, arrays["clusters"][known])
    if not both.all():  # a prompt to which the entry has no scored answer is no part of its regret
        frontier = frontier.of(frontier.prompts[both])
    means = [
        np.array([values[at & (arrays["clusters"] == prompt)].mean() for prompt in frontier.prompts])
        for values, at in ((arrays["kl"], np.ones_like(known)), (arrays["scores"], known))
    ]
    point, regret = frontier.optimum_at(float(means[0].mean())), frontier.regret(*means)
    if point is None or regret is None:
        return {}
    row = {"frontier_reward": point.reward, "frontier_reward_stderr": point.stderr}
    return row | {"regret": regret.mean, "regret_stderr": regret.stderr}


def kept_scores(stage: Stage) -> dict[str, np.ndarray]:
    """What an evaluation from samples kept of each: scores, prompts and KLs; empty where a judge gives no scores."""
    path = stage.folder / SAMPLE_SCORES
    bring(path)
    if not path.is_file():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)
