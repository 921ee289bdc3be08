"""Comparisons from Python: what `prefarena.compare` is, and what the command `prefarena compare` calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
            raise ValueError("overrides are for paths and mappings; change the Comparison itself")
        return config
    if isinstance(config, Mapping):
        return parse_config(dict(config), overrides=overrides)
    return load_config(config, list(overrides))


def run(config: Comparison, last: str, *, retry_failed: bool = False, quiet: bool = False) -> Path:
    """Run a comparison up to and including the step `last`, and print how it goes. Returns the run folder."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    listen_on_loopback()  # before anything imports Ray
    from transformers.utils import logging as transformers_logging

    from pipelines.compare import compare as run_stages

    transformers_logging.disable_progress_bar()
    console = new_console(quiet)
    console.print("looking at the settings, the data and the models …")
    return run_stages(config, console, last, retry_failed=retry_failed)
