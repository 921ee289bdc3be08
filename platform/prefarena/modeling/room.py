"""The memory that a worker may take, and the passes that are tried, the largest first, until one fits into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

SMALLEST_PASS = 512  # tokens; off-policy passes are not made smaller than this to save memory
LARGEST_MICRO_BATCH = 64  # rollouts in a pass of an on-policy method
#: Of a machine's or a GPU's memory; the rest is the system's, the object store's, or lost in pieces.
USABLE = 0.8
#: Of version 2 and version 1 of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_mib(limits: Sequence[Path] = _LIMITS) -> float:
    """Memory of this machine, or what its container may take where that is less. `limits`: files with it, in bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in limits:
        text = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
        total = min(total, total if text == "max" else int(text))
    return total / 2**20


def share_mib(total: float, num_side_by_side: int) -> float:
    """The share of a machine's memory that each of its workers may take, in MiB."""
    return total * USABLE / num_side_by_side
