"""Samples of an evaluation that stops in the middle are not drawn again, and are the same as without the stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.kept_rollouts import PART_ROLLOUTS, KeptRollouts
from prefarena.generation.interface import Sampling
from prefarena.records import Rollout
from prefarena.stages import write_manifest

SAMPLING = Sampling(max_tokens=5, temperature=1.0, seed=3)
PROMPTS = [[index, 7] for index in range(2 * PART_ROLLOUTS + 10)]


class Draws:
    """Draws rollouts that depend on the request's seed alone, and stops at a part if it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.firsts: list[int] = []
        self._stop_at = stop_at

    def __call__(self, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        if len(self.firsts) == self._stop_at:
            raise ConnectionError("the cluster is gone")
        self.firsts.append(sampling.first_index)
        rollouts = []
        for prompt, seed in zip(prompts, sampling.request_seeds(len(prompts)), strict=True):
            source = np.random.default_rng(seed)
            ids = source.integers(0, 9, source.integers(1, 6)).tolist()
            rollouts.append(Rollout(prompt, ids, source.normal(size=len(ids)).tolist(), len(ids) < 5, "v"))
        return rollouts


@pytest.fixture
def policy(tmp_path: Path) -> str:
    (tmp_path / "stage" / "model").mkdir(parents=True)
    write_manifest(tmp_path / "stage", {"costs": {"wall_seconds": 1.0}})
    return str(tmp_path / "stage" / "model")


def test_a_stopped_evaluation_goes_on_with_the_missing_parts(tmp_path: Path, policy: str) -> None:
    whole = Draws()
    expected = KeptRollouts(tmp_path / "whole").complete(policy, "v", PROMPTS, SAMPLING, whole)
    assert whole.firsts == [0, PART_ROLLOUTS, 2 * PART_ROLLOUTS]
    assert expected == Draws()(PROMPTS, SAMPLING)  # parts change nothing
    stopped, kept = Draws(stop_at=2), KeptRollouts(tmp_path / "kept")
    with pytest.raises(ConnectionError):
        kept.complete(policy, "v", PROMPTS, SAMPLING, stopped)
    again = Draws()
    assert (
        KeptRollouts(tmp_path / "kept").complete(policy, "v", PROMPTS, SAMPLING, again) == expected
    )  # to the last bit
    assert again.firsts == [2 * PART_ROLLOUTS]
    kept.forget("v")
    assert not list((tmp_path / "kept").iterdir())
    kept.forget("v")


def test_samples_of_another_training_prompt_or_setting_are_not_taken(tmp_path: Path, policy: str) -> None:
    kept, prompts = KeptRollouts(tmp_path / "kept"), PROMPTS[:4]

    def drawn(prompts: list[list[int]] = prompts, sampling: Sampling = SAMPLING) -> int:
        draws = Draws()
        kept.complete(policy, "v", prompts, sampling, draws)
        return len(draws.firsts)

    assert [drawn(), drawn()] == [1, 0]
    assert drawn(prompts=[[9]]) == 1
    assert drawn(sampling=Sampling(max_tokens=5, temperature=0.9, seed=3)) == 1
    assert drawn(sampling=Sampling(max_tokens=5, temperature=1.0, seed=4)) == 1
    assert drawn() == 0
    write_manifest(tmp_path / "stage", {"costs": {"wall_seconds": 2.0}})  # the stage was trained again
    assert drawn() == 1
