"""Checkpoints of a job whose stage is on an object store: found again from any node, whatever its cache holds.

    <stage>/checkpoints/step-00000200/rank-0.safetensors   tensors of a worker
                                      rank-0.ATTEMPT.json  its size and checksum, sent behind it
                                      manifest.json        sent last: without it the checkpoint is not there

Nothing can be renamed in such a store, so a checkpoint is one when its manifest is there. Each worker writes its file
on its own node and sends it; rank 0 waits for what the others sent.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from prefarena import stores
from prefarena.mirror import Mirror, mirror_of
from prefarena.stage_files import MANIFEST
from prefarena.training.checkpoints import (
    FORMAT,
    NUM_KEPT,
    RECEIPTS_LIMIT_S,
    Checkpoint,
    CheckpointFolder,
    DamagedCheckpointError,
    file_of,
    name_of,
    steps_of,
)
from prefarena.training.storage import full_disk_named, retried

_POLL_S = 0.5


class RemoteCheckpointFolder(CheckpointFolder):
    """Checkpoints on a store. publish_rows: sends what else the stage holds, before a checkpoint's manifest."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        retry_s: float,
        sharded: bool = False,
        publish_rows: Callable[[], None],
    ) -> None:
        super().__init__(folder, rank=rank, world_size=world_size, attempt=attempt, retry_s=retry_s, sharded=sharded)
        found = mirror_of(folder)
        if found is None:
            raise TypeError(f"{folder} is no copy of an object store's")
        self._mirror: Mirror = found
        self._publish_rows = publish_rows

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], num_files: int) -> None:
        what = self._what(step)
        local, remote = self._folder / f".{name_of(step)}-{self._attempt}", self._folder / name_of(step)
        file = local / file_of(self._rank)
        try:
            with full_disk_named(what, self._folder):
                retried(lambda: self._write_file(local, tensors), self._retry_s, what)
            retried(lambda: stores.upload(file, self._url(remote / file.name)), self._retry_s, what)
            receipt = file.with_suffix(".json").read_bytes()
            retried(lambda: self._mirror.write(remote / self._receipt_of(self._rank), receipt), self._retry_s, what)
            if self._rank == 0:
                files = {file_of(rank): self._receipt(remote, rank, what) for rank in range(num_files)}
                retried(self._publish_rows, self._retry_s, what)
                text = json.dumps({"format": FORMAT, "step": step, "state": state, "files": files})
                retried(lambda: self._mirror.write(remote / MANIFEST, text.encode()), self._retry_s, what)
                for old in self.steps()[NUM_KEPT:]:
                    self.remove(old)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _url(self, path: Path) -> str:
        return self._mirror.url_of(path)

    def _receipt_of(self, rank: int) -> str:
        return f"rank-{rank}.{self._attempt}.json"

    def _receipt(self, remote: Path, rank: int, what: str) -> Any:
        """The receipt of a worker's file; waits until it is there."""
        deadline = time.monotonic() + RECEIPTS_LIMIT_S
        while True:
            data = retried(lambda: self._mirror.read(remote / self._receipt_of(rank)), self._retry_s, what)
            if data is not None:
                return json.loads(data)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: waited {RECEIPTS_LIMIT_S:g} s for {file_of(rank)} of another worker")
            time.sleep(_POLL_S)

    def _names(self) -> dict[str, set[str]]:
        """Names of the files of each checkpoint, whole or not."""
        found: dict[str, set[str]] = {}
        for name in retried(lambda: self._mirror.names(self._folder), self._retry_s, str(self._folder)):
            folder, _, file = name.partition("/")
            found.setdefault(folder, set()).add(file)
        return found

    def steps(self) -> list[int]:
        return sorted(steps_of(name for name, files in self._names().items() if MANIFEST in files), reverse=True)

    def _read(self, step: int) -> Checkpoint:
        """Bring the checkpoint to this node for as long as it is read."""
        local, remote = self._folder / name_of(step), self._folder / name_of(step)
        shutil.rmtree(local, ignore_errors=True)
        try:
            stores.download(self._url(remote / MANIFEST), local / MANIFEST)
            for rank in self._ranks_read(self._num_files(local / MANIFEST)):
                stores.download(self._url(remote / file_of(rank)), local / file_of(rank))
            return super()._read(step)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{self._url(remote)}: {error}") from error
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _num_files(self, manifest: Path) -> int:
        """The number of its files; 0 where the manifest is unreadable, which reading it will report."""
        try:
            return len(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        except (ValueError, KeyError, TypeError):
            return 0

    def remove(self, step: int) -> None:
        folder = self._folder / name_of(step)
        self._mirror.remove(folder / MANIFEST)  # first: what is left of it is then no checkpoint
        self._mirror.remove(folder)

    def remove_unfinished(self) -> None:
        for name, files in self._names().items():
            if MANIFEST not in files:
                self._mirror.remove(self._folder / name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def remove_all(self) -> None:
        self._mirror.remove(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)
