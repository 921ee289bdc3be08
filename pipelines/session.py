"""Ray for a comparison: started or joined, and checked to have what the comparison asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.memory import check_memory
from pipelines.plan import SeedPlan
from prefarena.cluster.capacity import check_placement, cluster_nodes
from prefarena.cluster.session import check_resources, ray_session
from prefarena.config import Comparison


@contextmanager
def checked_session(config: Comparison, plans: list[SeedPlan]) -> Iterator[None]:
    """Ray for as long as the block lasts. Raises UserError where what is there now cannot hold the comparison.

    A cluster that grows by itself is not checked: what it has now says nothing about what it will have.
    """
    with ray_session() as available:
        if not config.resources.autoscaled:
            check_resources(config, available)
            check_placement(config, cluster_nodes())
            check_memory(config, plans)
        yield
