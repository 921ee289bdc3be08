"""Checkpoints of one job: written off the step's path, whole or not at all, and checked before they are used.

    <stage_dir>/checkpoints/step-00000200/rank-0.safetensors   tensors of a worker
                                          manifest.json        step, state, and size and checksum of every file

A checkpoint is made in a folder with a leading dot, which is renamed when its manifest is there. Where workers hold the
same tensors rank 0 alone writes them; where each holds a part, each writes its own file. Any number of workers can go
on from either: parts are consecutive rows (of the first dimension), as FSDP2 cuts tensors, and a worker reads those
that are its own now, out of whichever files have them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefarena.mirror import mirror_of
from prefarena.stage_files import CHECKPOINTS, MANIFEST
from prefarena.stages import write_json
from prefarena.training.storage import errno_of, full_disk_named, retried

#: Of a checkpoint's files; raise it when they change.
FORMAT = 2
#: One that is whole, and one before it for the case that it is not.
NUM_KEPT = 2
STEP = "step-"
_RECEIPT_POLL_S = 0.05
#: Longest wait of rank 0 for the files of the other workers, which were saved in the same step.
RECEIPTS_LIMIT_S = 1800.0
_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: named tensors, and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that differs from what was written: a file is missing, cut short or changed."""


class CheckpointFolder:
    """A job's checkpoints, as one worker sees them.

    attempt: a word that all workers of one attempt share and no other attempt uses; it names what is being written.
    sharded: each worker holds a part of every tensor, and so saves and reads a part.
    """

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, attempt: str, retry_s: float, sharded: bool = False
    ) -> None:
        self._folder, self._rank, self._world_size, self._sharded = folder, rank, world_size, sharded
        self._attempt, self._retry_s = attempt, retry_s
        self._writer: Writer | None = None

    # ------------------------------------------------------------------------------------------- writing

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy the tensors and write them in the background. Waits for the write before, and raises what it raised.

        Every worker calls it. Rank 0's tensors are written, or where they are sharded every worker's.
        """
        self.wait()
        if self._rank and not self._sharded:
            return
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        num_files = self._world_size if self._sharded else 1
        self._writer = Writer(lambda: self._write(step, copies, state, num_files), f"checkpoint of step {step}")

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what writing raised: StorageFullError, StorageError, OSError."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.result()

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], num_files: int) -> None:
        what = self._what(step)
        folder = self._folder / f".{name_of(step)}-{self._attempt}"
        try:
            with full_disk_named(what, self._folder):
                retried(lambda: self._write_file(folder, tensors), self._retry_s, what)
                if self._rank == 0:
                    files = self._receipts(folder, num_files, what)
                    contents = {"format": FORMAT, "step": step, "state": state, "files": files}
                    retried(lambda: self._publish(folder, step, contents), self._retry_s, what)
        except BaseException:
            if self._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)  # what is left of it takes room, and nobody can use it
            raise

    def _write_file(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write this worker's tensors, and a receipt with their file's size and checksum."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_of(self._rank)
        save_file(tensors, path)
        _flush(path)
        write_json(_receipt(path), _sum(path))

    def _receipts(self, folder: Path, num_files: int, what: str) -> dict[str, Any]:
        """Every worker's receipt, by the name of its file; waits until they are there."""
        deadline = time.monotonic() + RECEIPTS_LIMIT_S
        waiting = [folder / file_of(rank) for rank in range(num_files)]
        while missing := [path.name for path in waiting if not _receipt(path).is_file()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: waited {RECEIPTS_LIMIT_S:g} s for {', '.join(missing)} of other workers")
            time.sleep(_RECEIPT_POLL_S)
        return {path.name: json.loads(_receipt(path).read_text(encoding="utf-8")) for path in waiting}

    def _publish(self, folder: Path, step: int, contents: dict[str, Any]) -> None:
        """Write the manifest, give the folder its name, and remove what is too old."""
        target = self._folder / name_of(step)
        if folder.exists():  # not where storage failed after the renaming, and this is done again
            write_json(folder / MANIFEST, contents)
            _flush(folder / MANIFEST)
            if target.exists():
                shutil.rmtree(target)
            os.replace(folder, target)
            _flush(self._folder)
        for old in self.steps()[NUM_KEPT:]:
            shutil.rmtree(self._folder / name_of(old))

    # ------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, newest first."""
        if not self._folder.is_dir():
            return []
        return sorted(steps_of(path.name for path in self._folder.glob(f"{STEP}*")), reverse=True)

    def read(self, step: int) -> Checkpoint:
        """This worker's part of a finished checkpoint, on the CPU.

        Raises DamagedCheckpointError where it is not what was written.
        """
        return retried(lambda: self._read(step), self._retry_s, self._what(step))

    def _what(self, step: int) -> str:
        return f"{self._folder.parent.name}: checkpoint of step {step}"

    def _read(self, step: int) -> Checkpoint:
        folder = self._folder / name_of(step)
        try:
            contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files, state, is_ours = contents["files"], contents["state"], contents["step"] == step
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{folder}: its manifest cannot be read ({error})") from error
        if not is_ours or contents.get("format") != FORMAT:
            raise DamagedCheckpointError(f"{folder}: its manifest is that of something else")
        paths = [folder / file_of(rank) for rank in self._ranks_read(len(files))]
        try:
            for path in paths:
                if _sum(path) != files.get(path.name):
                    raise DamagedCheckpointError(f"{path}: size or checksum is not that of what was written")
            if len(paths) == 1 and len(files) == self._num_parts:
                return Checkpoint(step, load_file(paths[0]), state)
            return Checkpoint(step, read_part(paths, self._rank if self._sharded else 0, self._num_parts), state)
        except (FileNotFoundError, SafetensorError) as error:
            if errno_of(error) not in (0, errno.ENOENT):
                raise
            raise DamagedCheckpointError(f"{folder}: {error}") from error

    @property
    def _num_parts(self) -> int:
        """The number of parts that the tensors of this run are cut into."""
        return self._world_size if self._sharded else 1

    def _ranks_read(self, num_files: int) -> list[int]:
        """The ranks whose files of a checkpoint this worker reads: its own, or all where tensors are cut anew."""
        if num_files == self._num_parts:
            return [self._rank if self._sharded else 0]
        return list(range(num_files))

    def remove(self, step: int) -> None:
        shutil.rmtree(self._folder / name_of(step))

    def remove_unfinished(self) -> None:
        """Remove what earlier attempts were writing when they ended. Called before anything is saved."""
        if self._folder.is_dir():
            for path in self._folder.glob(f".{STEP}*"):
                shutil.rmtree(path, ignore_errors=True)

    def remove_all(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def read_part(paths: list[Path], part: int, num_parts: int) -> dict[str, Tensor]:
    """One of `num_parts` parts of tensors that are stored as the consecutive parts `paths`; numbers [] are in each.

    Parts are cut as `torch.chunk` and FSDP2 cut: of equal size but for the last ones, which may be smaller or empty.
    """
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for name in files[0].keys():  # noqa: SIM118 (it is no dictionary)
            slices = [file.get_slice(name) for file in files]
            if not slices[0].get_shape():
                tensors[name] = files[0].get_tensor(name)
                continue
            sizes = [one.get_shape()[0] for one in slices]
            size = -(-sum(sizes) // num_parts)
            first, stop, start, found = part * size, (part + 1) * size, 0, []
            for one, length in zip(slices, sizes, strict=True):
                begin, end = max(first - start, 0), min(stop - start, length)
                found.append(one[min(begin, length) : max(end, min(begin, length))])
                start += length
            tensors[name] = torch.cat(found)
    return tensors


class Writer:
    """A call in a separate thread, whose outcome is collected later."""

    def __init__(self, call: Callable[[], None], name: str) -> None:
        self._call = call
        self._error: BaseException | None = None
        # Not a daemon: an interpreter that ends in good order finishes the write.
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def newest_step(stage_dir: Path) -> int:
    """The step of the newest whole checkpoint of a job, whoever works on it and wherever; 0 where it has none."""
    folder = stage_dir / CHECKPOINTS
    mirror = mirror_of(folder)
    if mirror is not None:
        names = [name.partition("/")[0] for name in mirror.names(folder) if name.endswith(f"/{MANIFEST}")]
    else:
        names = [path.name for path in folder.glob(f"{STEP}*")]
    return max(steps_of(names), default=0)


def steps_of(names: Iterable[str]) -> list[int]:
    """The steps in the names of checkpoints' folders; other names are passed over."""
    found = (name.removeprefix(STEP) for name in names)
    return [int(step) for step in found if step.isdigit()]


def name_of(step: int) -> str:
    return f"{STEP}{step:08d}"


def file_of(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _receipt(path: Path) -> Path:
    return path.with_suffix(".json")


def _sum(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Flush to the disk, so that a power failure loses nothing; does nothing where the file system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
