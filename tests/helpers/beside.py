"""What a process does that runs beside another one; nothing is imported, so that it starts at once."""

from __future__ import annotations

from typing import Any


def waits(ready: Any, stop: Any) -> None:
    """Until it is told to stop."""
    ready.set()
    stop.wait()


def dies(ready: Any, stop: Any) -> None:
    """Before it is ready."""
    raise SystemExit(3)
