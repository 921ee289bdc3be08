"""Ray: join the cluster that is there, or start a small local one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefarena.cluster.capacity import needed, settings_of, side_by_side
from prefarena.config import Comparison
from prefarena.errors import UserError

_LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


def listen_on_loopback() -> None:
    """Make a local Ray that this process starts answer only on this machine. Call it before Ray is imported.

    Ray's servers take every interface of the machine unless its own address is the loopback's; on Linux this is how it
    is told. A cluster that is joined listens as it was started.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextmanager
def ray_session() -> Iterator[dict[str, float]]:
    """Yields the cluster's total resources. A cluster that was started here is shut down at the end.

    RAY_ADDRESS (set inside a Ray job) names a cluster to join; without it a local one is started, with as many
    CPUs as this machine has.
    """
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Ray Train looks after its workers every so often; a short interval finds a dead one sooner.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local",  # else Ray would join whichever cluster was last started on this machine
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        )
    context = ray.data.DataContext.get_current()
    # After the line above: importing ray.data sets its own level.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def check_resources(config: Comparison, available: dict[str, float]) -> None:
    """Raise UserError if the cluster can never hold at the same time what is requested."""
    asked = requested(config)
    for kind, (amount, why) in asked.items():
        if amount > available.get(kind, 0.0):
            raise UserError(
                f"the cluster has {available.get(kind, 0.0):g} {kind}s, but {amount:g} are asked for ({why}); "
                "lower the setting, or use a larger cluster"
            )


def requested(config: Comparison) -> dict[str, tuple[float, str]]:
    """The resources that must exist at the same time, by kind, and which settings ask for them."""
    asked: dict[str, tuple[float, str]] = {}
    for kind in ("CPU", "GPU") if config.resources.use_gpu else ("CPU",):
        parts = max(side_by_side(config), key=lambda parts: needed(parts, kind))
        why = [f"{settings_of(part, kind)} for {part.what}" for part in parts if part.each.get(kind)]
        asked[kind] = (needed(parts, kind), ", and ".join(why))
    return asked
