"""Stages: steps of a run whose folder name is a hash of everything that their result depends on.

A stage is finished when its manifest exists; it is written last and atomically. A finished stage is never run
again, and a changed setting gives another hash, hence another folder: nothing is overwritten.

A training stage may also have failed: its numbers were no longer numbers. It then holds `failure.json` in place of a
manifest, with the reason, and is left alone until it is told to be tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefarena import mirror
from prefarena.stage_files import FAILURE, MANIFEST, ROW

#: Raise when the meaning of stored results changes: older stages are then not reused.
FORMAT_VERSION = 4


@dataclass(frozen=True)
class Stage:
    """A step of a run: `kind` and `label` name it for people, `folder` is its content address."""

    kind: str
    label: str
    folder: Path

    @staticmethod
    def at(root: str | Path, kind: str, label: str, inputs: Any) -> Stage:
        """The stage whose result depends only on `inputs` (JSON-able)."""
        text = json.dumps([FORMAT_VERSION, kind, inputs], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Stage(kind, label, Path(root).absolute() / f"{kind}-{label}-{digest}")

    @property
    def finished(self) -> bool:
        return is_finished(self.folder)

    @property
    def failure(self) -> str | None:
        """Why the stage failed; None where it did not."""
        return None if self.finished else failure_of(self.folder)

    @property
    def settled(self) -> bool:
        """Whether the stage has finished or failed, so that there is nothing to do."""
        return is_settled(self.folder)

    @property
    def key(self) -> str:
        """The key that a dependent stage hashes: the folder's name, which holds the digest of all inputs."""
        return self.folder.name

    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.folder)

    def row(self) -> dict[str, float]:
        """The measures of an evaluation, or of a comparison by pairs."""
        mirror.bring(self.folder / ROW)
        row: dict[str, float] = json.loads((self.folder / ROW).read_text(encoding="utf-8"))
        return row

    def begin(self) -> Path:
        """Make an empty folder to work in: leftovers of an interrupted attempt are removed."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return self.folder

    def finish(self, **contents: Any) -> None:
        write_manifest(self.folder, {"kind": self.kind, "label": self.label, **contents})


def is_finished(folder: str | Path) -> bool:
    return mirror.is_file(Path(folder) / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    return json.loads(mirror.read_text(Path(folder) / MANIFEST))


def write_manifest(folder: str | Path, contents: dict[str, Any]) -> None:
    """Mark the stage as finished; on an object store everything else in the folder is published first."""
    write_json(Path(folder) / MANIFEST, contents)
    mirror.publish(Path(folder), MANIFEST)


def costs_of(wall_seconds: float, device_seconds: float | None = None, **counts: Any) -> dict[str, Any]:
    """The cost of a stage, as its manifest has it under `costs` and the report reads it.

    device_seconds: added up over the devices that it held; None means one device, all the time.
    """
    held = wall_seconds if device_seconds is None else device_seconds
    return {"wall_seconds": wall_seconds, "device_seconds": held, **counts}


def is_settled(folder: str | Path) -> bool:
    """Whether the stage is finished or has failed."""
    return is_finished(folder) or mirror.is_file(Path(folder) / FAILURE)


def failure_of(folder: str | Path) -> str | None:
    """The reason that `write_failure` was given; None where it was not called."""
    try:
        return str(json.loads(mirror.read_text(Path(folder) / FAILURE))["reason"])
    except FileNotFoundError:
        return None


def write_failure(folder: str | Path, reason: str, **contents: Any) -> None:
    """Mark the stage as failed."""
    write_json(Path(folder) / FAILURE, {"status": "failed", "reason": reason, **contents})
    mirror.publish(Path(folder), FAILURE)


def forget_failure(folder: str | Path) -> None:
    """Let a failed stage be tried again."""
    mirror.remove_file(Path(folder) / FAILURE)


def write_json(path: Path, contents: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(contents, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write any text as `write_json` does."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of a file to write in the block, which then takes the place of `path`: readers see all of it or none.

    Where the block raises, `path` is as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
