"""Tasks of lm-eval by their names, and the numbers that they give for each item."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefarena.config import Abilities
from prefarena.errors import UserError

#: Metrics whose items are a log-likelihood and a number of units, and what each item is called as a mean.
_OF_UNITS = {"word_perplexity": "nll_per_word", "byte_perplexity": "nll_per_byte"}


class Item(NamedTuple):
    """A metric's value of one item of a task."""

    task: str
    metric: str
    item: int
    value: float
    higher_is_better: bool


def load_tasks(settings: Abilities) -> dict[str, Any]:
    """Load the tasks for lm-eval's `evaluate`. Raises UserError where the package is missing, a name is unknown, or a
    task's files cannot be read."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation.abilities needs a package that is not installed; pip install 'prefarena[abilities]'"
        )
    if settings.folder is not None and not Path(settings.folder).is_dir():
        raise UserError(f"evaluation.abilities.folder: {settings.folder} is not a folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.folder, include_defaults=False)
    if any(name not in manager.all_tasks for name in settings.tasks):  # reading thousands of files takes its time
        manager = TaskManager(include_path=settings.folder)
    unknown = [name for name in settings.tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"evaluation.abilities.tasks: lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists its tasks"
            + (f", and {settings.folder} holds the task files of yours" if settings.folder else "")
        )
    try:
        found = manager.load(list(settings.tasks))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"evaluation.abilities.tasks: {', '.join(settings.tasks)}: {error}") from error
    return dict(found)


def item_values(tasks: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> Iterator[Item]:
    """Read values from lm-eval's logged items. A metric that is not a number for an item (a corpus's BLEU) has none."""
    for name, rows in samples.items():
        better = tasks["tasks"][name].higher_is_better()
        for row in rows:
            for metric in row["metrics"]:
                shown = metric if row["filter"] == "none" else f"{metric} ({row['filter']})"
                value, higher = row[metric], bool(better.get(metric, True))
                if metric in _OF_UNITS:
                    logp, number = value
                    yield Item(name, _OF_UNITS[metric], int(row["doc_id"]), -float(logp) / max(1, number), False)
                elif isinstance(value, bool | int | float | np.number):
                    yield Item(name, shown, int(row["doc_id"]), float(value), higher)
