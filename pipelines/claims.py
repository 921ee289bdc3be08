"""Which of several comparisons on shared storage runs a stage: the first does, the others wait and reuse it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from prefarena.errors import UserError
from prefarena.leases import Leases
from prefarena.mirror import shown
from prefarena.stages import is_settled

Item = TypeVar("Item")

_POLL_S = 1.0


def settle(console: Console, items: Mapping[Path, Item], work: Callable[[list[Item]], None]) -> None:
    """Bring every stage to its end, finished or failed. `items`: stage folder to what `work` is given.

    `work` gets those that no other process is working on. The others are waited for, as long as their holders are
    alive, and done here where a holder dies first.
    """
    waiting, said = {folder: item for folder, item in items.items() if not is_settled(folder)}, set()
    with Leases() as leases:
        while waiting:
            holders = {folder: leases.take(lease_of(folder)) for folder in waiting}
            ours = [folder for folder, holder in holders.items() if holder is None and not is_settled(folder)]
            if ours:
                work([waiting[folder] for folder in ours])
                missing = [folder.name for folder in ours if not is_settled(folder)]
                if missing:
                    raise RuntimeError(f"done without a result: {', '.join(missing)}")
            for folder in waiting:
                leases.release(lease_of(folder))
            for folder, holder in holders.items():
                # While there was work here the holders may have ended, or been followed by others: they are read again.
                if holder is not None and not ours and folder not in said:
                    said.add(folder)
                    console.print(f"waiting for {folder.name}, which another comparison is working on ({holder})")
            waiting = {folder: item for folder, item in waiting.items() if not is_settled(folder)}
            if waiting and not ours:
                time.sleep(_POLL_S)


def lease_of(folder: Path) -> Path:
    """The lease of a stage. It is outside the stage's own folder, which may be emptied while it is unfinished."""
    return folder.parent.parent / "leases" / f"{folder.name}.json"


@contextmanager
def only_once(name: str, folder: Path) -> Iterator[None]:
    """A context that one process at a time enters for each run folder. Raises UserError where another is in it."""
    path = folder.parent / "leases" / f"{folder.name}.json"
    with Leases() as leases:
        holder = leases.take_or_tell(path)
        if holder is not None:
            raise UserError(
                f"comparison {name!r} is already running: {holder} ({shown(path)}); wait for it, stop it, or set "
                f"`output` to another folder"
            )
        yield
