"""Samples of an evaluation, kept in parts until it has ended: a run that stops goes on with the parts that are missing.

A part is a file whose name is a hash of everything that its samples depend on: the policy that was trained, the
prompts, the settings of the sampler, the place of the part among the samples.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from prefarena.generation.interface import Sampling
from prefarena.mirror import bring, push, remove_file
from prefarena.records import Rollout, content_id
from prefarena.stages import read_manifest

PART_ROLLOUTS = 256
Draw = Callable[[list[list[int]], Sampling], list[Rollout]]


class KeptRollouts:
    """The parts of evaluations under way, in a folder of each evaluation's own under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def complete(
        self, policy: str, version: str, prompts: list[list[int]], sampling: Sampling, draw: Draw
    ) -> list[Rollout]:
        """One rollout per prompt: those that are kept, and of the parts that are missing what `draw` makes.

        policy: its folder, in that of a finished stage. version: what its weights are called, and the parts' folder. A
        part's samples do not depend on which of the others were there already.
        """
        made_by = read_manifest(Path(policy).parent)  # tells one training from another of the same settings
        rollouts: list[Rollout] = []
        for start in range(0, len(prompts), PART_ROLLOUTS):
            part = prompts[start : start + PART_ROLLOUTS]
            own = replace(sampling, first_index=sampling.first_index + start)
            path = self._folder / version / f"{content_id(made_by, part, asdict(own))}.json.gz"
            found = _read(path)
            if found is None:
                found = draw(part, own)
                _write(path, found)
            rollouts += found
        return rollouts

    def forget(self, version: str) -> None:
        """Remove the parts of an evaluation that has ended."""
        folder = self._folder / version
        for path in sorted(folder.glob("*.json.gz")):
            remove_file(path)
        if folder.is_dir():
            shutil.rmtree(folder)


def _read(path: Path) -> list[Rollout] | None:
    bring(path)
    if not path.exists():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Rollout(**fields) for fields in json.load(file)]


def _write(path: Path, rollouts: list[Rollout]) -> None:
    """A reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        json.dump([vars(rollout) for rollout in rollouts], file)
    os.replace(temporary, path)
    push(path)
