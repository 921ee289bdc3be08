"""What the terminal shows while stages run: the rows that workers log, as rate and time left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prefarena import stage_files
from prefarena.stage_files import ATTEMPT, MEMORY, METRICS
from prefarena.stages import Stage, is_finished, is_settled, write_failure
from prefarena.training.jobs import Job

_PLAIN_INTERVAL_S = 15.0  # seconds between lines where the output is not a terminal
_PATIENCE_S = 5.0  # of silence, before the first line that says what is being waited for


class Waiting:
    """Prints what is being waited for: soon, and then regularly until the block ends. `what` may change in between.

    patience_s: before the first line. every_s: between the lines after it.
    """

    def __init__(
        self, console: Console, what: str, patience_s: float = _PATIENCE_S, every_s: float = _PLAIN_INTERVAL_S
    ) -> None:
        self.what, self._console = what, console
        self._patience_s, self._every_s = patience_s, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _say(self) -> None:
        started, seconds = time.perf_counter(), self._patience_s
        while not self._ended.wait(seconds):
            seconds = self._every_s
            elapsed = time.perf_counter() - started
            self._console.print(f"  waiting for {self.what}: {elapsed:.0f} s", markup=False, highlight=False)


@contextmanager
def stage_line(console: Console, name: str, waiting_for: str | None) -> Iterator[Waiting]:
    """Say that a stage starts, what it waits for while it runs, and how long it took.

    waiting_for: what is said at first; None where the block tells of its progress itself.
    """
    started = time.perf_counter()
    console.print(f"[bold]{name}[/bold] …")
    waiting = Waiting(console, waiting_for or "")
    with nullcontext() if waiting_for is None else waiting:
        yield waiting
    console.print(f"[green]✓[/green] {name}  {time.perf_counter() - started:.1f} s")


def fail(stage: Stage, reason: str, console: Console) -> None:
    """Mark a stage as failed, and say so."""
    write_failure(stage.folder, reason, label=stage.label)
    console.print(f"[red]✗[/red] {stage.kind} ({stage.label}) failed: {escape(reason)}")


@contextmanager
def watch(console: Console, jobs: list[Job]) -> Iterator[None]:
    """Follow the metric rows of `jobs` until the block ends: a bar each on a terminal, lines elsewhere."""
    stop = threading.Event()
    follow = _bars if console.is_terminal else _lines
    thread = threading.Thread(target=follow, args=(console, jobs, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def memory_lines(jobs: list[Job], said: set[Job]) -> list[str]:
    """The memory that jobs which have just begun are predicted to take; each is reported once."""
    lines = []
    for job in jobs:
        path = Path(job.stage_dir) / MEMORY
        if job in said or not path.exists():
            continue
        said.add(job)
        memory = json.loads(path.read_text(encoding="utf-8"))
        tokens, rollouts = memory.pop("micro_batch_tokens", None), memory.pop("micro_batch_size", None)
        parts = ", ".join(f"{name.removesuffix('_mib').replace('_', ' ')} {size:,.0f}" for name, size in memory.items())
        passes = f"; passes of at most {tokens} tokens" if tokens else ""
        passes += f"; passes of {rollouts} rollouts" if rollouts else ""
        lines.append(f"  {job.name}: memory of a worker in MiB: {parts}{passes}")
    return lines


class Rate:
    """Steps per second of each job, measured from the first row that was seen of its present attempt."""

    def __init__(self) -> None:
        self._first: dict[Job, tuple[float, float]] = {}

    def of(self, job: Job, row: dict[str, float]) -> float:
        if job not in self._first or row["step"] < self._first[job][0]:  # an attempt may begin where an earlier one did
            self._first[job] = row["step"], time.perf_counter()
        step, seen = self._first[job]
        elapsed = time.perf_counter() - seen
        return (row["step"] - step) / elapsed if elapsed > 0 else 0.0


def _bars(console: Console, jobs: list[Job], stop: threading.Event) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    rates, said = Rate(), set[Job]()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        tasks = {job: progress.add_task(job.name, total=None, start=False, rate="waiting") for job in jobs}
        while True:
            last_round = stop.wait(0.5)
            for line in memory_lines(jobs, said):
                progress.console.print(line, highlight=False)
            for job, task in tasks.items():
                row = last_row(job)
                if row is None:
                    continue
                progress.start_task(task)
                rate = "done" if is_finished(job.stage_dir) else f"{rates.of(job, row):.2g} steps/s"
                progress.update(task, completed=row["step"], total=row["num_steps"], rate=rate)
                if is_finished(job.stage_dir):
                    progress.stop_task(task)
            if last_round:
                return


def _lines(console: Console, jobs: list[Job], stop: threading.Event) -> None:
    said: dict[Job, float] = {}
    predicted: set[Job] = set()
    rates, next_lines = Rate(), time.perf_counter() + _PATIENCE_S
    while True:
        last_round = stop.wait(0.5)
        for line in memory_lines(jobs, predicted):
            console.print(line, highlight=False)
        rows = {job: row for job in jobs if (row := last_row(job)) is not None}
        speeds = {job: rates.of(job, row) for job, row in rows.items()}
        if last_round or time.perf_counter() >= next_lines:
            next_lines = time.perf_counter() + _PLAIN_INTERVAL_S
            new = [job for job, row in rows.items() if said.get(job) != row["step"]]
            for job in new:
                row = rows[job]
                said[job] = row["step"]
                left = f", {(row['num_steps'] - row['step']) / speeds[job]:.0f} s left" if speeds[job] > 0 else ""
                console.print(f"  {job.name}: step {row['step']}/{row['num_steps']}, {speeds[job]:.2g} steps/s{left}")
            if not new and not last_round:
                console.print(f"  {waited_for(jobs)}", markup=False, highlight=False)
        if last_round:
            return


def waited_for(jobs: list[Job]) -> str:
    """What a group of training runs is waiting for while none of them logs a row."""
    begun = [job for job in jobs if (Path(job.stage_dir) / ATTEMPT).exists() and not is_settled(job.stage_dir)]
    if not begun:
        return "waiting for training workers to be placed, to start and to load the model"
    parts = []
    for job in begun:
        row = last_row(job)
        after = "the first row of metrics" if row is None else f"what follows step {row['step']}/{row['num_steps']}"
        parts.append(f"{after} of {job.name}")
    return f"waiting for {', '.join(parts)}"


def last_row(job: Job) -> dict[str, float] | None:
    """The newest complete metric row of a job."""
    return stage_files.last_row(Path(job.stage_dir) / METRICS)
