"""Stages: steps of a run whose folder name is a hash of everything that their result depends on.

A stage is finished when its manifest exists; it is written last and atomically. A finished stage is never run
again, and a changed setting gives another hash, hence another folder: nothing is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Raise when the meaning of stored results changes: older stages are then not reused.
FORMAT_VERSION = 3
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """A step of a run: `kind` and `label` name it for people, `folder` is its content address."""

    kind: str
    label: str
    folder: Path

    @staticmethod
    def at(root: str | Path, kind: str, label: str, inputs: Any) -> Stage:
        """The stage whose result depends on `inputs` (JSON-able) alone."""
        text = json.dumps([FORMAT_VERSION, kind, inputs], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Stage(kind, label, Path(root).absolute() / f"{kind}-{label}-{digest}")

    @property
    def finished(self) -> bool:
        return (self.folder / _MANIFEST).is_file()

    @property
    def key(self) -> str:
        """What a dependent stage hashes: the folder's name holds the digest of all inputs."""
        return self.folder.name

    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.folder)

    def begin(self) -> Path:
        """An empty folder to work in: leftovers of an interrupted attempt are removed."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return self.folder

    def finish(self, **contents: Any) -> None:
        write_manifest(self.folder, {"kind": self.kind, "label": self.label, **contents})


def is_finished(folder: str | Path) -> bool:
    return (Path(folder) / _MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / _MANIFEST).read_text(encoding="utf-8"))


def write_manifest(folder: str | Path, contents: dict[str, Any]) -> None:
    write_json(Path(folder) / _MANIFEST, contents)


def write_json(path: Path, contents: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    os.replace(temporary, path)
