"""Samples of an evaluation that stops in the middle are not drawn again, and are the same as without the stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import EOS, save_tiny_policy

from pipelines import policy_scores
from pipelines.kept_rollouts import PART_ROLLOUTS, KeptRollouts, KeptValues, Share, Wanted
from pipelines.sampled import score_samples
from pipelines.sampled_values import Filled, Kind, SampledJob, fill_share, seconds_of, start_filling
from prefarena.config import Evaluation, FunctionJudge, RewardModel
from prefarena.evaluation.sampled import response_logps
from prefarena.generation.interface import Sampling
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.load import load_policy, load_tokenizer, new_reward_model, save_policy
from prefarena.records import Rollout
from prefarena.stages import read_manifest, write_manifest

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

    wanted, path = Wanted("model", PROMPTS, responses, compute), tmp_path / "kept"
    with pytest.raises(ConnectionError):
        KeptValues(path).complete(wanted)
    values = KeptValues(path).complete(wanted)
    assert values.tolist() == [sum(p) + sum(ids) for p, ids in zip(PROMPTS, responses, strict=True)]
    assert asked == [PART_ROLLOUTS, PART_ROLLOUTS, PART_ROLLOUTS, 10]  # the first part is not computed again
    KeptValues(path).complete(Wanted("another model", PROMPTS[:3], responses[:3], compute))
    KeptValues(None).complete(Wanted("model", PROMPTS[:2], responses[:2], compute))
    assert asked[4:] == [3, 2]


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_shares_compute_every_part_once_and_as_many_each(tmp_path: Path, number: int) -> None:
    computed: list[int] = []

    def wanted(model: str, size: int) -> Wanted:
        def compute(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
            computed.append(len(prompts))
            return np.full(len(prompts), float(size))

        return Wanted(model, PROMPTS[:size], PROMPTS[:size], compute)

    groups = [[wanted("a", 300)], [wanted("b", 512), wanted("c", 10)], [], [wanted("d", 257)]]
    numbers = []
    for place in range(number):
        computed.clear()
        share = Share(place, number)
        for group in groups:
            share = KeptValues(tmp_path / "kept").fill(group, share)
        numbers.append(len(computed))
    assert sum(numbers) == 7 and max(numbers) - min(numbers) <= 1
    computed.clear()
    for one in (one for group in groups for one in group):
        assert set(KeptValues(tmp_path / "kept").complete(one)) == {float(len(one.prompts))}
    assert not computed


class Scored:
    """Two policies and a learned judge as stages, what an evaluation reads, and who computed what."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = tmp_path
        self.models = {
            name: save_tiny_policy(tmp_path / name / "model", seed=seed) for seed, name in enumerate(("new", "old"))
        }
        for name in self.models:
            write_manifest(tmp_path / name, {"name": name})
        self.judge, self.proxy = (self._judge(name, seed) for seed, name in enumerate(("judge", "proxy")))
        (tmp_path / "test_pairs").mkdir()
        self.write_pairs({"prompt_ids": [[1, 3]], "chosen_ids": [[4, EOS]], "rejected_ids": [[5, EOS]]})
        (tmp_path / "evaluation").mkdir()
        #: (what, number of responses) in the order in which parts were computed.
        self.computed: list[tuple[str, int]] = []
        self.dies_at: int | None = None
        for where, name in (
            (policy_scores, "response_logps"),
            (policy_scores, "along_samples"),
            (RewardModelJudge, "score"),
        ):
            monkeypatch.setattr(where, name, self._watched(name, getattr(where, name)))

    def _judge(self, name: str, seed: int) -> JudgeSpec:
        model = new_reward_model(self.models["old"], seed)
        save_policy(model, load_tokenizer(self.models["old"]), self.folder / name / "model")
        write_manifest(self.folder / name, {"name": name})
        return JudgeSpec(RewardModel(), str(self.folder / name / "model"), self.models["old"])

    def _watched(self, name: str, plain: Any) -> Any:
        def compute(*arguments: Any, **keywords: Any) -> np.ndarray:
            if len(self.computed) == self.dies_at:
                self.dies_at = None
                raise MemoryError("the scorer's process is gone")
            rows = arguments[2].prompts if name == "along_samples" else arguments[1]
            self.computed.append((name, len(rows)))
            found: np.ndarray = plain(*arguments, **keywords)
            return found

        return compute

    def write_pairs(self, columns: dict[str, list[list[int]]]) -> None:
        """Write held-out pairs, with columns of the reference's log-probs that are far from the truth."""
        number = len(columns["prompt_ids"])
        logps = {f"ref_{side}_logp": [-1.0 - place for place in range(number)] for side in ("chosen", "rejected")}
        table = pa.table({"id": [str(place) for place in range(number)], **columns, **logps})
        pq.write_table(table, self.folder / "test_pairs" / "part-0.parquet")

    def job(self, kept: Path | None, **changed: Any) -> SampledJob:
        job = SampledJob(
            self.models["new"], self.models["old"], self.judge, self.folder, self.folder / "evaluation", kept=kept
        )
        return replace(job, **changed)

    def row(self, job: SampledJob, *filled: Filled) -> dict[str, float]:
        """The evaluation's row, without the seconds."""
        score_samples(ROLLOUTS, job, Evaluation(), 0.0, *filled)
        found: dict[str, float] = json.loads((self.folder / "evaluation" / "row.json").read_text(encoding="utf-8"))
        return {name: value for name, value in found.items() if "seconds" not in name}


ROLLOUTS = [Rollout([1, 3 + i % 7], [4 + i % 5, EOS], [-1.0, -1.0], True, "0") for i in range(PART_ROLLOUTS * 2 + 6)]


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scored:
    return Scored(tmp_path, monkeypatch)


@pytest.mark.parametrize("dies_at", [0, 3, 6])
def test_an_evaluation_that_dies_while_it_scores_computes_no_part_twice(scored: Scored, dies_at: int) -> None:
    expected = scored.row(scored.job(None))
    once, scored.dies_at = list(scored.computed), dies_at
    scored.computed.clear()
    kept = scored.job(scored.folder / "kept")
    with pytest.raises(MemoryError):
        scored.row(kept)
    assert scored.row(kept) == expected and scored.computed == once
    sizes = [PART_ROLLOUTS, PART_ROLLOUTS, 6]
    assert once == [
        *(("score", size) for size in sizes),
        ("response_logps", 2),  # of the one pair
        *(("along_samples", size) for size in sizes),
    ]


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(("best_of", "proxy"), [(1, False), (1, True), (2, False)])
def test_what_several_tasks_computed_ahead_is_what_one_computes(
    scored: Scored, number: int, best_of: int, proxy: bool
) -> None:
    """To the last bit, and nothing twice; of best-of-n the reward first, then the judge of what it picks."""
    changed: dict[str, Any] = {"best_of": best_of, "reward": scored.judge if best_of > 1 else None}
    changed |= {"proxy": scored.proxy, "of_reference": tuple(ROLLOUTS[::-1])} if proxy else {}
    expected = scored.row(scored.job(None, **changed))
    once, job, filled = sorted(scored.computed), scored.job(scored.folder / "kept", **changed), list[Filled]()
    scored.computed.clear()
    phases: list[tuple[Kind, ...]] = [("judge", "proxy", "policy")] if best_of == 1 else [("reward",), ("judge",)]
    for phase, kinds in enumerate(phases):
        for place in range(number):
            filled.append(fill_share(ROLLOUTS, job, Evaluation(), kinds, phase, Share(place, number), *filled))
    assert sorted(scored.computed) == once
    assert scored.row(job, *filled) == expected and sorted(scored.computed) == once
    costs = read_manifest(scored.folder / "evaluation")["costs"]
    wall, device = seconds_of(filled)
    assert costs["device_seconds"] - costs["wall_seconds"] == pytest.approx(device - wall) and device > wall > 0


def test_who_is_asked_by_an_endpoints_reward_is_not_found_out_by_several_tasks(scored: Scored) -> None:
    """Each of them would pay for its answers. A function sees all rows at once, so it is no part of a share either."""
    function = replace(scored.judge, settings=FunctionJudge(function="rewards_that_fail:short"))
    job = scored.job(scored.folder / "kept", best_of=2, reward=function)
    assert start_filling(None, job, Evaluation(), ("reward", "judge", "policy"), {}, 4) == []
    for kinds in (("judge",), ("reward", "judge")):
        assert start_filling(None, replace(job, judge=function), Evaluation(), kinds, {}, 4) == []
    assert start_filling(None, scored.job(None), Evaluation(), ("judge",), {}, 1) == []


def test_the_reference_moves_no_pair_whatever_rounding_its_columns_have(scored: Scored) -> None:
    """Log-probs beside the pairs come from other batches; a ratio of rounding alone would count as an order."""
    row = scored.row(scored.job(None, policy=scored.models["old"]))
    assert row["preference_accuracy"] == 0.5 and row["kl"] == 0.0
    assert row["demonstration_gain"] == 0.0


#: Three answers to one prompt in all their pairs, and one of them to another prompt.
_DRAWN = {
    "prompt_ids": [[1, 3], [1, 3], [1, 3], [1, 4]],
    "chosen_ids": [[4, EOS], [4, EOS], [5, 6, EOS], [4, EOS]],
    "rejected_ids": [[5, 6, EOS], [7, EOS], [7, EOS], [8, EOS]],
}


def test_a_response_that_many_pairs_have_is_scored_once(scored: Scored) -> None:
    """And every pair has the log-probs of its own two: against all responses of all pairs scored one by one."""
    scored.write_pairs(_DRAWN)
    row = scored.row(scored.job(None))
    assert [size for what, size in scored.computed if what == "response_logps"] == [5]
    policy = load_policy(scored.models["new"])
    chosen, rejected = (
        [
            float(response_logps(policy, [prompt], [ids], EOS, 1)[0])
            for prompt, ids in zip(_DRAWN["prompt_ids"], _DRAWN[side], strict=True)
        ]
        for side in ("chosen_ids", "rejected_ids")
    )
    assert row["preference_accuracy"] == np.mean(np.array(chosen) > np.array(rejected))
    assert row["demonstration_logp"] == pytest.approx(np.mean(chosen), abs=1e-5)
    assert row["demonstration_gain"] == pytest.approx(np.mean(chosen) + np.mean([1, 2, 3, 4]), abs=1e-5)


def test_the_references_log_probs_of_pairs_are_computed_once_for_all_policies(scored: Scored) -> None:
    scored.write_pairs(_DRAWN)
    folder = scored.folder / "for-all"
    alone = scored.row(scored.job(None, arithmetic="bfloat16"))
    scored.computed.clear()
    evaluations: list[tuple[str, list[tuple[str, int]]]] = []
    for name in ("old", "new", "new"):
        own = scored.folder / f"kept-{len(evaluations)}"
        row = scored.row(scored.job(own, policy=scored.models[name], arithmetic="bfloat16", kept_for_all=folder))
        evaluations.append((name, [one for one in scored.computed if one[0] == "response_logps"]))
        scored.computed.clear()
    assert row == alone
    of_reference = [("response_logps", 5), ("response_logps", PART_ROLLOUTS), ("response_logps", PART_ROLLOUTS)]
    assert sorted(evaluations[0][1]) == sorted([*of_reference, ("response_logps", 6)])
    assert [computed for _, computed in evaluations[1:]] == [[("response_logps", 5)]] * 2
    assert len(list(folder.iterdir())) == 1
