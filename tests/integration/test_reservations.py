"""What a dead actor has reserved is free for others, and what anybody else has reserved is not."""

from __future__ import annotations

import sys
import time
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

    def answer(self) -> None:
        """Nothing, as long as it lives."""


def state(group: PlacementGroup) -> str:
    return placement_group_table(group)["state"]


def wait_for_death(actor: Any, seconds: float = 30) -> None:
    """Ray kills an actor at some time after it was told to; until then it goes on with what it is asked."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ray.get(actor.answer.remote(), timeout=seconds)
        except ray.exceptions.RayActorError:
            return
    pytest.fail(f"the actor was still alive {seconds:g} s after it was killed")


def test_only_what_a_dead_actor_has_reserved_is_freed(ray_session: None) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not importable in actors
    remote: Any = ray.remote(num_cpus=0)(Reserves)
    dead, living = remote.remote(), remote.remote()
    groups = [ray.get(actor.reserve.remote()) for actor in (dead, living)]
    groups.append(placement_group([{"CPU": 1.0}]))  # the driver's own
    try:
        ray.get(groups[-1].ready())
        assert free_reservations_of_the_dead() == 0
        ray.kill(dead)
        wait_for_death(dead)
        assert [state(group) for group in groups] == ["CREATED"] * 3  # Ray leaves it
        assert free_reservations_of_the_dead() == 1
        assert [state(group) for group in groups] == ["REMOVED", "CREATED", "CREATED"]
        assert free_reservations_of_the_dead() == 0
    finally:  # other tests need the CPUs
        for group in groups[1:]:
            remove_placement_group(group)
        ray.kill(living)


def test_what_was_reserved_as_its_actor_died_is_freed_too(ray_session: None) -> None:
    """Ray makes such a group after the actor's death, and does not mark it as a dead one's."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    remote: Any = ray.remote(num_cpus=0)(Reserves)
    before = reserved()
    for _ in range(4):
        dead = remote.remote()
        ray.get(dead.reserve.remote())
        ray.kill(dead)
        dead.reserve.remote()  # which is still carried out if it is faster than the kill
        wait_for_death(dead)
        deadline = time.monotonic() + 30
        while reserved() > before and time.monotonic() < deadline:
            free_reservations_of_the_dead()
            time.sleep(0.1)
        assert reserved() == before


def reserved() -> int:
    """How many groups hold something, or are about to."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())
