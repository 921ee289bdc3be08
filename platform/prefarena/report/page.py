"""The report of a comparison: report.md with its figures, for whoever must decide which method to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefarena.report.abilities import TITLE, abilities_table
from prefarena.report.against import against_table
from prefarena.report.curves import curve_figures
from prefarena.report.equal_kl import equal_kl_table
from prefarena.report.findings import compared, data_lines, findings, limits
from prefarena.report.label_efficiency import measured_table, needed_table
from prefarena.report.label_plots import labels_figure
from prefarena.report.leakage import leakage, leakage_tables
from prefarena.report.measures import coverage_table, divergence_table
from prefarena.report.online import online_table
from prefarena.report.overoptimisation import law_table
from prefarena.report.plots import FRONTIER_NOTE, drift_figure, expected_best_figure, reward_kl_figure
from prefarena.report.proxies import NOTE, proxy_figure, proxy_table
from prefarena.report.proxies import TITLE as PROXIES
from prefarena.report.results import EntryResult, Results
from prefarena.report.sensitivity import sensitivity_table
from prefarena.report.style import write_figure
from prefarena.report.tables import Table, cost_table, main_table, win_table
from prefarena.report.trajectories import (
    MOST_PANELS,
    agreement_summary,
    agreement_table,
    estimated_figure,
    how_measured,
    judged_while_trained,
    measured_on_the_way,
    rollout_rows,
    summary_table,
    trajectory_figure,
    trajectory_table,
)
from prefarena.report.tuning import expected_best_text, tuning_text
from prefarena.report.tuning_tables import budget_table, chosen_table
from prefarena.report.whole_costs import whole_cost_table
from prefarena.stages import write_text

_WIDEST_WIN_MATRIX = 12


def write_report(results: Results, folder: str | Path) -> Path:
    """Write report.md and figures/ (PNG and SVG) into `folder`; returns the path of report.md.

    Relative paths of metrics in `results.curves` are taken from `folder`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    sections = [
        f"# {results.name}\n\n{compared(results)}\n",
        _listing("In short", findings(results)),
        _section("Results", main_table(results)),
        _section("Distance from the reference", divergence_table(results)),
        _section("With pairs and without", coverage_table(results)),
        _section("Where pairs came from", online_table(results)),
        *_sweep(results, target),
        _figure("Reward and KL", _reward_kl_text(results), target, reward_kl_figure(results), "reward_kl"),
        *_labels(results, target),
        *_through_training(results, target),
        _section("Laws of over-optimisation", law_table(results)),
        _wins(results),
        _section(TITLE, abilities_table(results)),
        *_tuning(results, target),
        *_curves(results, target),
        _section("What each method cost", whole_cost_table(results)),
        _section("Costs by stage", cost_table(results)),
        _listing("Data", data_lines(results)),
        _listing("Notes and limits", limits(results)),
        _listing("Versions", [f"{name} {version}" for name, version in results.versions.items()]),
        _reproduce(results),
    ]
    page = target / "report.md"
    write_text(page, "\n".join(section for section in sections if section))
    return page


def _sweep(results: Results, folder: Path) -> list[str]:
    """Tables and plot of a sweep: KL at equal gain, without pairs and with them."""
    if not results.is_sweep or not results.exact:
        return []
    sections = []
    for measure, where in (("kl/uncovered", "without"), ("kl/covered", "with")):
        found = leakage(results, measure)
        if found is not None:
            title = f"KL on prompts {where} pairs, at equal gain on prompts with pairs"
            sections += [_section(table.title, table) for table in leakage_tables(found, title)]
    if (table := against_table(results)) is not None:
        sections.append(_section(table.title, table))
    if not sections:
        sections.append(
            "## At equal gain\n\nThe methods' grids have no range of gains in common, so they cannot be compared at "
            "equal gain.\n"
        )
    figure = drift_figure(results)
    text = "Each line is one method over its grid of settings: means over seeds; bars are one standard error."
    return [*sections, _figure("Drift against gain", text, folder, figure, "drift")]


def _reward_kl_text(results: Results) -> str:
    if not results.exact:
        return (
            "Left: each policy's score and its distance from the reference. Right: its win rate against the "
            "reference; the line is at one half." + (FRONTIER_NOTE if results.estimated_frontier else "")
        )
    return (
        "Left: no policy can lie above the frontier, π* ∝ π_ref·exp(r/β); the vertical distance to it is the regret. "
        "Right: how far each policy moves on prompts without pairs. Small open marks are seeds."
    )


def _figure(title: str, text: str, folder: Path, figure: Any, name: str) -> str:
    write_figure(figure, folder / "figures", name)
    return f"## {title}\n\n{text}\n\n![{title}](figures/{name}.png)\n\n[SVG](figures/{name}.svg)\n"


def _labels(results: Results, folder: Path) -> list[str]:
    figure, measured = labels_figure(results), measured_table(results)
    if figure is None or measured is None:
        return []
    text = "One line for each method; means over seeds, bars are one standard error."
    sections = [_figure("By number of labelled pairs", text, folder, figure, "labels"), f"{measured.markdown()}"]
    needed = needed_table(results)
    return [*sections, *([_section(needed.title, needed)] if needed else [])]


def _through_training(results: Results, folder: Path) -> list[str]:
    """Policies through training: what was measured, and where nothing is exact what training logged of its rollouts."""
    sections = [] if results.exact else _rollouts(results, folder)
    entries = measured_on_the_way(results)
    if not entries:
        return sections
    text = (
        f"{how_measured(results)}: policies before, during and after training, one line for each seed. Solid: the gold "
        "reward; dashed: the reward that the policy is trained on. Where the dashed line rises and the solid one does "
        "not follow, the reward is over-optimised. Dotted: the law fitted to the gold reward, where there are four "
        "policies or more."
    )
    if not results.exact:
        text = f"{how_measured(results)}: policies before, during and after training, one line for each seed."
    name = "through_training" if results.exact else "on_the_way"
    title = "Reward and KL through training" if results.exact else "Policies on the way"
    sections.append(_figure(title, text, folder, trajectory_figure(results), name))
    sections.append(_section("Through training: peak and end", summary_table(results)))
    sections.append(_section("Through training: at equal KL", equal_kl_table(results)))
    if (proxies := proxy_table(results)) is not None:
        sections.append(_figure(PROXIES, NOTE, folder, proxy_figure(results), "proxies"))
        sections.append(proxies.markdown())
    for entry in entries[:MOST_PANELS]:
        sections.append(f"### {entry.name}\n\n{trajectory_table(results, entry).markdown()}")
    if len(entries) > MOST_PANELS:
        sections.append(f"The other {len(entries) - MOST_PANELS} are in results.json, key `trajectories`.\n")
    return [*sections, *_agreement(results, entries)]


def _rollouts(results: Results, folder: Path) -> list[str]:
    """The scores of on-policy methods' rollouts, from the rows that training logged."""
    logged = rollout_rows(results, folder)
    figure = estimated_figure(results, logged)
    text = "Each dot is one iteration's rollouts, the line their running mean over five. "
    if judged_while_trained(logged):
        text += (
            "Above: the reward that the policy is trained on. Below: the evaluation's judge, which it is not "
            "trained on; where that falls behind, the reward is over-optimised."
        )
    else:
        text += "This is the reward that the policy is trained on; the evaluation's judge did not score these rollouts."
    return [_figure("Reward and KL through training", text, folder, figure, "through_training")] if figure else []


def _agreement(results: Results, entries: list[EntryResult]) -> list[str]:
    tables = {entry.name: agreement_table(results, entry) for entry in entries[:MOST_PANELS]}
    if not any(tables.values()):
        return []
    parts = [f"### {name}\n\n{table.markdown()}" for name, table in tables.items() if table]
    return [f"## Logged KL against exact KL\n\n{agreement_summary(results)}\n", *parts]


def _wins(results: Results) -> str:
    table = win_table(results)
    if table is not None and len(table.rows) > _WIDEST_WIN_MATRIX:
        return (
            f"## Win rates\n\nThe {len(table.rows)} × {len(table.rows)} matrix is in results.json, key `win_matrix`.\n"
        )
    return _section("Win rates", table)


def _tuning(results: Results, folder: Path) -> list[str]:
    table, figure = budget_table(results), expected_best_figure(results)
    if table is None or figure is None:
        return []
    trials = "All trials are in the section Tuning of report.html, and in results.json, key `tuning`."
    sections = [f"## Tuning\n\n{tuning_text(results)}\n\n{table.markdown()}\n{trials}\n"]
    text = f"Left: {expected_best_text(results)} Right: what happened. Dots are trials, lines the best so far."
    sections.append(_figure("Expected best of k trials", text, folder, figure, "expected_best"))
    tables = (chosen_table(results), sensitivity_table(results))
    return [*sections, *(_section(one.title, one) for one in tables if one is not None)]


def _curves(results: Results, folder: Path) -> list[str]:
    sections = []
    for name, figure in curve_figures(results, folder).items():
        title = f"Training curves: {name.removeprefix('curves_').replace('_', ' ')}"
        text = (
            "One line for each seed. All methods share one scale per metric, except for the losses, which are not "
            "comparable."
        )
        sections.append(_figure(title, text, folder, figure, name))
    return sections


def _section(title: str, table: Table | None) -> str:
    return f"## {title}\n\n{table.markdown()}" if table is not None else ""


def _listing(title: str, items: list[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {item}\n" for item in items) if items else ""


def _reproduce(results: Results) -> str:
    return (
        "## To reproduce\n\n`config.yaml`, next to this page, holds every setting, defaults included; finished stages "
        "are reused.\n\n```\nprefarena compare config.yaml\n```\n\nAll numbers are in `results.json`.\n"
    )
