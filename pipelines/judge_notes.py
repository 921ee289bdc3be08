"""Notes on the judges in a report: which they are, how often they were silent, and how many calls were paid for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.plan import SeedPlan, Trained
from prefarena.config import (
    ClassifierJudge,
    Comparison,
    EndpointJudge,
    EvaluationJudge,
    FunctionJudge,
    LanguageTask,
    PairwiseJudge,
)
from prefarena.stages import Stage


def judge_notes(
    config: Comparison,
    plans: list[SeedPlan],
    rows: dict[Stage, dict[str, float]],
    logs: dict[Stage, list[dict[str, Any]]],
) -> Iterator[str]:
    """Notes for the report. rows: of finished evaluations; logs: metric rows of finished on-policy training."""
    if not isinstance(config.task, LanguageTask):
        if plans[0].pairs != plans[0].data:
            yield f"Pairs: {'; '.join(plans[0].pairs.manifest()['data']['notes'])}."
        yield _source(config, plans[0])
        if isinstance(config.judge, EndpointJudge | FunctionJudge | ClassifierJudge):
            yield from _silent(config.judge, plans, rows)
        if isinstance(config.judge, PairwiseJudge):
            yield from _pairs(plans, rows)
    yield from _silent_rewards(plans, rows, logs)
    yield from _calls([*rows, *logs])


def _source(config: Comparison, plan: SeedPlan) -> str:
    if isinstance(config.judge, PairwiseJudge):
        return (
            f"Win rates come from {config.judge.model}, a judge that compared each response with the reference's in "
            f"both orders. A pair counts as won or lost if both orders agree, and as half a win if they disagree or "
            f"either is a tie. This judge gives no scores, and entries are not compared with each other."
        )
    if plan.judge is None:
        return f"Judge scores and win rates come from the judge `{config.judge.kind}` set in the config."
    quality = plan.judge.manifest()["reward_model"]
    return (
        "Judge scores and win rates come from a reward model trained on pairs that no entry was trained on. It ranks "
        f"{quality['accuracy']:.1%} ± {quality['accuracy_stderr']:.1%} of the held-out pairs as people did "
        f"(chance is 50 %), with a log loss of {quality['log_loss']:.3f} nats (chance is 0.693) and an expected "
        f"calibration error of {quality['ece']:.3f}; read scores and win rates with that in mind."
    )


def _silent(judge: EvaluationJudge, plans: list[SeedPlan], rows: dict[Stage, dict[str, float]]) -> Iterator[str]:
    """A note on how many responses of each policy got no score."""
    measured = {plan.evaluation: "the reference" for plan in plans}
    measured |= {t.evaluation: _name(t, plans) for plan in plans for t in plan.trained}
    found = [
        f"{rows[stage]['num_silent']:.0f} of {rows[stage]['num_silent'] + rows[stage]['num_judged']:.0f} of {name}"
        for stage, name in measured.items()
        if stage in rows and rows[stage].get("num_silent")
    ]
    if found:
        kind = "readable" if isinstance(judge, EndpointJudge) else "finite"
        yield (
            f"Responses for which the judge gave no {kind} score: {', '.join(found)}. They are left out of judge "
            "scores, and pairs that contain one are left out of win rates."
        )
    elif isinstance(judge, EndpointJudge):
        yield "The judge gave every response a readable score."


def _pairs(plans: list[SeedPlan], rows: dict[Stage, dict[str, float]]) -> Iterator[str]:
    """Notes on how far each entry's win rate can be trusted."""
    for trained in (t for plan in plans for t in plan.trained):
        row = rows.get(trained.wins, {}) if trained.wins else {}
        if not row:
            continue
        parts = [f"{row['num_pairs']:.0f} pairs with a verdict, {row['num_silent_pairs']:.0f} without, left out"]
        if row["num_identical"]:
            parts.append(f"{row['num_identical']:.0f} of equal texts, which count as ties")
        if "position_bias" in row:
            error = row.get("position_bias_stderr")
            parts.append(
                f"position bias {row['position_bias']:+.3f}{'' if error is None else f' ± {error:.3f}'}, both orders "
                f"agree on {row['order_agreement']:.1%}"
            )
        yield f"{_name(trained, plans)} against the reference: {'; '.join(parts)}."


def _silent_rewards(
    plans: list[SeedPlan], rows: dict[Stage, dict[str, float]], logs: dict[Stage, list[dict[str, Any]]]
) -> Iterator[str]:
    for trained in (t for plan in plans for t in plan.trained):
        name = _name(trained, plans)
        log = logs.get(trained.training, []) if trained.training else []
        silent = sum(row.get("reward/num_silent", 0) for row in log)
        if silent:
            yield f"{name}: {silent:.0f} rollouts got no usable reward and were not learned from."
        picked = rows.get(trained.evaluation, {}).get("num_silent_rewards", 0)
        if picked:
            yield f"{name}: {picked:.0f} samples got no usable reward, and were picked only if no other had one."


def _calls(stages: list[Stage]) -> Iterator[str]:
    costs = [stage.manifest().get("costs", {}) for stage in stages]
    paid, reused, torn, plain = (
        sum(cost.get(f"num_judge_calls{kind}", 0) for cost in costs)
        for kind in ("", "_reused", "_torn", "_unstructured")
    )
    if plain:
        yield f"The server refused structured output: {plain:,} answers were requested as plain text."
    if paid or reused:
        cut = f" In the stored judge calls, {torn} lines were cut off, and were requested again." if torn else ""
        yield f"Judge endpoints answered {paid:,} requests; {reused:,} answers came from stored calls.{cut}"


def _name(trained: Trained, plans: list[SeedPlan]) -> str:
    return trained.entry.name if len(plans) == 1 else f"{trained.entry.name} (seed {trained.seed})"
