"""Runs stages: training jobs in groups of workers, other work in this process, each by whoever holds its lease."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console

from pipelines.claims import settle
from pipelines.progress import stage_line, watch
from prefarena.cluster.capacity import cluster_nodes, groups_at_once, telling_capacity
from prefarena.config import Comparison, Resources
from prefarena.errors import UserError
from prefarena.mirror import root_of
from prefarena.stages import Stage, failure_of, is_finished, read_manifest
from prefarena.training.jobs import Job
from prefarena.training.launch import run_jobs


def run(resources: Resources, jobs: Sequence[Job], config: Comparison, console: Console) -> None:
    """Run training jobs that are not settled, `resources.concurrent_runs` groups of them at a time."""
    settle(console, {Path(job.stage_dir): job for job in jobs}, partial(run_claimed, resources, config, console))


def run_claimed(resources: Resources, config: Comparison, console: Console, jobs: list[Job]) -> None:
    """Run jobs that no other process is working on, and say which of them failed."""
    number = groups_at_once(config.model_copy(update={"resources": resources}), cluster_nodes())
    groups = [jobs[start::number] for start in range(min(number, len(jobs)))]
    run_at_once(console, jobs, [partial(run_group, config, resources, len(groups), group) for group in groups])


def run_group(config: Comparison, resources: Resources, number: int, jobs: Sequence[Job]) -> None:
    """Run jobs on one group of workers, one after another. number: of groups that run at the same time."""
    storage = str(root_of(config.output, config.resources.cache_dir) / "ray_train")
    with telling_capacity():
        run_jobs(jobs, resources.model_copy(update={"concurrent_runs": number}), storage)


def run_at_once(console: Console, jobs: Sequence[Job], works: Sequence[Callable[[], None]]) -> None:
    """Do all of `works`, which bring the jobs to their ends, at the same time; show how far these are."""
    with (
        stage_line(console, f"training {', '.join(job.name for job in jobs)}", None),
        watch(console, list(jobs)),
        ThreadPoolExecutor(len(works)) as pool,
    ):
        for work in [pool.submit(work) for work in works]:
            work.result()
    say_outcomes(console, jobs)


def say_outcomes(console: Console, jobs: Sequence[Job]) -> None:
    """Say which of the jobs failed, and what went wrong in the others and was mended."""
    for job in jobs:
        if reason := failure_of(job.stage_dir):
            console.print(f"[red]✗[/red] {job.name} failed: {reason}")
        for fault in read_manifest(job.stage_dir).get("faults", []) if is_finished(job.stage_dir) else []:
            console.print(f"  {job.name}: {fault['message']}")


def require(stages: Sequence[Stage]) -> None:
    """Raise UserError where a stage that all entries need has failed."""
    for stage in stages:
        if stage.failure:
            raise UserError(
                f"{stage.kind} ({stage.label}), which every entry needs, failed: {stage.failure}; change its settings, "
                "or try it again with --retry-failed"
            )


def run_once(console: Console, stage: Stage, work: Callable[[Path], None], waiting_for: str) -> None:
    """Do `work` in the stage's empty folder unless the stage is finished; `work` writes the manifest last.

    waiting_for: what is said to be waited for while the work is silent.
    """

    def do(_: list[None]) -> None:
        with stage_line(console, f"{stage.kind} ({stage.label})", waiting_for):
            work(stage.begin())

    settle(console, {stage.folder: None}, do)
