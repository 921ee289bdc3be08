"""Fixtures shared by the whole run: one Ray session, so that its start-up is paid once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


if process := os.environ.get("PYTEST_XDIST_WORKER"):
    # Ray's folder says which cluster runs on this machine, and whoever finds one there joins it.
    os.environ.setdefault("RAY_TMPDIR", f"/tmp/prefarena-tests-{os.getuid()}-{process}")
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)


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
