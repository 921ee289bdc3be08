"""Results of an evaluation, kept in parts until it has ended: a run that stops continues with the missing parts.

A part is a file whose name is a hash of everything that it depends on. Of samples: the policy that was trained, the
prompts, the settings of the sampler, the place of the part among the samples. Of log-probs and scores: the model that
gives them, how it computes, the prompts and responses.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefarena.generation.interface import Sampling
from prefarena.mirror import bring, push, remove_file
from prefarena.records import Rollout, content_id
from prefarena.stage_files import SNAPSHOTS
from prefarena.stages import is_finished, read_manifest, whole_file

PART_ROLLOUTS = 256
Draw = Callable[[list[list[int]], Sampling], list[Rollout]]
#: Prompts and responses in, a number (or a row of them) for each response out.
Compute = Callable[[list[list[int]], list[list[int]]], np.ndarray]


class KeptRollouts:
    """The parts of evaluations under way, in a folder of each evaluation's own under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def complete(
        self, policy: str, version: str, prompts: list[list[int]], sampling: Sampling, draw: Draw
    ) -> list[Rollout]:
        """One rollout per prompt: those that are kept, and of the parts that are missing what `draw` makes.

        policy: its folder, in that of a finished stage. version: the evaluation whose folder has the parts. A part's
        samples do not depend on which of the others were there already.
        """
        made_by = training_of(policy)
        rollouts: list[Rollout] = []
        for start in range(0, len(prompts), PART_ROLLOUTS):
            part = prompts[start : start + PART_ROLLOUTS]
            own = replace(sampling, first_index=sampling.first_index + start)
            path = self.folder_of(version) / f"{content_id(made_by, part, asdict(own))}.json.gz"
            found = _read(path)
            if found is None:
                found = draw(part, own)
                _write(path, found)
            rollouts += found
        return rollouts

    def folder_of(self, version: str) -> Path:
        """The folder with the parts of the evaluation of these weights."""
        return self._folder / version

    def forget(self, version: str) -> None:
        """Remove the parts of an evaluation that has ended, of its log-probs and scores too."""
        folder = self.folder_of(version)
        for path in sorted([*folder.glob("*.json.gz"), *folder.glob("*.npy")]):
            remove_file(path)
        if folder.is_dir():
            shutil.rmtree(folder)


@dataclass(frozen=True)
class Wanted:
    """Values of N responses: log-probs, divergences or scores; a number for each, or a row of numbers.

    given_by: everything that they depend on beside prompts and responses (JSON-able). They are computed in parts of 256
    responses, whether these are kept or not and whoever computes them, so that neither a stop nor the number of
    processes changes a bit. is_shared: other evaluations want the same values.
    """

    given_by: Any
    prompts: list[list[int]]
    responses: list[list[int]]
    compute: Compute
    is_shared: bool = False

    def parts(self) -> Iterator[Part]:
        for start in range(0, len(self.prompts), PART_ROLLOUTS):
            own = slice(start, start + PART_ROLLOUTS)
            prompts, responses = self.prompts[own], self.responses[own]
            name = f"{content_id(self.given_by, prompts, responses)}.npy"
            yield Part(name, partial(self.compute, prompts, responses), self.is_shared)


@dataclass(frozen=True)
class Part:
    """The file of a part's values, what computes them, and whether other evaluations want the same."""

    name: str
    compute: Callable[[], np.ndarray]
    is_shared: bool = False


@dataclass(frozen=True)
class Share:
    """The `place`-th of `number` equal shares, places counted from 0."""

    place: int
    number: int


class KeptValues:
    """Values of responses, kept in parts; without a folder nothing is kept.

    shared: the folder of values that several evaluations want, so that the first one computes them for all; without it
    they are kept beside the others.
    """

    def __init__(self, folder: Path | None, shared: Path | None = None) -> None:
        self._folder, self._shared = folder, shared

    def complete(self, wanted: Wanted) -> np.ndarray:
        """The values [N]: kept ones, and those of missing parts, which are computed now."""
        parts = [self._value(part) for part in wanted.parts()]
        return np.concatenate(parts) if parts else np.zeros(0)

    def fill(self, wanted: Iterable[Wanted], share: Share) -> Share:
        """Compute what is missing of a share of all parts, for whoever completes the values later.

        Parts are dealt out one by one, so shares of the same values differ by one part at most. Returns the share of
        what comes next, so that dealing goes on from here.
        """
        if self._folder is None:
            raise TypeError("what is not kept cannot be computed ahead")
        parts = [part for one in wanted for part in one.parts()]
        for part in parts[share.place :: share.number]:
            self._value(part)
        return replace(share, place=(share.place - len(parts)) % share.number)

    def _value(self, part: Part) -> np.ndarray:
        folder = self._shared if part.is_shared and self._shared is not None else self._folder
        path = None if folder is None else folder / part.name
        found = None if path is None else _read_values(path)
        if found is None:
            found = part.compute()
            if path is not None:
                _write_values(path, found)
        return found


def training_of(policy: str) -> Any:
    """A mark that distinguishes trainings of equal settings: the manifest of the stage whose model this is.

    None for a model that no stage made.
    """
    stage = Path(policy).parent
    stage = stage.parent if stage.name == SNAPSHOTS else stage
    return read_manifest(stage) if is_finished(stage) else None


def _read_values(path: Path) -> np.ndarray | None:
    bring(path)
    return np.load(path) if path.exists() else None


def _write_values(path: Path, values: np.ndarray) -> None:
    """A reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)
    push(path)


def _read(path: Path) -> list[Rollout] | None:
    bring(path)
    if not path.exists():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Rollout(**fields) for fields in json.load(file)]


def _write(path: Path, rollouts: list[Rollout]) -> None:
    """A reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        json.dump([vars(rollout) for rollout in rollouts], file)
    push(path)
