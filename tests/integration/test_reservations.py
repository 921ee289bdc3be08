"""What a dead actor has reserved is free for others, and what anybody else has reserved is not."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import ray
from ray import cloudpickle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from waiting import wait_until

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


def is_dead(actor: Any) -> bool:
    """Whether it has died: Ray kills it at some time after it was told to, and until then it does what it is asked."""
    try:
        ray.get(actor.answer.remote(), timeout=30)
    except ray.exceptions.RayActorError:
        return True
    return False


def num_reserved() -> int:
    """How many groups hold something, or are about to."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


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
        wait_until(lambda: is_dead(dead), "the actor to die", 30)
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
    before = num_reserved()

    def nothing_is_left() -> bool:
        free_reservations_of_the_dead()
        return num_reserved() == before

    for _ in range(4):
        actor = remote.remote()
        ray.get(actor.reserve.remote())
        ray.kill(actor)
        actor.reserve.remote()  # which is still carried out if it is faster than the kill
        wait_until(partial(is_dead, actor), "the actor to die", 30)
        wait_until(nothing_is_left, "what it had reserved to be free", 30)
