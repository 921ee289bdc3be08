"""Samples of an evaluation that stops in the middle are not drawn again, and are the same as without the stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import EOS, save_tiny_policy

from pipelines import policy_scores
from pipelines.kept_rollouts import PART_ROLLOUTS, KeptRollouts, KeptValues
from pipelines.sampled import SampledJob, score_samples
from prefarena.config import Evaluation
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


def test_values_of_a_stopped_evaluation_go_on_with_the_missing_parts(tmp_path: Path) -> None:
    responses = [[index % 5, EOS] for index in range(len(PROMPTS))]
    asked: list[int] = []

    def compute(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        asked.append(len(prompts))
        if len(asked) == 2:
            raise ConnectionError("the node is gone")
        return np.array([float(sum(prompt) + sum(ids)) for prompt, ids in zip(prompts, responses, strict=True)])

    kept = KeptValues(tmp_path / "kept")
    with pytest.raises(ConnectionError):
        kept.complete("model", PROMPTS, responses, compute)
    values = KeptValues(tmp_path / "kept").complete("model", PROMPTS, responses, compute)
    assert values.tolist() == [sum(p) + sum(ids) for p, ids in zip(PROMPTS, responses, strict=True)]
    assert asked == [PART_ROLLOUTS, PART_ROLLOUTS, PART_ROLLOUTS, 10]  # the first part is not computed again
    KeptValues(tmp_path / "kept").complete("another model", PROMPTS[:3], responses[:3], compute)
    KeptValues(None).complete("model", PROMPTS[:2], responses[:2], compute)
    assert asked[4:] == [3, 2]


def test_an_evaluation_that_dies_while_it_scores_computes_no_log_prob_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: save_tiny_policy(tmp_path / name / "model", seed=seed) for seed, name in enumerate(("new", "old"))}
    for name in folders:
        write_manifest(tmp_path / name, {"name": name})
    columns: dict[str, Any] = {
        "id": ["a"],
        "prompt_ids": [[1, 3]],
        "chosen_ids": [[4, EOS]],
        "rejected_ids": [[5, EOS]],
    }
    (tmp_path / "test_pairs").mkdir()
    table = pa.table(columns | {"ref_chosen_logp": [-1.0], "ref_rejected_logp": [-2.0]})
    pq.write_table(table, tmp_path / "test_pairs" / "part-0.parquet")
    rollouts = [Rollout([1, 3 + i % 7], [4 + i % 5, EOS], [-1.0, -1.0], True, "0") for i in range(PART_ROLLOUTS + 5)]
    computed: list[tuple[str, int]] = []
    plain, dies = policy_scores.response_logps, [True]

    def counted(model: Any, prompts: list[list[int]], *others: Any) -> np.ndarray:
        which = "old" if "old" in model.config._name_or_path else "new"
        if which == "old" and dies:
            dies.clear()
            raise MemoryError("the scorer's process is gone")
        computed.append((which, len(prompts)))
        return plain(model, prompts, *others)

    monkeypatch.setattr(policy_scores, "response_logps", counted)
    (tmp_path / "evaluation").mkdir()

    def row(kept: Path | None) -> dict[str, float]:
        job = SampledJob(folders["new"], folders["old"], None, tmp_path, tmp_path / "evaluation", kept=kept)
        score_samples(rollouts, job, Evaluation(), 0.0)
        found: dict[str, float] = json.loads((tmp_path / "evaluation" / "row.json").read_text(encoding="utf-8"))
        return found

    with pytest.raises(MemoryError):
        row(tmp_path / "kept")
    resumed = row(tmp_path / "kept")
    parts = [PART_ROLLOUTS, 5]
    assert computed == [*(("new", size) for size in (*parts, 1, 1)), *(("old", size) for size in parts)]
    undisturbed = row(None)
    assert {name: value for name, value in resumed.items() if "seconds" not in name} == {
        name: value for name, value in undisturbed.items() if "seconds" not in name
    }
