"""Trackio: a run for each training in the local database of a project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trackio.sqlite_storage import SQLiteStorage

from prefarena.trackers.interface import Row, Run, described, metrics_of


class TrackioTracker:
    """Writes through the package's storage: `trackio.log` has one run at a time, and only warns of what it has lost."""

    def __init__(self, project: str) -> None:
        SQLiteStorage.validate_project_name(project)
        self._project = project

    def open(self, run: Run, rows: Sequence[Row]) -> TrackioRun:
        """The run is written anew; a row's own id, which is that of its step, cannot be stored twice either."""
        SQLiteStorage.delete_run(self._project, run.name, run_id=run.id)
        opened = TrackioRun(self._project, run)
        opened.log(rows)
        return opened


class TrackioRun:
    """A run of the database."""

    def __init__(self, project: str, run: Run) -> None:
        self._project, self._run = project, run
        self._last_step = 0

    def log(self, rows: Sequence[Row]) -> None:
        if rows:
            self._last_step = int(rows[-1]["step"])
            self._write([metrics_of(row) for row in rows], [int(row["step"]) for row in rows], "row")

    def summarise(self, numbers: Mapping[str, float]) -> None:
        """Trackio has no summaries: the numbers stand at the last step."""
        self._write([{f"final/{name}": value for name, value in numbers.items()}], [self._last_step], "final")

    def close(self) -> None:
        """Do nothing: every write is a separate transaction."""

    def _write(self, metrics: list[dict[str, float]], steps: list[int], what: str) -> None:
        run = self._run
        SQLiteStorage.bulk_log(
            project=self._project,
            run=run.name,
            run_id=run.id,
            metrics_list=metrics,
            steps=steps,
            config={**described(run), "settings": dict(run.settings), "_Group": run.comparison},
            log_ids=[f"{run.id}-{what}-{step}" for step in steps],
        )
