"""An entry's win rate against the reference at equal length, from what evaluations of text kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.plan import SeedPlan, Trained
from prefarena.evaluation.length_control import Answers, Pairs, all_pairs, win_rate_at_equal_length
from prefarena.evaluation.pairwise import pair_values
from prefarena.mirror import bring
from prefarena.report.samples import SAMPLES_FILE
from prefarena.stage_files import GAMES, SAMPLE_SCORES
from prefarena.stages import Stage


def equal_length_row(plan: SeedPlan, trained: Trained) -> dict[str, float]:
    """`win_rate_at_equal_length` and its error; empty where an evaluation kept no samples, or no pair has a verdict."""
    lengths = [_lengths(stage) for stage in (trained.evaluation, plan.evaluation)]
    if any(found is None for found in lengths):
        return {}
    own, other = (np.asarray(found) for found in lengths)
    if trained.wins is not None:
        games = _arrays(trained.wins.folder / GAMES)
        values = pair_values(games["first"], games["second"])
        known = ~np.isnan(values)
        pairs = Pairs(values[known], (own - other)[known], games["clusters"][known])
    else:
        scores = [_arrays(stage.folder / SAMPLE_SCORES) for stage in (trained.evaluation, plan.evaluation)]
        pairs = all_pairs(
            *(Answers(one["scores"], size, one["clusters"]) for one, size in zip(scores, (own, other), strict=True))
        )
    rate = win_rate_at_equal_length(pairs)
    if np.isnan(rate.mean):
        return {}
    return {"win_rate_at_equal_length": rate.mean, "win_rate_at_equal_length_stderr": rate.stderr}


def _lengths(stage: Stage) -> np.ndarray | None:
    """The lengths of all samples [N], in tokens and in order; None where an earlier version evaluated."""
    path = stage.folder / SAMPLES_FILE
    bring(path)
    return pq.read_table(path, columns=["num_tokens"])["num_tokens"].to_numpy() if path.is_file() else None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    bring(path)
    with np.load(path) as arrays:
        return dict(arrays)
