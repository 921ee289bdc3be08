"""Timed passes run beside what Ray has running beside trainings."""

from __future__ import annotations

import time

import psutil
import pytest

from prefarena.errors import UserError
from prefarena.estimate.beside_ray import beside_ray


def idle_actors() -> int:
    found = 0
    for one in psutil.Process().children(recursive=True):
        try:
            found += "ray::_Idle" in " ".join(one.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def test_ray_has_its_processes_of_two_trainings_while_passes_are_timed(ray_session: None) -> None:
    with beside_ray(2) as in_use:
        assert idle_actors() == 10
        in_use()
        time.sleep(1.0)
        assert 0.02 < in_use() < psutil.cpu_count()
    limit = time.monotonic() + 30
    while idle_actors() and time.monotonic() < limit:
        time.sleep(0.1)
    assert idle_actors() == 0


def test_rays_processes_that_do_not_start_in_time_are_told_in_a_sentence(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefarena.estimate.beside_ray._START_S", 0.001)
    with pytest.raises(UserError, match="did not start 5 idle processes"), beside_ray(1):
        pass
