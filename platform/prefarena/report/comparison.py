"""The result of a comparison for Python and notebooks: what its run folder holds, as data frames, figures and paths."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from prefarena.errors import UserError
from prefarena.mirror import bring, read_text, root_of
from prefarena.report.curves import curve_figures
from prefarena.report.findings import findings
from prefarena.report.html import PAGE_FILE, listing_html, table_html
from prefarena.report.plots import drift_figure, expected_best_figure, reward_kl_figure
from prefarena.report.proxies import proxy_figure
from prefarena.report.results import Results
from prefarena.report.results import load_results as read_results
from prefarena.report.samples import SAMPLES_FILE
from prefarena.report.tables import main_columns, main_table
from prefarena.report.trajectories import estimated_figure, rollout_rows, trajectory_figure
from prefarena.report.tuning import over_seeds
from prefarena.stage_files import read_log
from prefarena.stores import is_url


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison. `results` holds every number as results.json has it; the rest are views of it.

    KL, entropies and log-probs are in nats per response, lengths in tokens, times in seconds, memory in MiB.
    """

    folder: Path
    results: Results

    @property
    def findings(self) -> list[str]:
        """The findings as sentences in Markdown, the most important first."""
        return findings(self.results)

    @property
    def failures(self) -> dict[str, dict[str, str]]:
        """entry -> seed -> why it failed; empty where nothing did."""
        return {entry.name: dict(entry.failures) for entry in self.results.entries if entry.failures}

    @cached_property
    def table(self) -> pd.DataFrame:
        """The report's main table as numbers: a row per policy, means over seeds, and `… (stderr)` where known."""
        rows = {}
        for entry in self.results.entries:
            row: dict[str, float | None] = {}
            for column in main_columns(self.results):
                value = column.value(self.results, entry)
                row[column.title] = None if value is None else value.mean
                row[f"{column.title} (stderr)"] = None if value is None else value.stderr
            rows[entry.name] = row
        frame = pd.DataFrame.from_dict(rows, orient="index", dtype="float64")
        return frame.rename_axis("policy").dropna(axis="columns", how="all")

    @cached_property
    def seeds(self) -> pd.DataFrame:
        """Everything that was measured (docs/metrics.md), a row per policy and seed."""
        rows = [
            {"policy": entry.name, "kind": entry.kind, "seed": int(seed), **row}
            for entry in self.results.entries
            for seed, row in entry.seeds.items()
        ]
        return pd.DataFrame(rows)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """The cost of each stage. `entry` is missing for stages that all entries share, `seed` where all seeds do."""
        return pd.DataFrame([cost.model_dump() for cost in self.results.costs])

    @cached_property
    def win_rates(self) -> pd.DataFrame | None:
        """The share of comparisons that the row's policy wins against the column's; None where it was not measured."""
        matrix = self.results.win_matrix
        if matrix is None:
            return None
        return pd.DataFrame(matrix.win_rate, index=matrix.rows, columns=matrix.rows, dtype="float64")

    @cached_property
    def curves(self) -> pd.DataFrame:
        """The training logs (docs/metrics.md), a row per entry, seed and logged step; missing logs are left out."""
        rows = []
        for entry, by_seed in self.results.curves.items():
            for seed, name in by_seed.items():
                path = self.folder / name
                if path.is_file():
                    rows += [{"policy": entry, "seed": int(seed), **row} for row in read_log(path)]
        return pd.DataFrame(rows)

    @cached_property
    def trials(self) -> pd.DataFrame | None:
        """Every trial of the tuning by which settings were chosen, a column for each setting; None where none is known.

        `reward` and `kl` are means over the selection's seeds; `chosen` says whose settings the entry was given.
        """
        tuning = self.results.tuning
        if tuning is None:
            return None
        best = {entry.name: entry.best for entry in tuning.entries}
        rows = []
        for trial in tuning.trials:
            means = {"reward": over_seeds(trial.rewards), "kl": over_seeds(trial.kls)}
            row = {"policy": trial.entry, "trial": trial.number, "state": trial.state, "value": trial.value}
            row |= {name: mean.mean if mean else None for name, mean in means.items()}
            row |= {"device_seconds": trial.device_seconds, "chosen": trial.number == best.get(trial.entry)}
            rows.append(row | trial.settings)
        return pd.DataFrame(rows)

    @cached_property
    def samples(self) -> pd.DataFrame | None:
        """Every policy's responses to the held-out prompts; None on a task without samples."""
        path = self.folder / SAMPLES_FILE
        return pd.read_parquet(path) if path.is_file() else None

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The figures of report.md by name, as matplotlib draws them."""
        found: dict[str, Figure | None] = {"reward_kl": reward_kl_figure(self.results)}
        if self.results.exact:
            found["drift"] = drift_figure(self.results) if self.results.is_sweep else None
            found["through_training"] = trajectory_figure(self.results)
        else:
            found["through_training"] = estimated_figure(self.results, rollout_rows(self.results, self.folder))
            found["on_the_way"] = trajectory_figure(self.results)
            found["proxies"] = proxy_figure(self.results)
        found |= {"expected_best": expected_best_figure(self.results), **curve_figures(self.results, self.folder)}
        return {name: figure for name, figure in found.items() if figure is not None}

    @property
    def models(self) -> dict[str, str]:
        """Trained models by entry and seed (`dpo-s0`), and `reference`: folders, or URLs on an object store."""
        checkpoints = self.folder / "checkpoints"
        listed = checkpoints / "models.json"
        if listed.is_file():
            return dict(json.loads(listed.read_text(encoding="utf-8")))
        return {path.name: str(path.resolve()) for path in sorted(checkpoints.glob("*"))}

    @property
    def report(self) -> Path:
        """The path of report.md."""
        return self.folder / "report.md"

    @property
    def page(self) -> Path:
        """The path of report.html."""
        return self.folder / PAGE_FILE

    def _repr_html_(self) -> str:
        """Show the findings and the main table in a notebook."""
        return listing_html(self.findings) + table_html(main_table(self.results))


def load_results(folder: str | Path) -> ComparisonResult:
    """The result in a run folder (OUTPUT/NAME-HASH), which may be a URL.

    Raises UserError naming what is missing or wrong.
    """
    named = str(folder).rstrip("/").removesuffix("/results.json")
    if not is_url(named):
        return ComparisonResult(Path(named), read_results(named))
    output, _, name = named.rpartition("/")
    copy = root_of(output, None) / name
    try:
        current = read_text(copy / "results.json")
    except FileNotFoundError:
        raise UserError(f"{named}: no such results; `prefarena compare` writes them") from None
    here = copy / "results.json"
    if not here.is_file() or here.read_text(encoding="utf-8") != current:  # a report that was written again
        shutil.rmtree(copy, ignore_errors=True)
        bring(copy)
    return ComparisonResult(copy, read_results(copy))
