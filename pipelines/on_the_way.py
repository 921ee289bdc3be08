"""Policies on the way through training, measured from samples as the final one is: evaluations of their own.

A snapshot is a model under `snapshots/UPDATES/` of its training's stage. How many there are is known before any work,
and after how many updates each was kept when its training has ended. Where a training is so short that there are fewer
than were asked for, the last evaluations are of the same policy, which counts once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.frontier import kept_scores, regret_row
from pipelines.plan import SeedPlan, Trained, model_of
from prefarena.mirror import bring
from prefarena.stage_files import SNAPSHOTS
from prefarena.stages import Stage

#: What a trajectory's row has, and what it is called in the row of an evaluation from samples; the first that is there.
_NAMES = {
    "kl": ("kl_vocabulary", "kl"),
    "reward": ("judge_score",),
    "frontier_reward": ("frontier_reward",),
    "regret": ("regret",),
    "proxy_reward": ("proxy_reward",),
}
_PROXY = ("proxy_reward", "proxy_reward_stderr")
#: Rewards, and what their gains over the reference are called in its standard deviations.
_GAINS = {"reward": "standard_gain", "proxy_reward": "standard_proxy_gain"}


def snapshots_of(training: Stage) -> dict[int, Path]:
    """The policies that a finished training has kept on its way, by the updates done; the final one is the last."""
    bring(training.folder / SNAPSHOTS)
    kept = sorted((training.folder / SNAPSHOTS).glob("[0-9]*"))
    return {int(folder.name): folder for folder in kept} | {num_updates(training): Path(model_of(training))}


def num_updates(training: Stage) -> int:
    """The number of updates of a finished training, in the unit in which its snapshots are named."""
    return int(training.manifest()["costs"]["num_steps"])


def measured_on_the_way(trained: Trained, stage: Stage) -> tuple[int, Path] | None:
    """The policy, and its updates, that an evaluation during training measures; None for other evaluations."""
    if trained.training is None or stage not in trained.on_the_way:
        return None
    found, place = sorted(snapshots_of(trained.training).items()), trained.on_the_way.index(stage)
    return found[min(place, max(0, len(found) - 2))]


def sampled_trajectory(plan: SeedPlan, trained: Trained) -> list[dict[str, float]]:
    """Rows of the policy before training, of every snapshot in order, and of the final one; none without snapshots."""
    if trained.training is None or not any(stage.finished for stage in trained.on_the_way):
        return []
    final = trained.evaluation.row()
    start = {"kl": 0.0} | {key: final[f"reference_{key}"] for key in _PROXY if f"reference_{key}" in final}
    by_step = {0: _row(plan.evaluation.row()) | start}
    for stage in trained.on_the_way:
        found = measured_on_the_way(trained, stage)
        if found is not None and stage.finished:
            by_step[found[0]] = _row(stage.row() | regret_row(plan, stage))
    by_step[num_updates(trained.training)] = _row(final | regret_row(plan, trained.evaluation))
    rows = [{"step": step, **row} for step, row in sorted(by_step.items()) if "reward" in row]
    spreads = {"proxy_reward": final.get("reference_proxy_reward_sd", 0.0)}
    if spreads["proxy_reward"] > 0 and "reward" in by_step[0]:
        spreads["reward"] = float(np.nanstd(kept_scores(plan.evaluation).get("scores", np.zeros(1))))
    return [row | _standard_gains(row, by_step[0], spreads) for row in rows]


def _standard_gains(row: dict[str, float], start: dict[str, float], spreads: dict[str, float]) -> dict[str, float]:
    """Gains over the reference in the standard deviations of its own samples: in these, rewards can be compared.

    spreads: the standard deviations. Empty where one of the rewards is not known, or is the same for all samples.
    """
    known = [name for name in _GAINS if name in row and name in start and spreads.get(name, 0.0) > 0]
    if len(known) < len(_GAINS):
        return {}
    return {_GAINS[name]: (row[name] - start[name]) / spreads[name] for name in known}


def _row(row: dict[str, float]) -> dict[str, float]:
    """The part of a sampled evaluation's row that a trajectory shows, with standard errors."""
    found: dict[str, float] = {}
    for name, keys in _NAMES.items():
        key = next((key for key in keys if key in row), None)
        if key is not None:
            found[name] = row[key]
            found |= {f"{name}_stderr": row[f"{key}_stderr"]} if f"{key}_stderr" in row else {}
    return found
