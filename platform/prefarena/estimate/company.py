"""Processes that train while passes are timed: trainings that run side by side share a machine's memory and caches.

A pass whose weights are many times the size of the caches waits for memory, and waits longer where a second process
does the same; a thread's own seconds hold that wait.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from prefarena.errors import UserError

_START_S = 300.0


class Flag(Protocol):
    """What processes tell each other by."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...


@contextmanager
def company(number: int, work: Callable[[Flag, Flag], None], seconds: float = _START_S) -> Iterator[None]:
    """In it so many processes are at `work(ready, stop)`, which sets `ready` once it has begun, and ends after `stop`.

    Raises UserError where one of them has ended, or not begun in so many seconds: there is no room for it, then.
    """
    context = multiprocessing.get_context("spawn")  # a forked process would have this one's threads half
    stop, readies = context.Event(), [context.Event() for _ in range(number)]
    others = [context.Process(target=work, args=(ready, stop), daemon=True) for ready in readies]
    try:
        for one in others:
            one.start()
        limit = time.monotonic() + seconds
        for one, ready in zip(others, readies, strict=True):
            while not ready.wait(0.1):
                if not one.is_alive() or time.monotonic() > limit:
                    raise UserError(
                        f"{number + 1} trainings do not run side by side here, as resources.concurrent_runs and "
                        "resources.num_workers ask for; lower them, or make room"
                    )
        yield
    finally:
        stop.set()
        for one in others:
            if one.pid is not None:
                one.join(seconds)
                one.kill()
