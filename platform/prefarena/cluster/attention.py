"""Whether attention, which is compiled where it runs, works on a node's GPU; and if not, what the node lacks."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefarena.cluster.capacity import has_labels, labels_of
from prefarena.cluster.probe import driver_version
from prefarena.cluster.waiting import failure_of_task
from prefarena.failures import in_one_line
from prefarena.modeling.arithmetic import Arithmetic, attends_in, products_of
from prefarena.modeling.attention_trial import TOLERANCE, Heads, difference

#: The oldest driver of each major version of CUDA.
_DRIVERS = {11: 450, 12: 525, 13: 580}
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Toolchain:
    """Tools for compiling for a GPU. compiler: a path; headers: whether Python's exist; cuda: torch's version."""

    compiler: str | None
    headers: bool
    driver: str | None
    cuda: str | None


def toolchain() -> Toolchain:
    """The tools of this machine. Compiler and headers are looked for where Triton looks."""
    named = os.environ.get("CC")
    found = (shutil.which(name) for name in ([named] if named else ["gcc", "clang"]))
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme is for packages that are added; its Python's headers are where the plain one says.
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return Toolchain(
        next(filter(None, found), None), (Path(folder) / "Python.h").exists(), driver_version(), torch.version.cuda
    )


def lacking(tools: Toolchain) -> str | None:
    """Say what compiling for a GPU lacks here, with the remedy; None if nothing is missing."""
    if tools.cuda is None:
        return "its torch is built without CUDA; install the official build of the same version"
    oldest = _DRIVERS.get(int(tools.cuda.split(".")[0]))
    if tools.driver is None:
        wanted = f" of at least {oldest}" if oldest else ""
        return f"no NVIDIA driver answers there (nvidia-smi); install one{wanted}, or fix it"
    if oldest is not None and int(tools.driver.split(".")[0]) < oldest:
        return (
            f"its NVIDIA driver {tools.driver} is too old for torch's CUDA {tools.cuda}; install {oldest} or newer, or "
            "use a machine image that has it"
        )
    if tools.compiler is None:
        return "it has no C compiler, which Triton needs; install gcc (apt-get install gcc), or have CC name one"
    if not tools.headers:
        return f"it has no Python.h, which Triton needs; install Python's headers (apt-get install python{_PYTHON}-dev)"
    return None


def why_not(heads: Heads, arithmetics: Sequence[Arithmetic], device: str = "cuda") -> str | None:
    """Say why attention does not work on this process's GPU, in one sentence; None if it does. May take a minute."""
    for name in arithmetics:
        try:
            with products_of(name):
                differs = difference(heads, attends_in(name), device)
        except Exception as error:  # whatever a compiler, a driver or a card raises is what was asked for
            return lacking(toolchain()) or f"{type(error).__name__}: {in_one_line(error)}"
        if not differs <= TOLERANCE[attends_in(name)]:
            return f"in {name} its values are others than on a CPU, by {differs:.2g} of the largest"
    return None


def ask_gpu_nodes(
    heads: Heads, arithmetics: Sequence[Arithmetic], share: float, selectors: Sequence[tuple[str, str]], limit_s: float
) -> tuple[dict[str, str | None], list[str]]:
    """`why_not` of each node that meets the label selectors and has such a share of a GPU; and the names of those that
    have not answered in time, whose GPUs are in use or which still compile. Needs Ray.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A process of its own: it keeps no memory of the GPU when it has answered.
    task, asked = ray.remote(num_cpus=0, num_gpus=share, max_retries=0, max_calls=1)(why_not), {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("GPU", 0.0) >= share and has_labels(labels_of(node), selectors):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{node['NodeManagerAddress']}/{node['NodeID'][:8]}"
            asked[task.options(scheduling_strategy=here).remote(heads, tuple(arithmetics))] = name
    if not asked:
        return {}, []
    ended, silent = ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
    for ref in silent:
        ray.cancel(ref, force=True)
    return {asked[ref]: _answer(ref, limit_s) for ref in ended}, sorted(asked[ref] for ref in silent)


def _answer(ref: Any, limit_s: float) -> str | None:
    import ray

    try:
        answer: str | None = ray.get(ref, timeout=limit_s)
    except ray.exceptions.RayError as error:
        reason = failure_of_task(error)
        if reason is None:
            raise
        return reason
    return answer
