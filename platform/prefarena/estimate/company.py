"""Processes that train while passes are timed, because training runs side by side share a machine's memory and caches.

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
    """The events that processes signal each other with."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...


@contextmanager
def company(number: int, work: Callable[[Flag, Flag], None], seconds: float = _START_S) -> Iterator[None]:
    """While this is open, `number` processes do `work(ready, stop)`, which sets `ready` once it has begun and ends
    after `stop` is set.

    Raises UserError if one of them ends early or has not begun after `seconds`: then there is no room for it.
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
                        f"this machine has no room for {number + 1} training processes at a time, which "
                        "resources.concurrent_runs and resources.num_workers ask for; lower them, or make room"
                    )
        yield
    finally:
        stop.set()
        for one in others:
            if one.pid is not None:
                one.join(seconds)
                one.kill()
