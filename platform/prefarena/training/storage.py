"""Failing shared storage: calls are repeated while it may recover, and a full disk is reported at once."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from prefarena.errors import StorageError, StorageFullError

Value = TypeVar("Value")

#: What network file systems answer while a server restarts or a link is down.
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "ENOLINK", "EREMOTEIO", "ENOTCONN", "ECONNRESET",
        "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH",
    )
    if hasattr(errno, name)
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0

_logger = logging.getLogger(__name__)


def errno_of(error: OSError | SafetensorError) -> int:
    """The system's number of an error; 0 where it is none of the system's. safetensors tells it in words."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def retried(call: Callable[[], Value], limit_s: float, what: str, pause: Callable[[float], None] = time.sleep) -> Value:
    """Return what `call` returns; while storage fails in a way that may pass, repeat it with ever longer pauses.

    `call` must bear being repeated. Raises StorageError, naming `what`, when it still fails after pauses of
    `limit_s` in all; other errors at once.
    """
    waited, length = 0.0, _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except (OSError, SafetensorError) as error:
            if errno_of(error) not in _PASSING:
                raise
            if waited + length > limit_s:
                raise StorageError(
                    f"{what}: storage has failed for {limit_s:g} s ({error}); resources.storage_retry_s sets the limit"
                ) from error
            _logger.warning("%s: %s; trying again in %g s", what, error, length)
            pause(length)
            waited += length
            length = min(2 * length, _LONGEST_PAUSE_S)


@contextmanager
def full_disk_named(what: str, folder: Path) -> Iterator[None]:
    """Turns a full disk or quota, met within the block, into a StorageFullError that says what was being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = errno_of(error)
        if number not in _FULL:
            raise
        raise StorageFullError(
            f"{what}: no space is left under {folder} ({os.strerror(number)}); free some and run the same command "
            f"again, which continues from the last checkpoint"
        ) from error
