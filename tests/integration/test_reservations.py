"""What a dead actor has reserved is free for others, and what anybody else has reserved is not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from prefarena.training.reservations import free_reservations_of_the_dead


class Reserves:
    def reserve(self) -> PlacementGroup:
        group = placement_group([{"CPU": 1.0}])
        ray.get(group.ready())
        return group


def state(group: PlacementGroup) -> str:
    return placement_group_table(group)["state"]


def test_only_what_a_dead_actor_has_reserved_is_freed(ray_session: None) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not importable in actors
    remote: Any = ray.remote(num_cpus=0)(Reserves)
    dead, living = remote.remote(), remote.remote()
    groups = [ray.get(actor.reserve.remote()) for actor in (dead, living)]
    groups.append(placement_group([{"CPU": 1.0}]))  # the driver's own
    ray.get(groups[-1].ready())
    assert free_reservations_of_the_dead() == 0
    ray.kill(dead)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(dead.reserve.remote())
    assert [state(group) for group in groups] == ["CREATED"] * 3  # Ray leaves it
    assert free_reservations_of_the_dead() == 1
    assert [state(group) for group in groups] == ["REMOVED", "CREATED", "CREATED"]
    assert free_reservations_of_the_dead() == 0
    for group in groups[1:]:
        remove_placement_group(group)
    ray.kill(living)
