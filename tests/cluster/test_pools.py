"""Actors of Ray Data pools that die: what they were at is done again, once, and nothing is restarted without an end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pools_that_die
import pytest
from test_reference import run, write_pairs

from pipelines import reference, streaming
from prefarena.cluster.pools import MOST_DEATHS, map_in_pool, through_deaths
from prefarena.config import TextTask
from prefarena.data.preparation import COLUMNS
from prefarena.data.sources import find_parts
from prefarena.data.tables import read_rows
from prefarena.data.tokenization import train_tokenizer


@pytest.fixture(scope="module", autouse=True)
def sent_to_actors() -> None:
    """Actors of the shared Ray do not have the folder of tests on their path."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(pools_that_die)


def test_what_an_actor_raises_when_it_is_made_is_not_tried_again(ray_session: None) -> None:
    import ray.data
    import ray.exceptions

    attempts = []

    def attempt() -> Iterator[object]:
        attempts.append(1)
        data = map_in_pool(ray.data.range(1), pools_that_die.CannotBeMade, 1)
        yield from data.iter_batches(batch_size=None)

    with pytest.raises(ray.exceptions.RayActorError, match="no such model"):
        list(through_deaths(attempt, "dying"))
    assert len(attempts) == 1


@pytest.mark.parametrize("num_done", [0, 3])
def test_an_attempt_follows_a_death_until_too_many_follow_each_other(ray_session: None, num_done: int) -> None:
    import ray.exceptions

    attempts: list[int] = []
    done: list[int] = []

    def attempt() -> Iterator[int]:
        attempts.append(len(done))
        if len(done) < num_done:
            yield len(done)
        raise ray.exceptions.ActorDiedError()

    with pytest.raises(ray.exceptions.ActorDiedError):
        for item in through_deaths(attempt, "counting"):
            done.append(item)
    assert done == list(range(num_done))
    # A death that follows an item begins a new count: the last item's own death is the first of those in a row.
    assert len(attempts) == num_done + MOST_DEATHS - (1 if num_done else 0)


def test_rows_of_data_come_once_and_in_order_when_an_actor_dies(ray_session: None, tmp_path: Path) -> None:
    for name in "abc":
        lines = ({"prompt": f"Question {name}{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TextTask(data=str(tmp_path), max_prompt_tokens=60, max_response_tokens=20)
    train_tokenizer(["Question yes no 1 2 3"], 300, tmp_path / "tokenizer")
    parts = find_parts(task.data, task.split)

    def ids(prepare: streaming.Prepare) -> list[str]:
        stream = streaming.stream(task, parts, COLUMNS, None, prepare, (str(tmp_path / "tokenizer"), None), 1)
        return [one for rows in stream for one in rows["id"].to_pylist()]

    assert ids(pools_that_die.prepare_and_die) == ids(pools_that_die.prepare)
    assert (tmp_path / "died").exists()


def test_a_scoring_actor_that_dies_loses_only_the_part_it_was_at(
    ray_session: None, tmp_path: Path, tiny_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "pairs", {"train_pairs": 70, "test_pairs": 20})
    run(pairs, tiny_policy, tmp_path / "whole", tmp_path / "whole_cache")
    monkeypatch.setattr(reference, "ReferenceLogps", pools_that_die.ScoresAndDies)
    run(pairs, tiny_policy, tmp_path / "died", tmp_path / "cache")
    assert (tmp_path / "cache" / "died").exists()
    for split in reference.SPLITS:
        assert read_rows(tmp_path / "died" / split).equals(read_rows(tmp_path / "whole" / split))


def test_an_actor_that_always_dies_ends_the_pipeline(ray_session: None) -> None:
    import ray.data
    import ray.exceptions

    def attempt() -> Iterator[object]:
        data = map_in_pool(ray.data.range(1), pools_that_die.AlwaysDies, 1, batch_format="pyarrow")
        yield from data.iter_batches(batch_size=None)

    with pytest.raises(ray.exceptions.RayActorError):
        list(through_deaths(attempt, "dying"))


_POOL = """
import ray
import ray.data
from prefarena.cluster.pools import map_in_pool
from prefarena.cluster.session import ray_session

class Same:
    def __call__(self, batch):
        return batch

with ray_session():
    data = map_in_pool(ray.data.range(8), Same, 1)
    print(sum(len(batch["id"]) for batch in data.iter_batches()))
"""


def test_a_pool_starts_without_an_error_line(ray_session: None) -> None:
    ran = subprocess.run([sys.executable, "-c", _POOL], capture_output=True, text=True, timeout=180, check=True)
    assert ran.stdout.split() == ["8"]
    assert "max_restarts" not in ran.stderr and "deprecated" not in ran.stderr
