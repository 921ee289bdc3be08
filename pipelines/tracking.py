"""Shows a comparison's training runs in trackers while it runs, from what their stages log (docs/trackers.md).

One thread of this process for each tracker reads the logs of all stages, wherever these are done. A tracker gets a row
when no later attempt will do its step again: once a checkpoint holds the step, or the stage has ended. So a server that
is slow, or fails, holds up no training, keys are needed by this process alone, and a killed run shows each step once.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipelines.plan import SeedPlan
from prefarena.config import Comparison
from prefarena.mirror import mirror_of, push, read_text, root_of
from prefarena.report.results import Results
from prefarena.stage_files import METRICS, parse_log
from prefarena.stages import is_settled
from prefarena.stores import first_line
from prefarena.trackers.interface import OpenRun, Run, Tracker
from prefarena.trackers.make import default_folder, make_tracker
from prefarena.training.checkpoints import newest_step

_POLL_S, _POLL_OF_STORE_S = 2.0, 15.0  # between two looks at the logs: on shared storage, on an object store
_LONGEST_PAUSE_S = 60.0  # after failures


@contextmanager
def tracking(config: Comparison, plans: list[SeedPlan], comparison: str, console: Console) -> Iterator[Trackers]:
    """The config's trackers, which follow the comparison's trainings until the block ends, however it does.

    comparison: the name of its run folder.
    """
    runs = runs_of(config, plans, comparison)
    root = root_of(config.output, config.resources.cache_dir)
    poll_s = _POLL_S if mirror_of(root) is None else _POLL_OF_STORE_S
    followers = [
        Follower(
            settings.kind,
            partial(make_tracker, settings, root),
            runs,
            console,
            poll_s=poll_s,
            timeout_s=settings.timeout_s,
        )
        for settings in config.tracking
    ]
    trackers = Trackers(followers)
    try:
        yield trackers
    finally:
        trackers.close()
        if config.tracking and default_folder(root).is_dir():
            push(default_folder(root))


@dataclass(frozen=True)
class Trackers:
    """All trackers of a comparison."""

    followers: Sequence[Follower]

    def catch_up(self) -> list[str]:
        """Show every row that is there by now. Returns a sentence for each tracker that failed, for the report."""
        for follower in self.followers:
            follower.catch_up()
        return [note for follower in self.followers for note in follower.notes()]

    def summarise(self, results: Results) -> None:
        """Show every policy's final numbers with its run."""
        for follower in self.followers:
            follower.summarise(results)

    def close(self) -> None:
        for follower in self.followers:
            follower.close()


def runs_of(config: Comparison, plans: list[SeedPlan], comparison: str) -> dict[Run, Path]:
    """Every training of a comparison, and every policy that needs none, with the stage that logs its rows."""
    found: dict[Path, Run] = {}
    for plan in plans:
        for entry, stage, settings in (
            ("reference", plan.reference, config.reference),
            ("judge", plan.judge, config.judge),
        ):
            shared = all(getattr(other, entry) == stage for other in plans)
            if stage is not None:
                seed = None if shared else plan.seed
                run = Run(comparison, entry, seed, entry, stage.key, settings.model_dump(mode="json"))
                found.setdefault(stage.folder, run)
        for trained in plan.trained:
            method = trained.entry.method
            own = trained.training or trained.evaluation
            for stage, kind in ((trained.reward_model, "reward_model"), (own, method.kind)):
                if stage is not None:  # a reward model that entries share is shown once, with the first of them
                    run = Run(
                        comparison, trained.entry.name, trained.seed, kind, stage.key, method.model_dump(mode="json")
                    )
                    found.setdefault(stage.folder, run)
    return {run: folder for folder, run in found.items()}


@dataclass
class _Followed:
    """A run, its stage, the rows that the tracker has of it, and the last step that was final when they were sent."""

    run: Run
    stage_dir: Path
    open: OpenRun | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    final_step: float = 0


class Follower:
    """One tracker, in a thread of its own, which alone speaks to it.

    name: what people call it. make: makes it. runs: what it shows, with the stages that log their rows.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        runs: dict[Run, Path],
        console: Console,
        *,
        poll_s: float = _POLL_S,
        timeout_s: float = 60.0,
    ) -> None:
        self._name, self._make, self._console = name, make, console
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self._followed = [_Followed(run, folder) for run, folder in runs.items()]
        self._tracker: Tracker | None = None
        self._wanted: queue.Queue[tuple[Callable[[], None], threading.Event]] = queue.Queue()
        self._num_failures, self._reason, self._not_before = 0, "", 0.0
        self._is_silent = self._is_closed = False
        # A daemon: a tracker that never answers does not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def catch_up(self) -> None:
        """Show all rows that are final by now. Waits for the tracker, `timeout_s` at most."""
        self._ask(self._show_rows)

    def summarise(self, results: Results) -> None:
        """Show the final numbers of every run. Waits likewise."""
        self._ask(lambda: self._show_final(results))

    def close(self) -> None:
        """Show what there is, and let go of the tracker. Waits likewise."""
        if not self._is_closed:
            self._ask(self._let_go)

    def notes(self) -> list[str]:
        """What the tracker could not do, if anything, in one sentence."""
        if not self._num_failures:
            return []
        missing = sum(_num_missing(one) for one in self._followed)
        times = "once" if self._num_failures == 1 else f"{self._num_failures} times"
        left = f"; it lacks {missing} rows of the stages' {METRICS}" if missing > 0 else "; it has all rows now"
        return [f"Tracker {self._name} failed {times} (at first: {self._reason}){left}."]

    # ----------------------------------------------------------------------------------------- its thread

    def _work(self) -> None:
        while not self._is_closed:
            try:
                work, done = self._wanted.get(timeout=self._poll_s)
            except queue.Empty:
                if time.monotonic() >= self._not_before:
                    self._attempt(self._show_rows)
                continue
            self._attempt(work)
            done.set()

    def _ask(self, work: Callable[[], None]) -> None:
        """Have the thread do `work`, and wait for it; not for a tracker that did not answer before."""
        done = threading.Event()
        self._wanted.put((work, done))
        if not self._is_silent and not done.wait(self._timeout_s):
            self._is_silent = True
            self._fail(f"no answer within {self._timeout_s:g} s, which its timeout_s sets")

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of four packages, their servers and disks: none of it may end a training
            self._fail(first_line(error))
            for one in self._followed:
                self._drop(one)

    def _fail(self, reason: str) -> None:
        self._num_failures += 1
        pause = min(_LONGEST_PAUSE_S, self._poll_s * 2**self._num_failures)
        self._not_before = time.monotonic() + pause
        if self._num_failures == 1:
            self._reason = reason
            text = f"tracker {self._name} fails ({reason}); the comparison goes on, and the tracker will be tried again"
            self._console.print(f"[yellow]![/yellow] {escape(text)}")

    def _show_rows(self) -> None:
        for one in self._followed:
            self._show(one)

    def _show(self, one: _Followed, *, even_without_rows: bool = False) -> OpenRun | None:
        """Bring a run up to date; it is opened anew if rows that it has were computed again after all."""
        final_step = last_final_step(one.stage_dir) if one.final_step != math.inf else math.inf
        if one.open is not None and final_step == one.final_step:
            return one.open
        rows = final_rows(one.stage_dir, final_step)
        num_shown = len(one.rows)
        if one.open is None or rows[:num_shown] != one.rows:
            if rows or one.open or even_without_rows:
                if one.open is not None:
                    one.open.close()
                one.open = self._made().open(one.run, rows)
        elif rows[num_shown:]:
            one.open.log(rows[num_shown:])
        if one.open is not None:
            one.rows, one.final_step = rows, final_step
        return one.open

    def _show_final(self, results: Results) -> None:
        for one in self._followed:
            numbers = _final_numbers(one.run, results)
            if numbers and (shown := self._show(one, even_without_rows=True)) is not None:
                shown.summarise(numbers)

    def _let_go(self) -> None:
        self._is_closed = True
        self._show_rows()
        for one in self._followed:
            if one.open is not None:
                one.open.close()

    def _drop(self, one: _Followed) -> None:
        """Drop a run after a failure, so that it is opened anew, which tells what the tracker has of it."""
        if one.open is not None:
            with suppress(Exception):  # it has failed already
                one.open.close()
        one.open, one.rows, one.final_step = None, [], 0

    def _made(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._make()
        return self._tracker


def _num_missing(one: _Followed) -> int:
    return len(final_rows(one.stage_dir, last_final_step(one.stage_dir))) - len(one.rows)


def last_final_step(stage_dir: Path) -> float:
    """The last step that no later attempt repeats: that of the newest checkpoint; inf once training has ended."""
    return math.inf if is_settled(stage_dir) else newest_step(stage_dir)


def final_rows(stage_dir: Path, last_step: float) -> list[dict[str, Any]]:
    """The rows of a training run up to a step; none for a stage that trains nothing."""
    path = stage_dir / METRICS
    try:
        text = read_text(path) if last_step else ""
    except FileNotFoundError:
        return []
    return [row for row in parse_log(text, path, under_way=True) if row["step"] <= last_step]


def _final_numbers(run: Run, results: Results) -> dict[str, float]:
    """The report's numbers of the policy that a run trained; empty for a reward model or a judge."""
    if run.kind in ("reward_model", "judge"):
        return {}
    by_seed = next((entry.seeds for entry in results.entries if entry.name == run.entry), {})
    key = str(run.seed) if run.seed is not None else next(iter(by_seed), "")
    return dict(by_seed.get(key, {}))
