"""Comparisons from Python: the functions behind `prefarena.compare` and the command `prefarena compare`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.console import new_console
from prefarena.cluster.session import listen_on_loopback
from prefarena.config import Comparison, load_config, parse_config
from prefarena.report.comparison import ComparisonResult, load_results

Config = str | Path | Mapping[str, Any] | Comparison


def compare(
    config: Config | None = None,
    overrides: Sequence[str] = (),
    *,
    retry_failed: bool = False,
    quiet: bool = False,
) -> ComparisonResult:
    """Run a comparison, reusing what is finished, and return what it found.

    config: the path of a YAML file, a mapping of the same keys, or a `Comparison`; without one, the embedded default.
    overrides: `key.path=value`, as `--set` takes them (not with a `Comparison`). retry_failed: train again what failed
    in an earlier run, from its last checkpoint. quiet: print no progress.

    Raises UserError, with one sentence, for input that cannot be used. A Ray that is already running in this process,
    or that RAY_ADDRESS names, is joined; otherwise a local one is started and stopped.
    """
    folder = run(resolve(config, overrides), "report", retry_failed=retry_failed, quiet=quiet)
    return load_results(folder)


def resolve(config: Config | None, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison that a path, a mapping or nothing describes. Raises UserError."""
    if isinstance(config, Comparison):
        if overrides:
            raise ValueError("overrides apply only to paths and mappings; change the Comparison itself instead")
        return config
    if isinstance(config, Mapping):
        return parse_config(dict(config), overrides=overrides)
    return load_config(config, list(overrides))


def tune(
    config: Config | None = None,
    overrides: Sequence[str] = (),
    *,
    retry_failed: bool = False,
    quiet: bool = False,
) -> ComparisonResult:
    """Give every entry the same budget of trials (`tuning`), then compare the winners on the comparison's own seeds.

    Arguments, errors and Ray are as of `compare`; the result's report has a section on the tuning.
    """
    folder = run_tuning(resolve(config, overrides), retry_failed=retry_failed, quiet=quiet)
    return load_results(folder)


def run_tuning(
    config: Comparison, *, retry_failed: bool = False, only_trials: bool = False, quiet: bool = False
) -> Path:
    """Tune a comparison, and unless `only_trials` compare the winners, and print how it goes.

    Returns the folder of the winners' comparison; with `only_trials` that of tuning.json and tuned.yaml.
    """
    console = _started(quiet)
    from pipelines.compare import compare as run_stages
    from pipelines.tune import TUNED
    from pipelines.tune import tune as run_trials

    folder = run_trials(config, console, retry_failed=retry_failed)
    if only_trials:
        return folder
    return run_stages(load_config(folder / TUNED), console, retry_failed=retry_failed)


def run(config: Comparison, last: str, *, retry_failed: bool = False, quiet: bool = False) -> Path:
    """Run a comparison up to and including the step `last`, and print how it goes. Returns the run folder."""
    console = _started(quiet)
    from pipelines.compare import compare as run_stages

    return run_stages(config, console, last, retry_failed=retry_failed)


def _started(quiet: bool) -> Console:
    """Return the console, after settling what libraries may print and where Ray listens, before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    listen_on_loopback()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    console = new_console(quiet)
    console.print("looking at the settings, the data and the models …")
    return console
