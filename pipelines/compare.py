"""The head-to-head, `prefarena compare`: everything that is missing, from the data to the report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.abilities import ability_work, needed_abilities
from pipelines.checks import check_input
from pipelines.claims import only_once
from pipelines.evaluate import evaluate
from pipelines.jobs import max_length
from pipelines.pair_scores import check_pair_scores
from pipelines.plan import SeedPlan, make_plan
from pipelines.prepare import prepare
from pipelines.report import report, run_folder
from pipelines.session import checked_session
from pipelines.tracking import Trackers, tracking
from pipelines.train import train
from prefarena.cluster.session import requested
from prefarena.config import Comparison, OnPolicyMethod
from prefarena.mirror import shown
from prefarena.report.tables import main_table
from prefarena.stages import Stage, forget_failure
from prefarena.stores import check_output, is_url

_WIDE = 150  # characters from which the whole table fits
STEPS = ("prepare", "train", "evaluate", "report")


def compare(config: Comparison, console: Console, last: str = "report", *, retry_failed: bool = False) -> Path:
    """Run the comparison up to and including the step `last`. Returns the run folder.

    Finished stages are reused, and failed ones left alone unless they are to be tried again; input that cannot be used
    raises UserError before Ray is started, and so does another process that is running this comparison.
    """
    check_input(config)
    if is_url(config.output) and (warning := check_output(config.output)) is not None:
        console.print(warning, markup=False)
    plans = make_plan(config)
    check_pair_scores(config, plans)
    with only_once(config.name, run_folder(config, plans)):
        aside = [stage for stage, _, _ in ability_work(config, plans)]
        for stage in [*all_stages(plans), *aside] if retry_failed else []:
            forget_failure(stage.folder)
        with tracking(config, plans, run_folder(config, plans).name, console) as trackers:
            return _compare(config, plans, console, last, trackers)


def _compare(config: Comparison, plans: list[SeedPlan], console: Console, last: str, trackers: Trackers) -> Path:
    aside = [stage for stage, _, _ in ability_work(config, plans)]
    reused = {stage for stage in [*all_stages(plans), *aside] if stage.finished}
    show_plan(config, plans, console)
    wanted = STEPS[: STEPS.index(last) + 1]
    if any(not stage.finished for stage in needed_stages(plans)) or needed_abilities(config, plans):
        console.print("starting or joining Ray …")
        with checked_session(config, plans):
            for step, work in zip(STEPS, (prepare, train, evaluate), strict=False):
                if step in wanted:
                    work(config, plans, console)
    if last != "report":
        return run_folder(config, plans)
    folder, results = report(config, plans, reused, trackers.catch_up())
    trackers.summarise(results)
    console.print(main_table(results, brief=console.width < _WIDE).rich())
    console.print(f"report: {shown(folder / 'report.html')}")
    return folder


def all_stages(plans: list[SeedPlan]) -> list[Stage]:
    """Every stage of a comparison, in order, without repeats."""
    stages: list[Stage] = []
    for plan in plans:
        stages += plan.shared()
        for trained in plan.trained:
            stages += trained.stages()
        stages += [plan.evaluation, *([plan.frontier] if plan.frontier else [])]
    return list(dict.fromkeys(stages))


def needed_stages(plans: list[SeedPlan]) -> list[Stage]:
    """The stages that must be finished for the report, without those of entries that have failed."""
    failed = {stage for plan in plans for trained in plan.trained if trained.failure for stage in trained.stages()}
    return [stage for stage in all_stages(plans) if stage not in failed]


def show_plan(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Print what will be done, what is reused, and what is requested from the cluster."""
    stages = [*all_stages(plans), *(stage for stage, _, _ in ability_work(config, plans))]
    table = Table(title=f"plan of comparison {config.name!r}", title_justify="left")
    table.add_column("stage")
    table.add_column("folder", overflow="fold")
    table.add_column("")
    for stage in stages if len(stages) <= 40 else []:
        state = "[green]reused[/green]" if stage.finished else "[red]failed[/red]" if stage.failure else "to do"
        table.add_row(f"{stage.kind} ({stage.label})", stage.folder.name, state)
    if table.row_count:
        console.print(table)
    num_reused = sum(stage.finished for stage in stages)
    console.print(
        f"{len(stages)} stages: {num_reused} reused, {len(stages) - num_reused} to do; "
        f"stages are under {shown(stages[0].folder.parent)}"
    )
    for stage in stages:
        if stage.failure:
            console.print(
                f"[red]✗[/red] {stage.kind} ({stage.label}) failed in an earlier run and is left as it is: "
                f"{stage.failure}. "
                f"--retry-failed tries again, from its last checkpoint; to start it afresh, delete "
                f"{shown(stage.folder)}"
            )
    for entry in config.entries:
        if isinstance(entry.method, OnPolicyMethod):
            ppo = entry.method.training
            console.print(
                f"{entry.name}: {ppo.num_epochs} epochs x {ppo.num_minibatches} minibatches = "
                f"{ppo.num_epochs * ppo.num_minibatches} updates on each of {ppo.num_iterations} rollout batches"
            )
    asked = ", ".join(f"{amount:g} {kind}s ({why})" for kind, (amount, why) in requested(config).items())
    console.print(f"requested from the cluster: {asked}; sequences of up to {max_length(config.task)} tokens")
