"""Fixtures shared by the whole run: one Ray session, so that its start-up is paid once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


#: Modules whose tests start processes of their own, beside those that use the Ray session.
_START_PROCESSES = {
    "test_end_to_end", "test_failed_entries", "test_families", "test_jobs", "test_leases", "test_memory",
    "test_moving_reference_workers", "test_nodes", "test_object_store", "test_on_policy_gradients",
    "test_on_policy_scale", "test_page_in_browser", "test_placement", "test_pools", "test_ppo_training",
    "test_scale", "test_trial", "test_two_at_once", "test_waiting", "test_whole_step",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make quick` leaves out."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()) or item.path.stem in _START_PROCESSES:
            item.add_marker("processes")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with four logical CPUs: workers are tiny, and two of them must be placeable beside an actor."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama over 16 tokens, untied."""
    from tiny import save_tiny_policy

    return save_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def generator(ray_session: None, tiny_policy: str) -> Iterator[Any]:
    """The one vLLM engine of a test run, started from `tiny_policy`. Every test gives it its own weights first."""
    from prefarena.config import Generation
    from prefarena.generation.fleet import Generators

    running = Generators.start(
        tiny_policy, Generation(), max_model_len=512, use_gpu=False, names=("test-generator",), seed=0
    )
    yield running
    running.stop()
