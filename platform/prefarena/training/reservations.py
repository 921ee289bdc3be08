"""Reservations (Ray's placement groups) that outlive the actor that made them."""

from __future__ import annotations

import logging
from typing import Any

_logger = logging.getLogger(__name__)


def free_reservations_of_the_dead() -> int:
    """Remove the placement groups that actors of this driver made which are dead. Returns how many there were.

    Ray keeps them until the driver ends. Ray Train has an actor that removes those of a controller that died, but it
    asks the dashboard about the controller, which a local cluster does not have, and it learns of a group only when
    all of its workers have started. Until then a new controller's workers find no room.

    A group that was asked for as the actor died may be made afterwards, and Ray does not mark it as a dead one's
    (`creator_actor_dead`). So it is the actors that are asked about.
    """
    import ray
    from ray._private.state import actors, state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    generated: Any = gcs_pb2  # its names are made at run time
    dead = actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()), actor_state_name="DEAD")
    num_removed = 0
    for stored in state._connect_and_get_accessor().get_placement_group_table():
        table = generated.PlacementGroupTableData.FromString(stored)
        is_left = table.creator_actor_id.hex() in dead and table.state != generated.PlacementGroupTableData.REMOVED
        if is_left and not table.is_detached:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(table.placement_group_id)))
            num_removed += 1
    if num_removed:
        _logger.info("%d placement groups of dead actors were removed", num_removed)
    return num_removed
