"""An `output` on an object store: every node keeps a copy of what it works on or reads, in its own folder.

The path of a copy tells where it belongs: CACHE/prefarena-mirror/URL/… with the URL percent-encoded. So any process on
any node finds the store from a path alone. Whoever makes something publishes it, and what is waited for comes last;
whoever reads something brings it first. For a path that is no such copy nothing here does anything but look at the path
itself: storage that nodes share is used as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from prefarena import stores
from prefarena.errors import UserError
from prefarena.stage_files import CHECKPOINTS, FAILURE, MANIFEST

_TOP, _WHOLE, _STAGES = "prefarena-mirror", ".whole", "stages"
_LONGEST_NAME = 240
#: Of a stage, written last: the one or the other says that there is nothing more to come.
_LAST = (MANIFEST, FAILURE)


@dataclass(frozen=True)
class Mirror:
    """A node's copy of a store. root: the copy of what lies under `url`."""

    root: Path
    url: str

    def url_of(self, path: str | Path) -> str:
        return f"{self.url}/{Path(path).relative_to(self.root).as_posix()}"

    def read(self, path: str | Path) -> bytes | None:
        """Read what the store holds for `path`; None if it holds nothing."""
        return stores.read(self.url_of(path))

    def write(self, path: str | Path, data: bytes) -> None:
        stores.write(self.url_of(path), data)

    def names(self, folder: str | Path) -> dict[str, dict[str, Any]]:
        """Names, relative to `folder`, of the files that the store has under it."""
        return stores.listed(self.url_of(folder))

    def remove(self, path: str | Path) -> None:
        """Remove a file, or all files under a folder, from the store."""
        stores.remove(self.url_of(path))


def root_of(output: str, cache_dir: str | None) -> Path:
    """Where this node has the stages of an `output`: the folder itself, or a copy under the cache where it is a URL."""
    if not stores.is_url(output):
        return Path(output).absolute()
    name = quote(output.rstrip("/"), safe="")
    if len(name) > _LONGEST_NAME:
        raise UserError(f"output: {output} is too long to name its copy on a node; use a shorter prefix")
    cache = cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "prefarena")
    return Path(cache).expanduser().absolute() / _TOP / name


def mirror_of(path: str | Path) -> Mirror | None:
    """The store that `path` is a copy from; None if it is no copy."""
    parts = Path(path).parts
    for place in range(len(parts) - 1):
        if parts[place] == _TOP and "%3A%2F%2F" in parts[place + 1]:
            return Mirror(Path(*parts[: place + 2]), unquote(parts[place + 1]))
    return None


def shown(path: str | Path) -> str:
    """The path or URL under which people find it."""
    mirror = mirror_of(path)
    return str(path) if mirror is None else mirror.url_of(path)


def is_file(path: Path) -> bool:
    mirror = mirror_of(path)
    return path.is_file() if mirror is None else mirror.read(path) is not None


def read_text(path: Path) -> str:
    """Read a text file. Raises FileNotFoundError where there is none."""
    mirror = mirror_of(path)
    if mirror is None:
        return path.read_text(encoding="utf-8")
    data = mirror.read(path)
    if data is None:
        raise FileNotFoundError(mirror.url_of(path))
    return data.decode("utf-8")


def remove_file(path: Path) -> None:
    """Remove a file here and in the store; harmless where there is none."""
    path.unlink(missing_ok=True)
    if (mirror := mirror_of(path)) is not None:
        mirror.remove(path)


def workspace(folder: Path) -> None:
    """Empty this node's copy of a stage that is done here, whatever its driver's node is."""
    if mirror_of(folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


# ------------------------------------------------------------------------------------------ to the store


def push(path: Path, known: dict[str, tuple[int, int]] | None = None) -> None:
    """Send a file or a folder's files, without checkpoints, hidden ones, and those that say that a stage has ended.

    known: size and time of what was sent before, which is not sent again as long as it has not changed.
    """
    mirror = mirror_of(path)
    if mirror is None:
        return
    for file in [path] if path.is_file() else _files(path):
        status = file.stat()
        mark = (status.st_size, status.st_mtime_ns)
        if known is None or known.get(str(file)) != mark:
            stores.upload(file, mirror.url_of(file))
        if known is not None:
            known[str(file)] = mark


def publish(folder: Path, last: str) -> None:
    """Send a stage, and the file `last` behind everything else; what the store has beside a finished stage goes."""
    mirror = mirror_of(folder)
    if mirror is None:
        return
    push(folder)
    if last == _LAST[0]:
        here = {file.relative_to(folder).as_posix() for file in _files(folder)}
        for name in set(mirror.names(folder)) - here - set(_LAST):
            if not name.startswith(f"{CHECKPOINTS}/"):
                mirror.remove(folder / name)
    data = (folder / last).read_bytes()
    mark = _mark(mirror, folder, "")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(_digest(data), encoding="ascii")
    mirror.write(folder / last, data)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part[0] == "." for part in below.parts)
        if path.is_file() and below.parts[0] != CHECKPOINTS and not hidden and str(below) not in _LAST:
            yield path


# ---------------------------------------------------------------------------------------- from the store


def bring(path: str | Path) -> None:
    """Bring a stage's file or folder to this node, up to date if the stage is finished, else only if it is not here."""
    path = Path(path)
    mirror = mirror_of(path)
    if mirror is None:
        return
    below = path.relative_to(mirror.root).parts
    if below[0] != _STAGES or len(below) < 3:
        if not path.exists():
            _download(mirror, path)
        return
    stage, part = mirror.root.joinpath(*below[:2]), below[2]
    with _alone(mirror, below[1]):
        data = next((found for last in _LAST if (found := mirror.read(stage / last)) is not None), None)
        digest = "" if data is None else _digest(data)
        marks = [_mark(mirror, stage, ""), _mark(mirror, stage, part)]
        if (stage / part).exists() and (data is None or any(_read(mark) == digest for mark in marks)):
            return
        _download(mirror, stage / part)
        if data is not None:
            marks[1].parent.mkdir(parents=True, exist_ok=True)
            marks[1].write_text(digest, encoding="ascii")


def bring_anew(path: str | Path) -> None:
    """Bring what the store has of a stage under way, replacing what an earlier attempt left on this node."""
    path = Path(path)
    if (mirror := mirror_of(path)) is not None:
        with _alone(mirror, path.relative_to(mirror.root).parts[1]):
            _download(mirror, path)


def pull(folder: Path) -> None:
    """Bring to this node what the store has of a stage under way, without checkpoints; other files stay."""
    mirror = mirror_of(folder)
    if mirror is None:
        return
    for name in mirror.names(folder):
        if not name.startswith(f"{CHECKPOINTS}/") and name not in _LAST:
            stores.download(mirror.url_of(folder / name), folder / name)


def gather(folder: Path) -> set[str]:
    """Bring to this node the files directly in a folder of the store, whose files never change once written.

    Returns their names; none for a folder that is no copy.
    """
    mirror = mirror_of(folder)
    if mirror is None:
        return set()
    names = {name for name in mirror.names(folder) if "/" not in name}
    for name in names:
        if not (folder / name).exists():
            _download(mirror, folder / name)
    return names


def _download(mirror: Mirror, path: Path) -> None:
    """Download a file or a folder, replacing what is here; does nothing where the store has none."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    names = mirror.names(path)
    for name in names:
        stores.download(mirror.url_of(path / name if name else path), new / name if name else new)
    if not names:
        return
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(new, path)


@contextmanager
def _alone(mirror: Mirror, name: str) -> Iterator[None]:
    """A context that one process of this node enters at a time."""
    folder = mirror.root / _WHOLE
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mark(mirror: Mirror, stage: Path, part: str) -> Path:
    """The file with the digest of the last file of the stage whose `part` ("": all of it) is here whole."""
    return mirror.root / _WHOLE / f"{stage.name}.{part}.digest"


def _read(path: Path) -> str | None:
    return path.read_text(encoding="ascii") if path.is_file() else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
