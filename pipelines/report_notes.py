"""Notes of a report: what a reader of its tables has to know of the policies, their rewards and their training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.judge_notes import judge_notes
from pipelines.plan import SeedPlan, Trained
from prefarena.config import BestOfN, Comparison, LanguageTask, OnPolicyMethod
from prefarena.evaluation.best_of_n import kl_bound
from prefarena.mirror import bring
from prefarena.stage_files import METRICS, read_log
from prefarena.stages import Stage


def notes_on(config: Comparison, plans: list[SeedPlan]) -> list[str]:
    notes = []
    for plan in plans[:1]:
        base = plan.base.manifest()
        notes.append(f"The policy has {base['num_parameters']:,} parameters.")
        notes += [f"It trains on a slower path: {note}." for note in base["notes"]]
    notes += list(judge_notes(config, plans, _evaluation_rows(plans), _training_logs(plans)))
    notes += list(_reward_model_notes(plans))
    notes += list(dict.fromkeys(_fault_notes(plans)))  # stages that seeds share are told of once
    gaps = list(_largest_gaps(plans))
    if gaps:
        runs = f"{len(gaps)} on-policy run{'s' if len(gaps) > 1 else ''}"
        notes.append(
            f"The log-probs that generator and trainer gave any token of {runs} differ by at most "
            f"{max(gaps):.1e} nats (`logp_gap/max`)."
        )
    notes += _moving_reference_note(config)
    for entry in config.entries:
        if isinstance(entry.method, BestOfN):
            notes.append(_best_of_n_note(entry.name, entry.method.n, isinstance(config.task, LanguageTask)))
    if config.seeds_vary == "task":
        notes.append("Each seed is a different language, with its own reference policy and pairs.")
    elif len(config.seeds) > 1:
        notes.append("Seeds share the task, the reference policy and the pairs; they differ only in training.")
    return notes


def _evaluation_rows(plans: list[SeedPlan]) -> dict[Stage, dict[str, float]]:
    stages = [stage for plan in plans for stage in [plan.evaluation, *(t.evaluation for t in plan.trained)]]
    stages += [t.wins for plan in plans for t in plan.trained if t.wins]
    return {stage: stage.row() for stage in stages if stage.finished}


def _training_logs(plans: list[SeedPlan]) -> dict[Stage, list[dict[str, float]]]:
    trained = [t for plan in plans for t in plan.trained if isinstance(t.entry.method, OnPolicyMethod)]
    return {t.training: metric_rows(t) for t in trained if t.training is not None and t.training.finished}


def _reward_model_notes(plans: list[SeedPlan]) -> Iterator[str]:
    """One line per learned reward: how well it orders held-out pairs, and how well it is calibrated."""
    seen: dict[Stage, list[str]] = {}
    for trained in (one for plan in plans for one in plan.trained):
        if trained.reward_model is not None and trained.reward_model.finished:
            seen.setdefault(trained.reward_model, []).append(trained.entry.name)
    for stage, names in seen.items():
        quality = stage.manifest()["reward_model"]
        yield (
            f"Reward model {stage.label} of {', '.join(names)}, on {quality['num_pairs']} held-out pairs: accuracy "
            f"{quality['accuracy']:.1%} ± {quality['accuracy_stderr']:.1%}, log loss {quality['log_loss']:.3f} nats, "
            f"expected calibration error {quality['ece']:.3f}."
        )


def _fault_notes(plans: list[SeedPlan]) -> Iterator[str]:
    """Notes on faults that training recovered from: interruptions, damaged checkpoints, steps that were not numbers."""
    for stage in (
        stage for plan in plans for stage in [*plan.shared(), *(s for t in plan.trained for s in t.stages())]
    ):
        faults = stage.manifest().get("faults", []) if stage.finished else []
        resumed = [fault for fault in faults if fault["kind"] == "resumed"]
        if resumed:
            lost = sum(fault["steps_lost"] for fault in resumed)
            times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
            yield (
                f"{stage.kind} ({stage.label}) was interrupted {times} and resumed from its last checkpoint; at least "
                f"{lost} steps were repeated."
            )
        for fault in faults:
            if fault["kind"] == "damaged_checkpoint":
                yield f"{stage.kind} ({stage.label}): {fault['message']}."
    for trained in (trained for plan in plans for trained in plan.trained):
        skipped = max((row.get("steps_skipped", 0) for row in metric_rows(trained)), default=0)
        if skipped:
            yield (
                f"{trained.entry.name} (seed {trained.seed}) skipped {skipped:.0f} optimizer steps whose loss or "
                f"gradient was not finite."
            )


def _largest_gaps(plans: list[SeedPlan]) -> Iterator[float]:
    """The largest log-prob gap of a token, in each on-policy run whose generators held the trainer's weights."""
    for trained in (one for plan in plans for one in plan.trained):
        method, rows = trained.entry.method, metric_rows(trained)
        if isinstance(method, OnPolicyMethod) and method.training.mode == "synchronous" and rows:
            yield max(row.get("logp_gap/max", 0.0) for row in rows)


def _moving_reference_note(config: Comparison) -> list[str]:
    """A note on which KL is which, where training and tables use different references."""
    names = [
        entry.name
        for entry in config.entries
        if isinstance(entry.method, OnPolicyMethod) and entry.method.training.reference_every is not None
    ]
    if not names:
        return []
    return [
        f"{', '.join(names)}: the KL penalty is measured against a moving reference, and so are the KLs logged during "
        f"training (`kl_moving/…`), which are not compared with exact ones. Every KL in this report is measured "
        f"against the original reference."
    ]


def _best_of_n_note(name: str, n: int, exact: bool) -> str:
    """A note that best-of-n trains nothing, so there is no checkpoint, and every answer costs n."""
    measured = (
        "its distribution is computed from the reference's"
        if exact
        else f"its KL is not estimated but bounded, by log n - (n - 1) / n = {kl_bound(n):.2f} nats"
    )
    return (
        f"{name} trains no policy and has no checkpoint: each of its answers is the one of {n} reference samples with "
        f"the highest reward; "
        f"{measured}. Each answer costs {n} samples and their scores, here as in deployment; `wall` does not include "
        f"that cost."
    )


def metrics_file(trained: Trained) -> Path | None:
    """The log of an entry's training; none where it has no training."""
    if trained.training is None:
        return None
    path = trained.training.folder / METRICS
    bring(path)
    return path


def metric_rows(trained: Trained) -> list[dict[str, float]]:
    """The rows that an entry's training logged; none where it has no training or left no log."""
    path = metrics_file(trained)
    return [] if path is None else read_log(path)
