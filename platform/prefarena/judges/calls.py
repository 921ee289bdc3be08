"""Calls of a judge's endpoint that have been paid for, kept by their content so that none is paid for twice.

Each process appends to files of its own, one line a call, written at once; so a process that is killed leaves at most
one line that is cut off, the last of its file, which the next reader ignores and counts. On an object store files are
sent when they are some seconds old and never change afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefarena import mirror

#: Where the output is an object store: seconds of calls that are lost at most with a node. Each costs an object.
_SEND_EVERY_S = 10.0


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    length: int


def call_key(request: Mapping[str, Any]) -> str:
    """Names a call by everything that its answer depends on: endpoint, model, messages and settings."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Calls:
    """The answers of endpoints, in a folder that any number of processes use at once."""

    def __init__(self, folder: str | Path) -> None:
        """Reads what is there; `num_torn` counts the lines that were cut off."""
        self._folder = Path(folder)
        self.num_torn = 0
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._size, self._sent_at = 0, time.monotonic()
        stored = mirror.gather(self._folder)
        for file in self._folder.glob("*.jsonl") if mirror.mirror_of(self._folder) else []:
            if file.name not in stored and not _runs(int(file.name.split("-")[1])):
                mirror.push(file)  # whoever wrote it died before it was sent
        for file in sorted(self._folder.glob("*.jsonl")):  # of two answers to one call, the same one counts each time
            self._index(file)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> str | None:
        """The body of the response to a call; None where it has not been paid for yet."""
        place = self._places.get(key)
        if place is None:
            return None
        with place.file.open("rb") as file:
            file.seek(place.offset)
            return str(json.loads(file.read(place.length))["body"])

    def put(self, key: str, body: str) -> None:
        """Keep the body of a response: after this it outlives the process."""
        line = json.dumps({"key": key, "body": body}).encode() + b"\n"
        with self._lock:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
                self._file, self._size = self._folder / name, 0
            try:
                _append(self._file, line)
            except OSError:
                self._file = None  # which may end in a part of the line
                raise
            self._places.setdefault(key, _Place(self._file, self._size, len(line)))
            self._size += len(line)
            due = time.monotonic() - self._sent_at > _SEND_EVERY_S
        if due:
            self.send()

    def send(self) -> None:
        """Send what was paid for to the object store, if the output is on one."""
        if mirror.mirror_of(self._folder) is None:
            return
        with self._lock:
            file, self._file = self._file, None
            self._sent_at = time.monotonic()
        if file is not None:
            mirror.push(file)

    def _index(self, file: Path) -> None:
        offset = 0
        with file.open("rb") as lines:
            for line in lines:
                key = _key_of(line)
                if key is None:
                    self.num_torn += 1
                else:
                    self._places.setdefault(key, _Place(file, offset, len(line)))
                offset += len(line)


def _append(file: Path, line: bytes) -> None:
    """Append in one write, so that other processes see the whole line or its beginning, and no other line within it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
    finally:
        os.close(descriptor)


def _runs(pid: int) -> bool:
    """Whether a process of this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _key_of(line: bytes) -> str | None:
    """The key of the call that a line holds; None if the line was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        parsed = json.loads(line)
        return str(parsed["key"]) if isinstance(parsed["body"], str) else None
    except (ValueError, KeyError, TypeError):
        return None
