"""Rewards that fail as users' own do. Nothing happens outside Ray's actors and tasks, where checks may call them."""

from __future__ import annotations

import os
import signal
from typing import Any

import ray
import torch


def works() -> bool:
    return ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None


def killed(rows: list[dict[str, Any]]) -> list[float]:
    """As the kernel does with a process that takes too much."""
    if works():
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(rows)


def hungry(rows: list[dict[str, Any]]) -> list[float]:
    """More memory than any machine has."""
    if works():
        torch.empty(2**60, dtype=torch.uint8)
    return [0.0] * len(rows)


def short(rows: list[dict[str, Any]]) -> list[float]:
    """One that works: the fewer characters, the better."""
    return [-float(len(row["response"])) for row in rows]


def long(rows: list[dict[str, Any]]) -> list[float]:
    """The opposite, on another scale."""
    return [2.0 * len(row["response"]) for row in rows]
