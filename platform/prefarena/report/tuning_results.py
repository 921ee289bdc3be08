"""What `prefarena tune` found: the typed form of `tuning.json`, which the report of the tuned comparison reads.

Rewards are in the judge's units and measured as differences to the reference's on the same prompts, KL is in nats per
sequence, and times are in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from prefarena.errors import UserError
from prefarena.report.part import Part
from prefarena.settings.search import Value
from prefarena.stages import write_json

FILE = "tuning.json"


class TrialResult(Part):
    """One trial of an entry: settings, and what they reached on the selection's seeds that it was trained on.

    settings: the tuned settings alone, by their dotted names within the method. rewards, kls: by the seed, as text.
    value: what trials are ranked by, higher is better; None for one that failed. state: `complete` was trained on all
    of the selection's seeds, `stopped` on the first alone, since it was in the worse half there; `failed` ended without
    a policy, for the `reason`.
    """

    entry: str
    number: int
    settings: dict[str, Value]
    state: Literal["complete", "stopped", "failed"]
    rewards: dict[str, float] = Field({})
    kls: dict[str, float] = Field({})
    value: float | None = None
    reason: str | None = None
    device_seconds: float = 0.0


class TunedEntry(Part):
    """An entry's budget and what won. best: the number of the trial whose settings are used; None where all failed.

    method: all settings of the winner's method, by which the report sees whether an entry is still what was chosen;
    where it is empty, the tuned settings alone tell.
    """

    name: str
    kind: str
    group: str | None = None
    num_trials: int
    device_seconds: float
    best: int | None
    settings: dict[str, Value] = Field({})
    method: dict[str, Any] = Field({})


class TuningResults(Part):
    """All trials, in the order in which they were proposed within each entry, and each entry's winner.

    criterion: what trials are ranked by, and selection: on what they were measured, both as phrases.
    """

    name: str
    criterion: str
    kl_limit: float
    selection: str
    selection_seeds: list[int]
    seed: int
    num_trials: int
    batch_size: int
    trials: list[TrialResult]
    entries: list[TunedEntry]
    sampler: Literal["tpe", "random"] | None = Field(None, description="how trials were proposed; none: not known.")
    device_seconds: float | None = Field(None, description="limit on the time of an entry's trials; none: no limit.")

    @model_validator(mode="after")
    def _says_what_its_trials_say(self) -> TuningResults:
        """A budget that a report tells is the number of trials that it lists, and a winner is one of them."""
        for entry in self.entries:
            trials = self.of(entry.name)
            if entry.num_trials != len(trials):
                raise ValueError(f"entry {entry.name!r} has {len(trials)} trials, but says {entry.num_trials}")
            best = [trial for trial in trials if trial.number == entry.best and trial.value is not None]
            if entry.best is not None and [trial.settings for trial in best] != [entry.settings]:
                raise ValueError(f"entry {entry.name!r}: its settings are not those of its trial {entry.best}")
        return self

    def of(self, entry: str) -> list[TrialResult]:
        """The trials of this entry, in order."""
        return [trial for trial in self.trials if trial.entry == entry]

    def entry(self, name: str) -> TunedEntry | None:
        """The tuning of the entry of this name; None if it was not tuned."""
        return next((entry for entry in self.entries if entry.name == name), None)


def save_tuning(results: TuningResults, folder: Path) -> Path:
    """Write `tuning.json` into the folder, whole or not at all. Returns its path."""
    path = folder / FILE
    write_json(path, results.model_dump(mode="json"))
    return path


def load_tuning(path: str | Path) -> TuningResults:
    """Read a `tuning.json`. Raises UserError where there is none, or where it is something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `prefarena tune` writes it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not what `prefarena tune` writes (it is not UTF-8)") from error
    return parse_tuning(text, str(path))


def parse_tuning(text: str | bytes, source: str) -> TuningResults:
    """Parse the text of a `tuning.json` that lies at `source`. Raises UserError where it is something else."""
    try:
        return TuningResults.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where, told = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{source}: not what `prefarena tune` writes ({f'{where}: ' if where else ''}{told})"
        ) from error
