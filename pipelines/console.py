"""The console on which commands print."""

from __future__ import annotations

import sys

from rich.console import Console

_PLAIN_WIDTH = 170  # of lines that go to a file or a job's log


def new_console(quiet: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for the table if there is none. quiet: it prints nothing."""
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH, quiet=quiet)
