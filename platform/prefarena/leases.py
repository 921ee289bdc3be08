"""Leases on work in shared storage, so that two runs do not do the same thing at once.

A lease is a small file that its holder renews every few seconds. An operating system lock would do on one machine,
but on network file systems it may hold on one machine only, or outlive its holder; an object store has none, and there
conditional writes decide who takes a lease, renews it or takes it over. A lease is taken from a holder that
is dead: at once where it ran on this machine, else when it has not been renewed for a while, as timed here, so clocks
need not agree.

Two holders at once are possible for a moment where one was suspended for so long. What they write is the same, file by
file, and each file is written whole.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prefarena import stores
from prefarena.mirror import mirror_of, read_text, remove_file
from prefarena.stages import write_json

_RENEW_S = 5.0
#: A lease that was not renewed for so long is its holder's no longer.
_STALE_S = 60.0
_POLL_S = 0.2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease. `machine`: of a running kernel, and what processes can see each other on it."""

    host: str
    machine: str
    pid: int
    process_start: str
    since: str
    token: str

    @staticmethod
    def here() -> Holder:
        """Make a holder that stands for this process from now on."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return Holder(socket.gethostname(), _machine(), pid, _process_start(pid), since, secrets.token_hex(8))

    def is_dead(self) -> bool:
        """Whether it is known to have ended; nothing is known of another machine's process."""
        return self.machine == _machine() and self.process_start != _process_start(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Leases:
    """Leases that this process holds; a thread renews them until the block ends."""

    def __init__(self, renew_s: float = _RENEW_S, stale_s: float = _STALE_S) -> None:
        self._renew_s, self._stale_s = renew_s, stale_s
        self._holder = Holder.here()
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[str, float]] = {}  # of others: what a lease held, and since when
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path)

    def take(self, path: Path) -> Holder | None:
        """Take a lease. Returns who else has it, or None if it is ours.

        Asked again and again, this finds out that the other is gone and takes its lease.
        """
        if mirror_of(path) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if path in self._held:
                return None
            if not self._create(path):
                content = _content(path)
                if content is None or not self._is_stale(path, content) or not self._take_over(path, content):
                    return _holder(_content(path) or "")  # of one that was just given back: nobody; ask again
            self._held.add(path)
            return None

    def take_or_tell(self, path: Path) -> Holder | None:
        """Take a lease; if its holder is on another machine, wait until it is seen alive or the lease is ours."""
        holder, first = self.take(path), _content(path)
        while holder is not None and holder.machine != _machine() and _content(path) in (first, None):
            time.sleep(_POLL_S)
            holder = self.take(path)
        return holder

    def release(self, path: Path) -> None:
        """Give a lease back; harmless where it is not held, or was taken away."""
        with self._lock:
            if path in self._held:
                self._held.remove(path)
                if self._is_ours(path):
                    remove_file(path)

    def _create(self, path: Path) -> bool:
        if (mirror := mirror_of(path)) is not None:
            return stores.create(mirror.url_of(path), json.dumps(self._entry(0)).encode())
        try:
            with path.open("x", encoding="utf-8") as file:  # exclusive, on network file systems too
                file.write(json.dumps(self._entry(0)))
        except FileExistsError:
            return False
        return True

    def _take_over(self, path: Path, content: str) -> bool:
        """Put this holder in the place of a dead one, unless another is just doing so or has done so."""
        if mirror_of(path) is not None:
            return self._replace(path, _holder(content).token, 0)
        turn = path.with_name(f".{path.name}.turn")
        if not self._create(turn):
            other = _content(turn)
            if other is not None and self._is_stale(turn, other):  # it died within these few lines
                turn.unlink(missing_ok=True)
            return False
        try:
            if _holder(_content(path) or "").token != _holder(content).token:
                return False
            write_json(path, self._entry(0))
            return True
        finally:
            turn.unlink(missing_ok=True)

    def _replace(self, path: Path, token: str, beat: int) -> bool:
        """In an object store, replace the entry of the holder with `token` by this holder's, if it is still there."""
        mirror = mirror_of(path)
        found = stores.read_tagged(mirror.url_of(path)) if mirror is not None else None
        if mirror is None or found is None or _holder(found[0].decode()).token != token:
            return False
        return stores.replace(mirror.url_of(path), json.dumps(self._entry(beat)).encode(), found[1])

    def _beat(self, path: Path, beat: int) -> bool:
        """Renew a lease; False means that it is another's."""
        if mirror_of(path) is not None:
            return self._replace(path, self._holder.token, beat)
        if not self._is_ours(path):
            return False
        write_json(path, self._entry(beat))
        return True

    def _entry(self, beat: int) -> dict[str, object]:
        return {**asdict(self._holder), "beat": beat}

    def _is_ours(self, path: Path) -> bool:
        return _holder(_content(path) or "").token == self._holder.token

    def _is_stale(self, path: Path, content: str) -> bool:
        before, since = self._seen.get(path, (None, 0.0))
        if before != content:
            since = time.monotonic()
            self._seen[path] = (content, since)
        return _holder(content).is_dead() or time.monotonic() - since > self._stale_s

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(self._renew_s):
            beat += 1
            with self._lock:
                for path in list(self._held):
                    try:
                        if not self._beat(path, beat):
                            self._held.remove(path)
                            _logger.warning(
                                "the lease %s was taken over by another run, because this one did not renew it in time",
                                path,
                            )
                    except OSError as error:  # the next beat may do better; until then the lease ages
                        _logger.warning("the lease %s could not be renewed: %s", path, error)


def _content(path: Path) -> str | None:
    try:
        return read_text(path)
    except FileNotFoundError:
        return None


def _holder(content: str) -> Holder:
    """The holder that a lease names; one that is being written names nobody yet."""
    try:
        entry = json.loads(content)
    except json.JSONDecodeError:
        return Holder("?", "", 0, "", "just now", "")
    return Holder(**{name: entry[name] for name in Holder.__dataclass_fields__})


def _machine() -> str:
    """Name the running kernel and the namespace of process ids; empty on systems other than Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return secrets.token_hex(8)  # like no other: leases of this process then age, as those of other machines


def _process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; empty where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
