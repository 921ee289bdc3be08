"""An evaluation from samples, from its Ray task to the report's rows: divergences, frontier, wins at equal length."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import EOS, save_tiny_policy
from transformers import PreTrainedModel

from pipelines.equal_length import equal_length_row
from pipelines.evaluate import (
    _ReferenceSamples,
    as_snapshot,
    coverage_prompts,
    held_out_prompts,
    prompts_of,
    sampled_job,
    sampled_on,
    sampling_of,
)
from pipelines.exact import read_best_of_curve
from pipelines.frontier import frontier_points, regret_row
from pipelines.plan import SeedPlan, make_plan, model_of
from pipelines.report import _entry_row
from pipelines.sampled import score_frontier, score_samples
from pipelines.sampled_values import Policies, SampledJob, prompts_and_responses
from prefarena.config import Comparison, Evaluation, FunctionJudge, parse_config
from prefarena.data.tables import write_rows
from prefarena.errors import UserError
from prefarena.evaluation.estimated_frontier import EstimatedFrontier
from prefarena.evaluation.sampled import prompt_clusters, response_logps
from prefarena.generation.interface import Sampling
from prefarena.judges.spec import JudgeSpec, load_judge
from prefarena.modeling.load import load_policy
from prefarena.records import PROMPTS, Rollout, content_id
from prefarena.stages import Stage

FUNCTION = FunctionJudge(function="rewards_that_fail:short")


def rollouts_of(prompts: list[list[int]], seed: int) -> list[Rollout]:
    """Responses of one to five letters and an eos."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in prompts:
        response = [*rng.integers(3, 16, size=rng.integers(1, 6)).tolist(), EOS]
        found.append(Rollout(prompt, response, [-1.0] * len(response), True, "0"))
    return found


def comparison(tmp_path: Path, covered_share: float = 1.0, **evaluation: Any) -> Comparison:
    data = tmp_path / "pairs.jsonl"
    tmp_path.mkdir(exist_ok=True)
    if not data.exists():  # its time of change is a part of addresses
        data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    return parse_config(
        {
            "task": {"kind": "text", "data": str(data), "covered_share": covered_share},
            "output": str(tmp_path / "runs"),
            "model": {"kind": "scratch", "vocab_size": 300},
            "judge": FUNCTION.model_dump(),
            "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
            "evaluation": evaluation,
        }
    )


class Evaluated:
    """A comparison whose reference and entry were evaluated on `num_prompts` prompts, as its stages hold them."""

    def __init__(self, tmp_path: Path, num_prompts: int = 12, covered_share: float = 1.0, **evaluation: Any) -> None:
        self.config = comparison(tmp_path, covered_share, **evaluation)
        (self.plan,) = make_plan(self.config)
        (self.trained,) = self.plan.trained
        policies = [save_tiny_policy(tmp_path / name / "model", seed=seed) for seed, name in enumerate(("ref", "new"))]
        self._write_inputs(num_prompts)
        settings, judge = self.config.evaluation, JudgeSpec(FUNCTION, None, policies[0])
        prompts = sampled_on(self.plan, settings)
        of_reference = rollouts_of(prompts, seed=0)
        for stage, trained, policy in (
            (self.plan.evaluation, None, policies[0]),
            (self.trained.evaluation, self.trained, policies[1]),
        ):
            job = sampled_job(self.config, self.plan, trained, stage.begin())
            job = replace(job, policy=policy, reference=policies[0], judge=judge, of_reference=tuple(of_reference))
            rollouts = of_reference if trained is None else rollouts_of(prompts, seed=1)
            score_samples(rollouts, job, settings, 0.0)
        if self.plan.frontier is not None:
            job = replace(sampled_job(self.config, self.plan, None, self.plan.frontier.begin()), judge=judge)
            many = held_out_prompts(self.plan, settings) * settings.frontier_samples
            score_frontier(rollouts_of(many, seed=2), replace(job, policy=policies[0]), settings, 0.0)

    def _write_inputs(self, num_prompts: int) -> None:
        prompts = [[1, 3 + place] for place in range(num_prompts)]
        rows = [{"id": content_id(p), "prompt_ids": p, "covered": False, "split": "test"} for p in prompts]
        for covered, letter in ((True, 4), (False, 5)):
            more = [[1, letter, 3 + place] for place in range(6 + covered)]  # one more prompt with pairs than without
            rows += [{"id": content_id(p), "prompt_ids": p, "covered": covered, "split": "train"} for p in more]
        folder = self.plan.pairs.folder / "prompts"
        write_rows(pa.Table.from_pylist(rows, schema=PROMPTS), folder / "part-0.parquet", PROMPTS)
        pairs: dict[str, Any] = {"id": ["a", "b"], "prompt_ids": prompts[:2]}
        pairs |= {"chosen_ids": [[4, EOS], [5, EOS]], "rejected_ids": [[6, EOS], [7, EOS]]}
        pairs |= {"ref_chosen_logp": [-5.0, -6.0], "ref_rejected_logp": [-5.0, -6.0]}
        folder = self.plan.logps.folder / "test_pairs"
        folder.mkdir(parents=True)
        pq.write_table(pa.table(pairs), folder / "part-0.parquet")


def sums_along(
    models: list[PreTrainedModel], rollouts: list[Rollout], order: tuple[int, int], temperature: float
) -> list[float]:
    """Of each response the sum of KL(one model || the other) over its positions, in float64, one sequence at a time."""
    sums = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1] for model in models]
        p, q = ((logits[i].double() / temperature).log_softmax(-1) for i in order)
        sums.append(float((p.exp() * (p - q)).sum()))
    return sums


def row_of(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    return found


def test_a_row_has_the_divergences_of_the_policy_both_ways(tmp_path: Path) -> None:
    """Against one pass over each sequence with all logits in float64."""
    done = Evaluated(tmp_path, temperature=0.7)
    row, settings = row_of(done.trained.evaluation.folder), done.config.evaluation
    models = [load_policy(tmp_path / name / "model") for name in ("new", "ref")]
    prompts = sampled_on(done.plan, settings)
    for key, seed, order in (("kl_vocabulary", 1, (0, 1)), ("forward_kl", 0, (1, 0))):
        sums = sums_along(models, rollouts_of(prompts, seed), order, 0.7)
        by_prompt = np.reshape(sums, (2, -1)).mean(axis=0)
        assert row[key] == pytest.approx(by_prompt.mean(), abs=1e-5)
        assert row[f"{key}_stderr"] == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(12), abs=1e-5)
    chosen = response_logps(models[0], [[1, 3], [1, 4]], [[4, EOS], [5, EOS]], 0, 2)
    assert row["demonstration_logp"] == pytest.approx(chosen.mean(), abs=1e-5)
    assert row["demonstration_gain"] == pytest.approx(chosen.mean() + 5.5, abs=1e-5)
    own = row_of(done.plan.evaluation.folder)
    assert own["kl_vocabulary"] == own["forward_kl"] == own["kl"] == 0.0


def test_an_evaluation_without_samples_of_the_reference_has_no_forward_kl(tmp_path: Path) -> None:
    done = Evaluated(tmp_path)
    job = sampled_job(done.config, done.plan, done.trained, tmp_path / "again")
    (tmp_path / "again").mkdir()
    new, ref = (str(tmp_path / name / "model") for name in ("new", "ref"))
    prompts = sampled_on(done.plan, done.config.evaluation)
    job = replace(job, judge=None, policy=new, reference=ref)
    score_samples(rollouts_of(prompts, 1), job, done.config.evaluation, 0.0)
    row = row_of(tmp_path / "again")
    assert "kl_vocabulary" in row and "forward_kl" not in row and not (tmp_path / "again" / "scores.npz").exists()


class Drawing:
    """In place of the sampler: what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Sampling, str | None]] = []

    def sample(
        self, policy: str, version: str, prompts: list[list[int]], sampling: Sampling, kept_for: str | None = None
    ) -> list[Rollout]:
        self.asked.append((policy, version, sampling, kept_for))
        return rollouts_of(prompts, seed=3)


@pytest.mark.parametrize("under_way", [True, False])
def test_the_references_samples_are_drawn_once_for_all_entries(tmp_path: Path, under_way: bool) -> None:
    """Its own evaluation's where that is under way; else the same draws again, kept by an evaluation of this process:
    another comparison may draw the same ones, and neither removes what the other reads.
    """
    done, drawing = Evaluated(tmp_path), Drawing()
    plan: SeedPlan = done.plan
    key, settings = plan.evaluation.key, done.config.evaluation
    samples = _ReferenceSamples(drawing, settings, {key} if under_way else {"another"})  # type: ignore[arg-type]
    assert samples.of(plan, "another") is samples.of(plan, "another")
    ((policy, version, sampling, kept_for),) = drawing.asked
    assert policy == str(plan.reference.folder / "model") and sampling == sampling_of(plan, settings)
    assert (version == key) == under_way and kept_for == (key if under_way else "another")


# --------------------------------------------------------------------------------------------- coverage


def test_prompts_with_pairs_and_without_are_measured_apart(tmp_path: Path) -> None:
    """Only where some have none; then as many of each, behind the held-out ones, whose measures stay what they were."""
    plain, done = Evaluated(tmp_path / "plain", num_prompts=4), Evaluated(tmp_path / "some", 4, covered_share=0.5)
    assert coverage_prompts(plain.plan, plain.config.evaluation) == {}
    groups = coverage_prompts(done.plan, done.config.evaluation)
    assert {name: len(group) for name, group in groups.items()} == {"covered": 6, "uncovered": 6}
    assert {prompt[1] for prompt in groups["covered"]} == {4} and {prompt[1] for prompt in groups["uncovered"]} == {5}
    prompts = sampled_on(done.plan, done.config.evaluation)
    assert len(prompts) == (4 + 6 + 6) * 2 and prompts[8:20] == groups["covered"] * 2
    before, row = (row_of(one.trained.evaluation.folder) for one in (plain, done))
    assert {name for name in row if "/" not in name} == {name for name in before if "/" not in name}
    models = [load_policy(tmp_path / "some" / name / "model") for name in ("new", "ref")]
    answers, of_reference = rollouts_of(prompts, 1), rollouts_of(prompts, 0)
    for group, part in (("covered", slice(8, 20)), ("uncovered", slice(20, 32))):
        for key, rollouts, order in (("kl_vocabulary", answers, (0, 1)), ("forward_kl", of_reference, (1, 0))):
            sums = sums_along(models, rollouts[part], order, 1.0)
            by_prompt = np.reshape(sums, (2, -1)).mean(axis=0)
            assert row[f"{key}/{group}"] == pytest.approx(by_prompt.mean(), abs=1e-5)
            assert row[f"{key}/{group}_stderr"] == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(6), abs=1e-5)
        lengths = [len(rollout.response_ids) for rollout in answers[part]]
        assert row[f"response_length/{group}"] == pytest.approx(np.mean(lengths))
    assert row["kl_vocabulary"] == pytest.approx(np.mean(sums_along(models, answers[:8], (0, 1), 1.0)), abs=1e-5)
    with np.load(done.trained.evaluation.folder / "scores.npz") as arrays:
        assert {len(arrays[name]) for name in ("scores", "clusters", "kl")} == {8}
        assert row["judge_score"] == pytest.approx(arrays["scores"].mean())
    assert len(pq.read_table(done.trained.evaluation.folder / "samples.parquet")) == 8


def test_a_snapshot_has_what_trajectories_read_and_nothing_else(tmp_path: Path) -> None:
    """The final policy's numbers on held-out prompts, without a pass over other prompts, pairs or others' samples."""
    done = Evaluated(tmp_path, num_prompts=4, covered_share=0.5)
    settings, folder = done.config.evaluation, tmp_path / "snapshot"
    folder.mkdir()
    job = as_snapshot(sampled_job(done.config, done.plan, done.trained, folder), tmp_path / "new" / "model")
    judge = JudgeSpec(FUNCTION, None, job.policy)
    job = replace(job, reference=str(tmp_path / "ref" / "model"), judge=judge, logps=tmp_path / "nowhere")
    prompts = prompts_of(job, done.plan, settings)
    assert prompts == sampled_on(done.plan, settings)[:8]
    rollouts = rollouts_of(sampled_on(done.plan, settings), 1)[:8]
    with Policies(job, settings) as policies:
        assert [len(one.prompts) for one in policies.wanted(rollouts, 8).values()] == [8]
    score_samples(rollouts, job, settings, 0.0)
    row, whole = row_of(folder), row_of(done.trained.evaluation.folder)
    assert row == pytest.approx({name: whole[name] for name in row}, abs=1e-6)
    left_out = {name for name in whole.keys() - row.keys() if "/" not in name}
    assert {"forward_kl", "preference_accuracy", "demonstration_gain"} <= left_out
    assert not {name for name in row if "/covered" in name} and {"kl_vocabulary", "kl", "judge_score"} <= row.keys()
    with np.load(folder / "scores.npz") as arrays:
        assert {len(arrays[name]) for name in ("scores", "clusters", "kl")} == {8}


@pytest.mark.parametrize(("number", "found"), [(0, {}), (2, {"covered": 2, "uncovered": 2})])
def test_how_many_prompts_with_pairs_and_without_can_be_set(tmp_path: Path, number: int, found: dict[str, int]) -> None:
    done = Evaluated(tmp_path, num_prompts=4, covered_share=0.5, num_coverage_prompts=number)
    groups = coverage_prompts(done.plan, done.config.evaluation)
    assert {name: len(group) for name, group in groups.items()} == found
    (default,) = make_plan(comparison(tmp_path, 0.5))
    assert default.evaluation != done.plan.evaluation and default.shared() == done.plan.shared()


def test_best_of_n_is_measured_on_each_group_by_what_it_picks(tmp_path: Path) -> None:
    done = Evaluated(tmp_path, num_prompts=4, covered_share=0.5)
    spec = JudgeSpec(FUNCTION, None, str(tmp_path / "ref" / "model"))
    folder = tmp_path / "best"
    folder.mkdir()
    job = replace(sampled_job(done.config, done.plan, None, folder), best_of=3, reward=spec, judge=spec)
    prompts = [prompt for prompt in sampled_on(done.plan, done.config.evaluation) for _ in range(3)]
    rollouts = rollouts_of(prompts, 1)
    score_samples(rollouts, replace(job, policy=spec.tokenizer), done.config.evaluation, 0.0)
    shortest = np.array([len(rollout.response_ids) for rollout in rollouts]).reshape(-1, 3).min(axis=1)
    row = row_of(folder)
    assert row["response_length"] == pytest.approx(shortest[:8].mean())
    assert row["response_length/covered"] == pytest.approx(shortest[8:20].mean())
    assert (
        row["response_length/uncovered"] == pytest.approx(shortest[20:].mean()) and "kl_vocabulary/covered" not in row
    )
    curve = read_best_of_curve(Stage("evaluation", "best", folder))
    of_all = load_judge(spec).score(*prompts_and_responses(rollouts[: 8 * 3]))  # on held-out prompts
    assert [point["step"] for point in curve] == [1, 2, 3] and "standard_gain" not in curve[0]
    assert curve[0]["reward"] == pytest.approx(of_all.mean())
    assert curve[-1]["reward"] == curve[-1]["proxy_reward"] == pytest.approx(row["judge_score"])


# ---------------------------------------------------------------------------------- the reward that was learned from


@pytest.mark.parametrize("is_snapshot", [False, True])
def test_a_policy_is_scored_by_the_reward_that_it_learned_from(tmp_path: Path, is_snapshot: bool) -> None:
    """In its own units on each group of prompts, with the reference on held-out ones; of a snapshot its own alone."""
    done = Evaluated(tmp_path, num_prompts=4, covered_share=0.5)
    settings, folder = done.config.evaluation, tmp_path / "again"
    folder.mkdir()
    proxy = JudgeSpec(FunctionJudge(function="rewards_that_fail:long"), None, str(tmp_path / "ref" / "model"))
    prompts = sampled_on(done.plan, settings)
    rollouts, of_reference = rollouts_of(prompts, 1), rollouts_of(prompts, 0)
    job = replace(sampled_job(done.config, done.plan, done.trained, folder), proxy=proxy, of_reference=of_reference)
    if is_snapshot:
        job, rollouts = replace(as_snapshot(job, tmp_path / "new" / "model"), of_reference=()), rollouts[:8]
    judge = JudgeSpec(FUNCTION, None, proxy.tokenizer)
    job = replace(job, policy=str(tmp_path / "new" / "model"), reference=proxy.tokenizer, judge=judge)
    score_samples(rollouts, job, settings, 0.0)
    row, before = row_of(folder), row_of(done.trained.evaluation.folder)
    assert not {name for name in before if "proxy" in name}
    assert {name: value for name, value in row.items() if "proxy" not in name}.items() <= before.items()
    scores = load_judge(proxy).score(*prompts_and_responses(rollouts))
    assert row["proxy_reward"] == pytest.approx(scores[:8].mean()) == pytest.approx(-2 * row["judge_score"])
    by_prompt = scores[:8].reshape(2, 4).mean(axis=0)
    assert row["proxy_reward_stderr"] == pytest.approx(by_prompt.std(ddof=1) / 2)
    if is_snapshot:
        assert {name for name in row if "proxy" in name} == {"proxy_reward", "proxy_reward_stderr"}
        return
    assert row["proxy_reward/uncovered"] == pytest.approx(scores[20:].mean()) and "proxy_reward/covered" in row
    beside = load_judge(proxy).score(*prompts_and_responses(of_reference[:8]))
    assert row["reference_proxy_reward"] == pytest.approx(beside.mean())
    assert row["reference_proxy_reward_sd"] == pytest.approx(beside.std())


OTHER = {"kind": "function", "function": "rewards_that_fail:long"}
ENDPOINT = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("method", "more", "scored"),
    [
        ({"kind": "rlhf"}, {}, True),
        ({"kind": "rlhf"}, {"judge": {"kind": "learned"}}, True),  # another model, of other pairs
        ({"kind": "grpo", "reward": OTHER}, {}, True),
        ({"kind": "grpo", "reward": FUNCTION.model_dump() | {"max_silent_share": 0.5}}, {}, False),
        ({"kind": "dpo", "online": {"every": 4}}, {}, True),
        ({"kind": "dpo", "online": {"every": 4, "reward": FUNCTION.model_dump()}}, {}, False),
        ({"kind": "rloo", "reward": ENDPOINT}, {}, False),
        ({"kind": "best_of_n"}, {}, False),
        ({"kind": "dpo"}, {}, False),
        ({"kind": "rlhf"}, {"judge": ENDPOINT | {"kind": "pairwise"}}, False),
        ({"kind": "rlhf"}, {"task": {"kind": "language"}}, False),
    ],
)
def test_evaluations_of_policies_that_learned_from_another_reward_have_an_address_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], more: dict[str, Any], scored: bool
) -> None:
    """And nothing else has: beside the addresses of a comparison in which no policy is scored by its own reward."""
    tree = comparison(tmp_path).model_dump(mode="json") | more
    training = {} if method["kind"] == "best_of_n" else {"training": {"num_snapshots": 2}}
    config = parse_config(tree | {"entries": [{"name": "one", "method": method | training}]})
    (plan,) = make_plan(config)
    (one,) = plan.trained
    assert (config.proxy_of(config.entries[0].method) is not None) == scored
    monkeypatch.setattr(Comparison, "proxy_of", lambda *_: None)
    (before,) = make_plan(config)
    changed = [now.key != then.key for now, then in zip(one.stages(), before.trained[0].stages(), strict=True)]
    evaluations = [scored and stage in (one.evaluation, *one.on_the_way) for stage in one.stages()]
    assert changed == evaluations and plan.shared() == before.shared() and plan.evaluation == before.evaluation


def test_the_learned_reward_that_scores_is_the_one_that_was_trained(tmp_path: Path) -> None:
    tree = comparison(tmp_path).model_dump(mode="json")
    config = parse_config(tree | {"entries": [{"name": "rlhf", "method": {"kind": "rlhf"}}]})
    (plan,) = make_plan(config)
    (trained,) = plan.trained
    job = sampled_job(config, plan, trained, tmp_path)
    assert trained.reward_model is not None and job.proxy is not None and job.reward is None
    assert job.proxy.path == model_of(trained.reward_model) and job.proxy.arithmetic == plan.scored_in
    assert sampled_job(config, plan, None, tmp_path).proxy is None


# --------------------------------------------------------------------------------------------- frontier


def test_addresses_do_not_know_of_a_frontier_that_is_not_estimated(tmp_path: Path) -> None:
    """All other stages keep the addresses that they have without the setting, whatever it is."""
    plain, few, many = (make_plan(comparison(tmp_path, frontier_samples=number))[0] for number in (0, 8, 9))
    assert plain.frontier is None and few.frontier is not None and many.frontier is not None
    assert few.frontier.key != many.frontier.key
    for other in (few, many):
        assert other.shared() == plain.shared() and other.evaluation == plain.evaluation
        assert [one.stages() for one in other.trained] == [one.stages() for one in plain.trained]


def test_too_few_samples_and_a_judge_without_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer than 8 samples per prompt show no frontier"):
        comparison(tmp_path, frontier_samples=7)
    tree = comparison(tmp_path, frontier_samples=8).model_dump(mode="json")
    tree["judge"] = {"kind": "pairwise", "base_url": "http://localhost:1/v1", "model": "m"}
    with pytest.raises(UserError, match="a frontier is estimated from scores"):
        parse_config(tree)


def test_regret_is_the_distance_to_the_frontier_at_the_entrys_own_kl(tmp_path: Path) -> None:
    done = Evaluated(tmp_path, frontier_samples=64)
    assert done.plan.frontier is not None
    with np.load(done.plan.frontier.folder / "scores.npz") as arrays:
        frontier = EstimatedFrontier(arrays["scores"], arrays["clusters"])
    row = _entry_row(done.plan, done.trained)
    point = frontier.optimum_at(row["kl_vocabulary"])
    assert point is not None and 0 < row["kl_vocabulary"] < frontier.largest_kl
    assert row["frontier_reward"] == pytest.approx(point.reward, abs=1e-9)
    assert row["regret"] == pytest.approx(point.reward - row["judge_score"], abs=1e-6)
    assert row["regret_stderr"] > 0
    points = np.array(frontier_points(done.plan))
    assert points.shape == (33, 3) and points[-1, 0] == pytest.approx(frontier.largest_kl)


def test_an_entry_further_than_the_frontier_is_trusted_has_no_regret(tmp_path: Path) -> None:
    done = Evaluated(tmp_path, frontier_samples=64)
    assert done.plan.frontier is not None
    for stage, key in ((done.plan.frontier, "scores"), (done.trained.evaluation, "kl")):
        with np.load(stage.folder / "scores.npz") as arrays:
            changed = dict(arrays)
        changed[key] = np.linspace(0, 1, len(changed[key])) + (20 if key == "kl" else 0)  # no two scores are the same
        np.savez(stage.folder / "scores.npz", **changed)
    assert regret_row(done.plan, done.trained.evaluation) == {}


def test_prompts_that_an_entry_has_no_score_on_are_no_part_of_its_regret(tmp_path: Path) -> None:
    """A judge that is silent on two prompts: as if the frontier had been estimated without them."""
    done = Evaluated(tmp_path, frontier_samples=32)
    assert done.plan.frontier is not None
    path = done.trained.evaluation.folder / "scores.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    silent = changed["clusters"] < 2
    changed["scores"][silent] = np.nan
    np.savez(path, **changed)
    found = regret_row(done.plan, done.trained.evaluation)
    with np.load(done.plan.frontier.folder / "scores.npz") as arrays:
        kept = arrays["clusters"] >= 2
        frontier = EstimatedFrontier(arrays["scores"][kept], arrays["clusters"][kept])
    point = frontier.optimum_at(changed["kl"][~silent].mean())
    assert point is not None
    assert found["regret"] == pytest.approx(point.reward - changed["scores"][~silent].mean(), abs=1e-6)


# ----------------------------------------------------------------------------------------- equal length


def test_a_judge_of_brevity_finds_no_winner_at_equal_length(tmp_path: Path) -> None:
    """`short` scores by length alone, so whoever is shorter wins; where lengths are equal all pairs are ties."""
    done = Evaluated(tmp_path, num_prompts=13, samples_per_prompt=8)
    row = equal_length_row(done.plan, done.trained)
    assert abs(row["win_rate_at_equal_length"] - 0.5) < 3 * row["win_rate_at_equal_length_stderr"] < 0.2
    assert _entry_row(done.plan, done.trained)["win_rate_at_equal_length"] == row["win_rate_at_equal_length"]


def test_an_evaluation_that_kept_no_samples_has_no_rate_at_equal_length(tmp_path: Path) -> None:
    done = Evaluated(tmp_path)
    (done.plan.evaluation.folder / "samples.parquet").unlink()
    assert equal_length_row(done.plan, done.trained) == {}


def test_the_order_of_prompts_is_that_of_every_policy(tmp_path: Path) -> None:
    """The frontier's prompts and an entry's have the same numbers, in which their means are paired."""
    done = Evaluated(tmp_path, frontier_samples=8)
    prompts = held_out_prompts(done.plan, done.config.evaluation)
    for number in (2, 8):
        assert prompt_clusters(rollouts_of(prompts * number, 0)).tolist() == list(range(len(prompts))) * number


def test_settings_have_the_defaults_that_change_nothing() -> None:
    assert Evaluation().frontier_samples == 0 and SampledJob("", "", None, Path(), Path()).of_reference == ()
