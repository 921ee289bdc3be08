"""Ray's own processes while passes are timed, because trainings that fill a machine's CPUs share these with them.

Each process of Ray wakes a hundred times a second to look for signals, which takes about a hundredth of a core and
interrupts whoever has it, and Ray Train keeps several for every training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from prefarena.cluster.session import ray_session
from prefarena.errors import UserError

#: What Ray Train 2.60 has for a training besides its workers: the controller, and actors that synchronise workers, hold
#: datasets, remove placement groups, and watch for nodes that will be taken away.
_FOR_A_TRAINING = 5
_START_S = 300.0

#: Returns the number of cores that were in use, on average, since it was last called.
InUse = Callable[[], float]


@contextmanager
def beside_ray(trainings: int) -> Iterator[InUse]:
    """While this is open, Ray runs on this machine with as many processes as it has for so many trainings.

    Yields a function that tells how many cores they use. Raises UserError if they do not start in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with ray_session():
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        idle: Any = ray.remote(_Idle).options(num_cpus=0, scheduling_strategy=here)
        actors = [idle.remote() for _ in range(_FOR_A_TRAINING * trainings)]
        try:
            # A Ray that was started here is a child of this process.
            yield meter(_started(actors) | set(psutil.Process().children(recursive=True)))
        finally:
            for one in actors:
                ray.kill(one)


def _started(actors: list[Any]) -> set[psutil.Process]:
    """The actors' processes. Raises UserError if they do not start in time."""
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        pids = ray.get([one.pid.remote() for one in actors], timeout=_START_S)
    except GetTimeoutError:
        raise UserError(
            f"Ray did not start {len(actors)} idle processes in {_START_S:g} s, as many as it will have beside the "
            "trainings that run at a time; lower resources.concurrent_runs, or make room on this machine"
        ) from None
    return {psutil.Process(pid) for pid in pids}


class _Idle:
    """An actor that does nothing."""

    def pid(self) -> int:
        return os.getpid()


def meter(processes: set[psutil.Process]) -> InUse:
    """A function that tells how many cores these processes use. What has ended by then is not counted."""
    before, since = _cpu_seconds(processes), time.perf_counter()

    def in_use() -> float:
        nonlocal before, since
        # Those that have ended since are left out, as what they used can no longer be read.
        now, at = _cpu_seconds(set(before)), time.perf_counter()
        cores = sum(seconds - before[one] for one, seconds in now.items()) / (at - since)
        before, since = now, at
        return cores

    return in_use


def _cpu_seconds(processes: set[psutil.Process]) -> dict[psutil.Process, float]:
    found = dict[psutil.Process, float]()
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            used = one.cpu_times()
            found[one] = used.user + used.system
    return found
