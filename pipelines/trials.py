"""Trials of `prefarena tune` as comparisons: what is run for a batch, on what, and what came out.

A trial is an entry like any other, `ENTRY-tK`, so its stages are found again, shared, and resumed after a kill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.plan import SeedPlan, Trained
from prefarena.config import Comparison, Entry, LanguageTask, TextTask
from prefarena.config.changed import with_settings
from prefarena.errors import UserError
from prefarena.settings.off_policy import Pairwise
from prefarena.settings.search import Space, Value
from prefarena.tuning.ranking import Measured

_SILENT = "its evaluation gave no score"


@dataclass(frozen=True)
class Proposal:
    """The settings of an entry's trial."""

    entry: Entry
    number: int
    settings: Mapping[str, Value]

    @property
    def name(self) -> str:
        """The trial's name as an entry."""
        return f"{self.entry.name}-t{self.number}"

    def as_entry(self) -> Entry:
        """The entry that is trained. Raises UserError for settings that the method refuses."""
        method = with_settings(self.entry.method, self.settings, f"trial {self.name}")
        return self.entry.model_copy(update={"name": self.name, "method": method, "group": self.entry.name})


@dataclass(frozen=True)
class Found:
    """A trial's measurements with one seed, or the reason why there are none."""

    measured: Measured | None
    reason: str | None
    device_seconds: float


def selection(config: Comparison, entries: Sequence[Entry], seeds: Sequence[int]) -> Comparison:
    """A comparison of these entries on what trials are ranked on: other languages, or validation prompts of text."""
    changed: dict[str, object] = {"name": f"{config.name}-trials", "entries": tuple(entries), "seeds": tuple(seeds)}
    changed["evaluation"] = config.evaluation.model_copy(
        update={"win_matrix": False, "frontier_samples": 0, "abilities": None}
    )
    if isinstance(config.task, LanguageTask):
        changed["seeds_vary"] = "task"
    else:
        changed["task"] = config.task.model_copy(update={"validation_share": config.tuning.validation_share})
    return config.model_copy(update=changed)


def described(config: Comparison) -> str:
    """What `selection` measures on, as a phrase."""
    tuning = config.tuning
    seeds = ", ".join(str(seed) for seed in tuning.seeds)
    if isinstance(config.task, LanguageTask):
        return f"other languages (seeds {seeds}), none of which is in the report"
    share = f"{tuning.validation_share:.0%} of the training prompts"
    return f"{share}, which trials do not train on (training seeds {seeds})"


def spaces_of(config: Comparison) -> dict[str, Space]:
    """The search space of each entry; entries without anything to search are left out.

    Raises UserError for a space of an entry that there is not, for settings that its method does not have or refuses,
    and for seeds of the selection that the comparison reports on.
    """
    names = [entry.name for entry in config.entries]
    for name in config.tuning.spaces:
        if name not in names:
            raise UserError(f"tuning.spaces.{name}: there is no such entry; there are {', '.join(names)}")
    _check_seeds(config)
    if config.tuned is not None:
        raise UserError(
            f"tuned: these settings were chosen by an earlier tuning, {config.tuned}; to search again, "
            f"leave `tuned` out"
        )
    spaces: dict[str, Space] = {}
    for entry in config.entries:
        if isinstance(entry.method, Pairwise) and entry.method.replay is not None:
            raise UserError(f"entry {entry.name!r}: replay: trials run without the entry that it replays; leave it out")
        given = config.tuning.spaces.get(entry.name)
        space: Space = dict(entry.method.search_space() if given is None else given)
        where = f"entry {entry.name!r}" if given is None else f"tuning.spaces.{entry.name}"
        for name, dimension in space.items():
            for value in dimension.ends:
                with_settings(entry.method, {name: value}, f"{where}: {name}: {value}")
        if space:
            spaces[entry.name] = space
    if not spaces:
        raise UserError("tuning.spaces: no entry has a setting to search")
    return spaces


def _check_seeds(config: Comparison) -> None:
    """Raise UserError for seeds whose language is reported on, which is that of `task.seed` plus the seed."""
    if isinstance(config.task, TextTask):
        if config.task.validation_share is not None:
            raise UserError("task.validation_share is set by tuning itself, to tuning.validation_share; leave it out")
        return
    reported = set(config.seeds) if config.seeds_vary == "task" else {0}
    for seed in config.tuning.seeds:
        if seed in reported:
            raise UserError(
                f"tuning.seeds: seed {seed} is one of the report's languages, and selection must use others"
            )


def read(plan: SeedPlan, trained: Trained) -> Found:
    """An entry's measurements compared with the reference's, after its stages have been run."""
    stage = trained.training or trained.evaluation
    if trained.failure is not None:
        return Found(None, trained.failure, 0.0)
    seconds = float(stage.manifest().get("costs", {}).get("device_seconds", 0.0))
    if trained.wins is not None:
        row = trained.evaluation.row() | trained.wins.row()
        gain = row.get("win_rate", math.nan) - 0.5
    else:
        row, reference = trained.evaluation.row(), plan.evaluation.row()
        measure = "reward/covered" if isinstance(plan.task, LanguageTask) else "judge_score"
        gain = row.get(measure, math.nan) - reference.get(measure, math.nan)
    kl = row.get("kl/covered", row.get("kl_vocabulary", row.get("kl", math.nan)))
    measured = Measured(gain, kl)
    return Found(measured, None, seconds) if measured.is_number else Found(None, _SILENT, seconds)
