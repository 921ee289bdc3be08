"""Exact evaluation of on-policy entries: scores of every response, best-of-n, trajectories, KL estimates."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedModel,
)

from pipelines.annotate import ExactReference, annotate_language
from pipelines.exact import ExactJob, evaluate_exactly, score_responses
from pipelines.jobs import entry_job
from pipelines.plan import SeedPlan, make_plan, model_of, policy_of
from prefarena.config import Comparison, GoldJudge, LanguageTask, RewardModel, ScratchModel
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.evaluation.agreement import estimator_spread, kl_agreement
from prefarena.evaluation.best_of_n import best_of_n_logps, kl_bound, pick_best
from prefarena.evaluation.enumeration import Responses, enumerate_responses, enumerate_scores
from prefarena.evaluation.exact import exact_metrics
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.heads import ScalarHead, scores
from prefarena.modeling.load import load_policy, new_policy, new_reward_model, save_policy
from prefarena.modeling.logprobs import Sequences
from prefarena.records import REFERENCED_PAIRS
from prefarena.tasks.language import Language
from prefarena.training.jobs import OnPolicyJob

VOCAB_SIZE, LIMIT, EOS = 6, 3, 2
PROMPTS = [[1, 3, 4], [1, 5], [1, 4, 4]]
RESPONSES = Responses.listed(VOCAB_SIZE, LIMIT, EOS)


def reward_model(kind: str) -> PreTrainedModel:
    """Random weights with a normalisation that matters."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.4, "num_labels": 1, "pad_token_id": 0}
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes["num_attention_heads"] = 2
    model: PreTrainedModel
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **shared)
        model = GPT2ForSequenceClassification(config)
    elif kind == "mistral":  # its attention window is shorter than the sequences
        model = MistralForSequenceClassification(
            MistralConfig(sliding_window=3, num_key_value_heads=1, **sizes, **shared)
        )
    else:
        model = LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, **sizes, **shared))
    model.config.reward_mean, model.config.reward_scale = 0.3, 1.7
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("max_rows", [1, 7, 8192])
def test_enumerated_scores_are_those_of_each_sequence(kind: str, max_rows: int) -> None:
    model = reward_model(kind).train()  # with dropout
    found = enumerate_scores(model, PROMPTS, LIMIT, EOS, max_rows)
    assert model.training and found.dtype == np.float64
    responses = [[int(token) for token in row if token >= 0] for row in RESPONSES.sequences]
    for row, prompt in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            expected = scores(ScalarHead(model.eval()), Sequences.of([prompt] * len(responses), responses)).numpy()
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_an_empty_prompt_has_no_scores() -> None:
    with pytest.raises(UserError, match="empty prompt"):
        enumerate_scores(reward_model("llama"), [[1], []], LIMIT, EOS)


# ---------------------------------------------------------------------------------------------- best-of-n


def reference(seed: int = 0, num_prompts: int = 3, num_responses: int = 5) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(num_prompts, num_responses))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_agrees_with_all_draws(n: int) -> None:
    """Every tuple of n draws with its probability; equal scores share."""
    ref = reference()
    values = np.array([[0.0, 1.0, 1.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0, 5.0], [3.0, 1.0, 4.0, 1.0, 5.0]])
    expected = np.zeros_like(ref)
    for x in range(len(ref)):
        for draws in itertools.product(range(5), repeat=n):
            probability = math.exp(sum(ref[x, y] for y in draws))
            best = [y for y in draws if values[x, y] == max(values[x, z] for z in draws)]
            for y in best:
                expected[x, y] += probability / len(best)
    np.testing.assert_allclose(np.exp(best_of_n_logps(ref, values, n)), expected, rtol=1e-12)


def test_best_of_one_is_the_reference_and_an_indifferent_score_changes_nothing() -> None:
    ref = reference()
    np.testing.assert_allclose(best_of_n_logps(ref, np.random.default_rng(1).normal(size=ref.shape), 1), ref)
    np.testing.assert_allclose(best_of_n_logps(ref, np.zeros_like(ref), 16), ref)


@pytest.mark.parametrize("n", [2, 16, 1000])
def test_the_kl_of_best_of_n_nears_its_bound_from_below(n: int) -> None:
    """With 20,000 responses the mass of any one is small, and the KL as good as log n - (n - 1) / n."""
    ref = reference(num_prompts=2, num_responses=20_000)
    values = np.random.default_rng(1).normal(size=ref.shape)
    logps = best_of_n_logps(ref, values, n)
    np.testing.assert_allclose(np.exp(logps).sum(axis=1), 1, rtol=1e-9)
    row = exact_metrics(logps, ref, values, np.array([True, False]), np.ones(20_000))
    assert row["kl"] <= kl_bound(n) and row["kl"] == pytest.approx(kl_bound(n), abs=0.03)
    assert math.isfinite(row["forward_kl/all"])  # the least probable response keeps its probability
    few = exact_metrics(
        best_of_n_logps(ref[:, :5], values[:, :5], n), ref[:, :5], values[:, :5], np.array([True, False]), np.ones(5)
    )
    assert few["kl"] < kl_bound(n)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of_none", [-9.0, 0.5, 2.0])
def test_responses_of_no_probability_stay_so(of_none: float) -> None:
    """Whether they score lowest, between the others or highest."""
    ref = np.array([[math.log(0.5), math.log(0.5), -np.inf]])
    values = np.array([[0.0, 1.0, of_none]])
    np.testing.assert_allclose(np.exp(best_of_n_logps(ref, values, 2)), [[0.25, 0.75, 0.0]])
    ref[0, 2] = -800.0  # a probability that underflows: its logarithm stays what it was
    assert best_of_n_logps(ref, values, 2)[0, 2] == -800.0


def test_best_of_n_refuses_what_it_cannot_rank() -> None:
    ref = reference()
    with pytest.raises(ValueError, match="best of 0"):
        best_of_n_logps(ref, ref, 0)
    with pytest.raises(ValueError, match="shorter"):
        best_of_n_logps(ref, ref[:2], 4)


def test_the_best_of_very_many_is_no_more_than_certain() -> None:
    """A sum of probabilities that passes 1 by rounding would show, to the power of a thousand million."""
    ref = reference(num_prompts=60, num_responses=50)
    best = best_of_n_logps(ref, np.random.default_rng(1).normal(size=ref.shape), 10**9).max(axis=1)
    assert best.max() < 1e-12 and best.min() > -1e-6


def test_what_best_of_n_gains_does_not_depend_on_rounding_of_the_reference() -> None:
    ref, values = reference(), np.random.default_rng(1).normal(size=(3, 5))
    rounded = ref + np.array([[1e-3], [-1e-3], [2e-3]])  # probabilities sum to almost 1
    np.testing.assert_allclose(best_of_n_logps(rounded, values, 4) - rounded, best_of_n_logps(ref, values, 4) - ref)


def test_the_best_of_each_group_is_picked() -> None:
    values = np.array([0.0, 3.0, 1.0, 7.0, 7.0, -1.0])
    np.testing.assert_array_equal(pick_best(values, 3), [1, 3])
    np.testing.assert_array_equal(pick_best(values, 1), np.arange(6))


def test_a_sample_without_a_score_is_picked_only_where_no_other_has_one() -> None:
    nan = float("nan")
    values = np.array([nan, -5.0, -7.0, 2.0, nan, 1.0, nan, nan, nan, -1.0, -2.0, nan])
    np.testing.assert_array_equal(pick_best(values, 3), [1, 3, 6, 9])


# ------------------------------------------------------------------------------------------- KL estimates


def test_a_snapshot_is_held_against_the_next_iterations_rollouts() -> None:
    kls = {0: 0.0, 5: 1.0, 6: 2.0, 9: 3.0}
    trajectory = [{"step": step, "kl": kl, "k1_std": 0.4, "k3_std": 0.8} for step, kl in kls.items()]
    metrics = [
        {"step": 1, "kl/k1": 0.0, "kl/k1_stderr": 0.0, "kl/k3": 0.0, "kl/k3_stderr": 0.0},
        {"step": 5, "kl/k1": 50.0, "kl/k1_stderr": 0.1},
        {"step": 6, "kl/k1": 1.2, "kl/k1_stderr": 0.1, "kl/k3": 0.9, "kl/k3_stderr": 0.2, "staleness": 0.0},
        {"step": 7, "kl/k1": 2.2, "kl/k1_stderr": 0.1, "staleness": 1.0},
    ]
    (row,) = kl_agreement(trajectory, metrics, num_rollouts=16)
    assert (row["step"], row["exact"], row["k1"], row["k3"]) == (5, 1.0, 1.2, 0.9)
    assert (row["k1_stderr"], row["k3_stderr"]) == (0.1, 0.2)
    assert (row["k1_exact_stderr"], row["k3_exact_stderr"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (row["k1_z"], row["k3_z"]) == (pytest.approx(2.0), pytest.approx(-0.5))


def test_iterations_without_a_counterpart_do_not_hide_those_behind_them() -> None:
    """Training without the metric `staleness`; step 0 was sampled from with errors of 0, step 4 never."""
    trajectory = [{"step": step, "kl": 1.0, "k1_std": 0.4, "k3_std": 0.8} for step in (0, 4, 7, 8)]
    metrics = [
        {"step": 1, "kl/k1": 0.0, "kl/k1_stderr": 0.0},
        {"step": 8, "kl/k1": 1.2, "kl/k1_stderr": 0.1},
        {"step": 9, "kl/k3": 0.9, "kl/k3_stderr": 0.2},
    ]
    first, second = kl_agreement(trajectory, metrics, num_rollouts=4)
    assert first == pytest.approx(
        {"step": 7, "exact": 1.0, "k1": 1.2, "k1_stderr": 0.1, "k1_exact_stderr": 0.2, "k1_z": 1.0}
    )
    assert second == pytest.approx(
        {"step": 8, "exact": 1.0, "k3": 0.9, "k3_stderr": 0.2, "k3_exact_stderr": 0.4, "k3_z": -0.25}
    )


def test_the_spread_of_the_estimators_is_that_of_clipped_ratios() -> None:
    """Responses of one token, log-ratios of about 29 and -29, and a response that the policy never gives."""
    rare = math.exp(-30)
    policy, ref = np.array([0.5, 0.5 - rare, rare, 0.0]), np.array([rare, 0.5, 0.25 - rare, 0.25])
    k1 = np.log(policy[:3] / ref[:3])
    assert k1[0] > 25 and k1[2] < -25
    k3 = np.array([math.exp(-20) - 1 + 20, math.exp(-k1[1]) - 1 + k1[1], math.exp(20) - 1 - 20])  # as training clips
    with np.errstate(divide="ignore"):
        spread = estimator_spread(Responses.listed(4, 1, 0), np.log(policy)[None], np.log(ref)[None])
    for name, values in (("k1_std", k1), ("k3_std", k3)):
        mean = (policy[:3] * values).sum()
        assert spread[name] == pytest.approx(math.sqrt((policy[:3] * (values - mean) ** 2).sum()))


def test_the_spread_of_the_estimators_is_that_of_their_sums_over_tokens() -> None:
    """Against a walk through every response, token by token, of two made-up policies."""
    random = np.random.default_rng(0)
    tables = [
        [{} for _ in PROMPTS],  # prompt -> prefix -> log-probs of the next token
        [{} for _ in PROMPTS],
    ]  # type: list[list[dict[tuple[int, ...], np.ndarray]]]

    def next_logps(policy: int, prompt: int, prefix: tuple[int, ...]) -> np.ndarray:
        def draw() -> np.ndarray:
            logits = random.normal(size=VOCAB_SIZE) * 2
            return logits - np.logaddexp.reduce(logits)

        return tables[policy][prompt].setdefault(prefix, draw())

    logps, walked = (
        np.zeros((2, len(PROMPTS), len(RESPONSES.lengths))),
        np.zeros((2, len(PROMPTS), len(RESPONSES.lengths))),
    )
    for prompt in range(len(PROMPTS)):
        for n, (sequence, length) in enumerate(zip(RESPONSES.sequences, RESPONSES.lengths, strict=True)):
            for t in range(length):
                prefix, token = tuple(sequence[:t]), sequence[t]
                own, ref = (next_logps(policy, prompt, prefix)[token] for policy in (0, 1))
                logps[:, prompt, n] += own, ref
                walked[:, prompt, n] += own - ref, math.exp(ref - own) - 1 + own - ref
    weights = np.exp(logps[0]) / len(PROMPTS)
    assert weights.sum() == pytest.approx(1)
    means = (weights * walked).sum(axis=(1, 2))
    assert means[0] == pytest.approx(means[1])  # both estimate the same KL
    expected = np.sqrt((weights * (walked - means[:, None, None]) ** 2).sum(axis=(1, 2)))
    spread = estimator_spread(RESPONSES, logps[0], logps[1])
    assert (spread["k1_std"], spread["k3_std"]) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


# ------------------------------------------------------------------------- evaluation stages of the language


TASK = LanguageTask(
    num_letters=4, num_prompts=6, prompt_letters=2, response_limit=3, num_pairs=64, num_test_pairs=32,
    num_demonstrations=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """reference/, trained/ and reward/ are models, snapshots/ holds two policies, pairs/ and logps/ are stages."""
    root, language = tmp_path_factory.mktemp("stages"), Language(TASK)
    tokenizer = language.tokenizer()
    for seed, name in enumerate(("reference", "snapshots/00003", "snapshots/00006", "trained")):
        model = new_policy(ScratchModel(hidden_size=32, num_heads=1), tokenizer, 6, seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        save_policy(model, tokenizer, root / name)
    reward = new_reward_model(root / "reference", 0)
    reward.config.reward_mean, reward.config.reward_scale = 0.1, 0.5
    save_policy(reward, tokenizer, root / "reward")
    (root / "pairs").mkdir()
    annotate_language(TASK, str(root / "reference"), root / "pairs")
    test = read_rows(root / "pairs" / "test_pairs")
    reference = enumerate_responses(load_policy(root / "reference"), language.prompt_ids, TASK.response_limit, EOS)
    rows = language.prompt_rows(test["prompt_ids"].to_pylist())
    for side in ("chosen", "rejected"):
        logps = reference.response_logps(rows, test[f"{side}_ids"].to_pylist())
        test = test.append_column(f"ref_{side}_logp", pa.array(logps, pa.float32()))
    write_rows(test, root / "logps" / "test_pairs" / "part-0.parquet", REFERENCED_PAIRS)
    spec = JudgeSpec(RewardModel(), str(root / "reward"), str(root / "reference"))
    np.save(root / "scores.npy", np.concatenate([score_responses(TASK, spec, share)[0] for share in range(4)]))
    return root


def evaluated(stages: Path, folder: Path, **settings: Any) -> dict[str, float]:
    folder.mkdir()
    chosen = {"policy": str(stages / "trained"), **settings}
    shared: dict[str, Any] = {"task": TASK, "pairs": stages / "pairs", "logps": stages / "logps", "folder": folder}
    evaluate_exactly(ExactJob(**shared, keep_logps=True, **chosen))
    return json.loads((folder / "row.json").read_text())


def test_scores_of_a_judge_that_is_no_model_are_listed_in_the_same_order(stages: Path) -> None:
    gold = JudgeSpec(GoldJudge(), str(stages / "pairs" / "gold.json"), str(stages / "reference"))
    found = np.concatenate([score_responses(TASK, gold, share)[0] for share in range(4)])
    np.testing.assert_allclose(found, ExactReference.load(stages / "pairs" / "exact.npz").rewards)


def test_a_trajectory_holds_the_start_every_snapshot_and_the_end(stages: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "reward": stages / "scores.npy",
        "snapshots": stages / "snapshots",
        "num_steps": 9,
        "group": "covered",
    }
    row = evaluated(stages, tmp_path / "e", **settings)
    found = json.loads((tmp_path / "e" / "trajectory.json").read_text())
    assert [point["step"] for point in found] == [0, 3, 6, 9]
    start, _, third, end = found
    assert start["kl"] == 0 and start["reward"] == pytest.approx(start["reward/covered"])
    for name in ("kl", "reward", "proxy_reward", "regret", "entropy"):
        assert end[name] == row[f"{name}/covered"] != row[f"{name}/all"]
    scores, language = np.load(stages / "scores.npy"), Language(TASK)
    policy = enumerate_responses(load_policy(stages / "snapshots/00006"), language.prompt_ids, TASK.response_limit, EOS)
    by_prompt = (np.exp(policy.logps) * scores).sum(axis=1)
    assert third["proxy_reward"] == pytest.approx(by_prompt[language.covered].mean(), abs=1e-12)
    assert abs(third["proxy_reward"] - start["proxy_reward"]) > 1e-3


def test_a_gold_reward_is_its_own_proxy(stages: Path, tmp_path: Path) -> None:
    row = evaluated(stages, tmp_path / "gold", reward="gold")
    assert row["proxy_reward/covered"] == pytest.approx(row["reward/covered"], abs=1e-12)
    assert "proxy_reward/all" not in evaluated(stages, tmp_path / "none")


def test_best_of_n_is_measured_without_a_policy(stages: Path, tmp_path: Path) -> None:
    row = evaluated(stages, tmp_path / "four", policy="nowhere", reward="gold", best_of=4)
    one = evaluated(stages, tmp_path / "one", policy="nowhere", reward="gold", best_of=1)
    assert one["kl"] == pytest.approx(0, abs=1e-12) and one["preference_accuracy"] == 0.5
    assert 0 < row["kl"] < row["kl_bound"] == pytest.approx(math.log(4) - 0.75)
    assert row["reward/all"] > one["reward/all"] + 0.5 and row["win_rate"] > 0.7
    assert row["preference_accuracy"] == 1  # it orders every pair as the reward that labelled them
    assert np.load(tmp_path / "four" / "logps.npy").shape == (6, 259)


@pytest.mark.parametrize("number", [4, 100])
def test_best_of_n_comes_with_the_curve_of_ever_more_samples(stages: Path, tmp_path: Path, number: int) -> None:
    """By another reward than the gold one: each point is what that number of samples has by itself."""
    reward = stages / "scores.npy"
    row = evaluated(stages, tmp_path / "curve", policy="nowhere", reward=reward, best_of=number)
    found = {point["step"]: point for point in json.loads((tmp_path / "curve" / "curve.json").read_text())}
    assert list(found) == ([1, 2, 4, 8, 16, 32, 64] if number == 4 else [1, 2, 4, 8, 16, 32, 64, 100])
    for name in ("kl", "reward", "proxy_reward"):
        assert found[number][name] == pytest.approx(row[f"{name}/all"], abs=1e-12)
    assert found[1]["kl"] == pytest.approx(0, abs=1e-12)
    proxies = [point["proxy_reward"] for point in found.values()]
    assert proxies == sorted(proxies) and found[1]["reward"] != found[number]["reward"]


# ------------------------------------------------------------------------------------------------- the plan


def planned(**changes: Any) -> tuple[Comparison, SeedPlan]:
    """One entry of each shape on the language, or with `changes` to the whole tree."""
    training = {"num_iterations": 2}
    entries = [
        {"name": "learned", "method": {"kind": "rlhf", "reward": {"kind": "learned"}, "training": training}},
        {"name": "gold", "method": {"kind": "rloo", "reward": {"kind": "gold"}, "training": training}},
        {"name": "best", "method": {"kind": "best_of_n", "reward": {"kind": "learned"}}},
        {"name": "dpo", "method": {"kind": "dpo"}},
    ]
    config = Comparison.model_validate({"output": "nowhere", "entries": entries, **changes})
    return config, make_plan(config)[0]


def test_best_of_n_has_a_reward_model_and_no_training() -> None:
    config, plan = planned()
    learned, gold, best, dpo = plan.trained
    assert best.training is None and policy_of(plan, best) == model_of(plan.reference)
    assert best.reward_model == learned.reward_model and best.scores == learned.scores is not None
    assert (gold.scores, gold.reward_model, dpo.scores) == (None, None, None)
    assert best.stages() == [best.reward_model, best.scores, best.evaluation]
    assert len({trained.evaluation for trained in plan.trained}) == 4
    with pytest.raises(TypeError, match="trains nothing"):
        entry_job(config, plan, best)
    other = {"name": "best", "method": {"kind": "best_of_n", "reward": {"kind": "learned"}, "n": 5}}
    assert planned(entries=[other])[1].trained[0].evaluation != best.evaluation


def test_training_is_watched_by_what_it_does_not_learn_from() -> None:
    config, plan = planned()
    jobs = [entry_job(config, plan, trained) for trained in plan.trained[:2]]
    assert all(isinstance(job, OnPolicyJob) for job in jobs)
    monitors = [job.monitor for job in jobs if isinstance(job, OnPolicyJob)]
    assert monitors[0] is not None and isinstance(monitors[0].settings, GoldJudge) and monitors[1] is None
    entries = [{"name": "a", "method": {"kind": "grpo"}}, {"name": "b", "method": {"kind": "best_of_n"}}]
    for judge in ("learned", "function"):
        settings = {"kind": judge} | ({"function": "some.module:score"} if judge == "function" else {})
        text, texts = planned(task={"kind": "text", "data": "x.jsonl"}, judge=settings, entries=entries)
        job = entry_job(text, texts, texts.trained[0])
        assert isinstance(job, OnPolicyJob)
        assert job.monitor is not None and job.monitor.settings == text.judge
        assert job.monitor.may_be_silent == job.reward.may_be_silent or judge == "learned"
        if judge == "learned":
            assert texts.judge is not None
            assert job.monitor.path == model_of(texts.judge)
        assert texts.trained[1].scores is None


def test_a_function_that_watches_is_in_the_address_and_one_that_is_learned_from_does_not_watch() -> None:
    judge = {"kind": "function", "function": "some.module:score"}
    entries = [
        {"name": "a", "method": {"kind": "grpo"}},
        {"name": "b", "method": {"kind": "grpo", "reward": judge}},
        {"name": "c", "method": {"kind": "best_of_n"}},
    ]

    def planned_by(function: str) -> tuple[Comparison, SeedPlan]:
        given = judge | {"function": function}
        return planned(task={"kind": "text", "data": "x.jsonl"}, judge=given, entries=entries)

    config, plan = planned_by("some.module:score")
    jobs = [entry_job(config, plan, trained) for trained in plan.trained[:2]]
    monitors = [job.monitor for job in jobs if isinstance(job, OnPolicyJob)]
    assert monitors[0] is not None and monitors[1] is None
    _, other = planned_by("some.module:other")
    assert plan.trained[0].training != other.trained[0].training
    assert plan.trained[2].reward_model == other.trained[2].reward_model
