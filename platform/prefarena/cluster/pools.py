"""Ray Data pipelines over pools of actors, which may die on the way.

A pool of Ray Data hands its actors their code by reference, and Ray cannot promise to restart such an actor when the
code's owner is gone: it prints an error line about `max_restarts` at the start of every pool (ray-project/ray#53727).
An actor that dies because the node has no memory for it would also be restarted without an end. So no actor of a pool
is restarted here. The pipeline ends with the actor, and is run again over what it has not done yet.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prefarena.failures import cluster_answers, in_one_line

_Item = TypeVar("_Item")
MOST_DEATHS = 3  # in a row, with nothing done in between

_logger = logging.getLogger(__name__)


def map_in_pool(data: Any, make: type, size: int, **options: Any) -> Any:
    """`data.map_batches` with `options`, by a pool of `size` actors of the class `make`; Ray restarts none of them."""
    from ray.data import ActorPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        # Ray 2.60 has no named parameter for restarts, and warns of every option that it only passes on.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return data.map_batches(make, compute=ActorPoolStrategy(size=size), max_restarts=0, **options)


def through_deaths(attempt: Callable[[], Iterator[_Item]], what: str) -> Iterator[_Item]:
    """Yield what `attempt` yields; where one of its actors dies, make another attempt.

    attempt: yields what has not been done or yielded before. what: is done, for the line that tells of a death. Raises
    Ray's error when actors died `MOST_DEATHS` times in a row before the next item came, when an actor could not be
    made, or when the cluster is gone.
    """
    import ray.exceptions

    num_deaths = 0
    while True:
        try:
            for item in attempt():
                num_deaths = 0
                yield item
            return
        except ray.exceptions.RayActorError as error:
            num_deaths += 1
            # What an actor raises in its constructor it would raise again.
            if error.actor_init_failed or num_deaths >= MOST_DEATHS or not cluster_answers():
                raise
            _logger.warning("%s: a process died, and its work in progress is done again (%s)", what, in_one_line(error))
