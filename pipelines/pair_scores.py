"""Whether training pairs have the scores of both responses that some methods learn from (`Pairwise.needs_scores`).

The scores come with the pairs: those of the data, of the judge that labelled drawn pairs, or the language's reward.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from pipelines.asked_for import needs_shared
from pipelines.plan import SeedPlan, Trained
from prefarena.config import Comparison, OffPolicyMethod
from prefarena.data.tables import column_names, read_rows
from prefarena.errors import UserError
from prefarena.mirror import shown
from prefarena.records import PAIR_SCORES
from prefarena.settings.off_policy import Pairwise
from prefarena.stages import Stage


def learners_from_scores(config: Comparison) -> list[str]:
    """The entries whose methods need scores, as the subject of a sentence."""
    return [f"entry {e.name!r} (kind: {e.method.kind})" for e in config.entries if _needs_scores(e.method)]


def check_pair_scores(config: Comparison, plans: list[SeedPlan]) -> None:
    """Raise UserError where finished stages have training pairs without the scores that an entry learns from.

    Stages may have been finished before pairs had scores: their addresses are what they were, as all else in them is.
    """
    learners = learners_from_scores(config)
    for plan in plans if learners else []:
        stages = [stage for trained in plan.trained for stage in _stages_of(plan, trained) if stage.finished]
        old = [stage.folder for stage in dict.fromkeys(stages) if not _has_scores(stage.folder)]
        if old:
            raise UserError(
                f"{learners[0]} learns from scores of both responses, but an earlier version made these stages "
                f"without them: {', '.join(map(shown, old))}; delete them, and they will be made again with the scores"
            )
        if plan.pairs.finished:
            _check_rows(plan.pairs.folder / "train_pairs", learners[0])


def _needs_scores(method: object) -> bool:
    return isinstance(method, Pairwise) and method.needs_scores


def _stages_of(plan: SeedPlan, trained: Trained) -> list[Stage]:
    """The stages whose tables carry the scores to a training run; none if it needs no scores."""
    method = trained.entry.method
    if not isinstance(method, OffPolicyMethod) or not _needs_scores(method):
        return []
    arithmetic = method.training.precision
    shared = [plan.shared_lengths[arithmetic]] if needs_shared(method) else []
    return [plan.pairs, plan.scored[arithmetic], *shared]


def _has_scores(folder: Path) -> bool:
    return set(PAIR_SCORES) <= set(column_names(folder / "train_pairs"))


def _check_rows(pairs: Path, learner: str) -> None:
    table = read_rows(pairs, list(PAIR_SCORES))
    has_both = pc.and_(*(pc.is_finite(pc.fill_null(table[name], float("nan"))) for name in PAIR_SCORES))
    missing = table.num_rows - (pc.sum(has_both).as_py() or 0)
    if missing:
        raise UserError(
            f"{learner} learns from scores of both responses, and {missing:,} of {table.num_rows:,} training pairs "
            f"have none; add the scores to every row of task.data, or remove the rows without them"
        )
