"""Estimates from samples agree with the exact values where both exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from prefarena.config import LanguageTask
from prefarena.data.plan import LARGEST_PASS, bounded_passes
from prefarena.evaluation.enumeration import Enumeration, enumerate_responses
from prefarena.evaluation.exact import exact_metrics, win_rates
from prefarena.evaluation.sampled import (
    kl_estimates,
    prompt_clusters,
    response_logps,
    sampled_metrics,
    win_matrix,
    win_rate,
)
from prefarena.judges.models import GoldRewardJudge, RewardModelJudge
from prefarena.judges.spec import Judge
from prefarena.modeling.heads import ScalarHead, scores
from prefarena.modeling.logprobs import Sequences
from prefarena.records import Rollout
from prefarena.tasks.gold import GoldReward
from prefarena.tasks.language import EOS_ID, PAD_ID, Language, unpadded
from prefarena.tasks.pairs import sample_responses

TASK = LanguageTask(num_letters=3, num_prompts=9, prompt_letters=2, response_limit=3)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=6, initializer_range=0.2, **SIZES)).eval()


class Arena:
    """Two exactly known policies on one language, and samples of them."""

    def __init__(self, folder: Path) -> None:
        self.language = Language(TASK)
        self.models = [tiny_llama(0), tiny_llama(1)]
        self.exact = [enumerate_responses(model, self.language.prompt_ids, 3, EOS_ID) for model in self.models]
        ref = self.exact[0]
        gold = GoldReward.fit(TASK, self.language.prompt_ids, ref.sequences, ref.logps)
        gold.save(folder / "gold.json")
        self.judge: Judge = GoldRewardJudge(folder / "gold.json")
        self.rewards = gold.table(self.language.prompt_ids, ref.sequences)

    def sample(self, policy: Enumeration, per_prompt: int, seed: int) -> tuple[list[Rollout], np.ndarray]:
        """Rollouts, prompt by prompt, and the response row [N] of each."""
        rng = np.random.default_rng(seed)
        rows = np.concatenate([sample_responses(rng, logps, per_prompt) for logps in policy.logps])
        prompts = np.repeat(np.arange(TASK.num_prompts), per_prompt)
        rollouts = []
        for prompt, row in zip(prompts, rows, strict=True):
            response = unpadded(policy.sequences[row])
            ended = response[-1] == EOS_ID
            rollouts.append(Rollout(self.language.prompt_ids[prompt], response, [0.0] * len(response), ended, "0"))
        return rollouts, rows


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena"))


def test_response_logps_agree_with_the_enumeration(arena: Arena) -> None:
    rollouts, rows = arena.sample(arena.exact[1], 8, seed=0)
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    found = response_logps(arena.models[1], prompts, responses, PAD_ID, batch_size=7)
    np.testing.assert_allclose(found, arena.exact[1].logps[prompt_clusters(rollouts), rows], atol=1e-5)


def test_passes_are_bounded_by_rows_and_tokens_and_are_those_of_rows_alone_where_they_fit() -> None:
    lengths = np.array([3000, 10, 5000, 9000, 20, 4000])
    assert [rows.tolist() for rows in bounded_passes(lengths, 2, LARGEST_PASS)] == [[1, 4], [0, 5], [2], [3]]
    assert [rows.tolist() for rows in bounded_passes(lengths, 2, 10**9)] == [[1, 4], [0, 5], [2, 3]]
    assert [rows.tolist() for rows in bounded_passes(lengths, 100, LARGEST_PASS)] == [[1, 4, 0, 5], [2], [3]]
    assert bounded_passes(np.zeros(0, np.int64), 4, LARGEST_PASS) == []


def test_response_logps_at_a_temperature(arena: Arena) -> None:
    prompt = arena.language.prompt_ids[0]
    with torch.no_grad():
        logits = arena.models[0](input_ids=torch.tensor([prompt])).logits[0, -1]
    found = response_logps(arena.models[0], [prompt] * 2, [[2], [3]], PAD_ID, batch_size=2, temperature=0.5)
    np.testing.assert_allclose(found, (logits / 0.5).log_softmax(-1)[[2, 3]], atol=1e-5)


def test_estimates_agree_with_the_exact_values(arena: Arena) -> None:
    ref, policy = arena.exact
    rollouts, rows = arena.sample(policy, 400, seed=1)
    clusters = prompt_clusters(rollouts)
    judged = arena.judge.score([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    row = sampled_metrics(rollouts, policy.logps[clusters, rows], ref.logps[clusters, rows], judged)
    expected = exact_metrics(policy.logps, ref.logps, arena.rewards, arena.language.covered, ref.lengths)
    cut_off = ref.sequences[:, -1] >= 0
    cut_off &= ref.sequences[:, -1] != EOS_ID
    truth = {
        "kl": expected["kl/all"],
        "kl_k3": expected["kl/all"],
        "judge_score": expected["reward/all"],
        "response_length": expected["response_length/all"],
        "truncation_rate": float((np.exp(policy.logps) * cut_off).sum(axis=1).mean()),
    }
    assert expected["kl/all"] > 0.5
    for name, value in truth.items():
        assert abs(row[name] - value) < 3 * row[f"{name}_stderr"], name


def test_stderrs_cover_the_exact_kl(arena: Arena) -> None:
    """Fresh prompts and samples each time, as an evaluation draws them: z-scores spread like a unit normal's."""
    ref, policy = arena.exact
    by_prompt = (np.exp(policy.logps) * (policy.logps - ref.logps)).sum(axis=1)
    rng, z_scores = np.random.default_rng(0), []
    for _ in range(300):
        prompts = rng.integers(TASK.num_prompts, size=40)
        rows = np.stack([sample_responses(rng, policy.logps[prompt], 3) for prompt in prompts]).ravel()
        owner = np.repeat(prompts, 3)
        k1, _ = kl_estimates(policy.logps[owner, rows], ref.logps[owner, rows], np.repeat(np.arange(40), 3))
        z_scores.append((k1.mean - by_prompt.mean()) / k1.stderr)
    spread, shift = np.std(z_scores), np.mean(z_scores)
    assert 0.85 < spread < 1.15 and abs(shift) < 0.25


def test_win_rates_agree_with_the_exact_ones(arena: Arena) -> None:
    samples = [arena.sample(policy, 300, seed) for seed, policy in enumerate(arena.exact)]
    clusters = [prompt_clusters(rollouts) for rollouts, _ in samples]
    judged = [arena.rewards[index, rows] for index, (_, rows) in zip(clusters, samples, strict=True)]
    rates, errors = win_matrix(judged, clusters)
    expected = win_rates([policy.logps for policy in arena.exact], arena.rewards)
    assert abs(rates[0, 1] - expected.win_rate[0, 1]) < 0.02
    assert errors[0, 1] == pytest.approx(expected.stderr[0, 1], rel=0.2)
    np.testing.assert_allclose(rates + rates.T, 1)


def test_win_rate_by_hand() -> None:
    estimate = win_rate(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]), np.array([2.0, 5.0]), np.array([0, 1]))
    assert estimate == pytest.approx((0.5, 0.0))
    with pytest.raises(ValueError, match="different prompts"):
        win_rate(np.array([1.0]), np.array([0]), np.array([1.0]), np.array([1]))


def test_a_prompt_that_one_side_has_no_score_on_is_left_out() -> None:
    nan = float("nan")
    prompts = np.array([0, 0, 1, 2])
    estimate = win_rate(np.array([3.0, nan, nan, 1.0]), prompts, np.array([2.0, 4.0, 5.0, 1.0]), prompts)
    assert estimate == pytest.approx((0.5, 0.0))  # 3 against 2 and 4, and a tie on prompt 2
    nothing = win_rate(np.full(4, nan), prompts, np.ones(4), prompts)
    assert np.isnan(nothing.mean) and np.isnan(nothing.stderr)


def test_a_policy_ties_with_itself_even_where_an_error_cannot_be_estimated() -> None:
    """On one prompt there is no spread over prompts, yet the diagonal is known."""
    scores = [np.array([1.0, 2.0]), np.array([0.0, 3.0]), np.array([4.0, 4.0])]
    rates, errors = win_matrix(scores, [np.zeros(2, dtype=np.int64)] * 3)
    np.testing.assert_array_equal(rates, [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 0.5]])
    np.testing.assert_array_equal(np.isnan(errors), ~np.eye(3, dtype=bool))
    assert (errors.diagonal() == 0).all()


def test_kl_estimates_of_single_precision_are_formed_in_double() -> None:
    """In float32 -1 and -2^-25 differ by 1."""
    logps, ref_logps = np.full(2, -(2.0**-25), np.float32), np.full(2, -1.0, np.float32)
    assert kl_estimates(logps, ref_logps, np.arange(2))[0].mean == 1 - 2**-25


def rollouts_of(lengths: list[int], finished: list[bool]) -> list[Rollout]:
    return [
        Rollout([1, 3 + row], [4] * length, [0.0] * length, end, "0")
        for row, (length, end) in enumerate(zip(lengths, finished, strict=True))
    ]


def test_rollouts_without_a_score_are_counted_and_left_out() -> None:
    rollouts = rollouts_of([1, 2, 6], [True, True, False])
    ref_logps = np.zeros(3)
    row = sampled_metrics(rollouts, None, ref_logps, np.array([1.0, np.nan, 4.0]))
    assert row.keys() == {
        "response_length", "response_length_stderr", "truncation_rate", "truncation_rate_stderr",
        "judge_score", "judge_score_stderr", "num_judged", "num_silent",
    }  # fmt: skip
    assert (row["num_judged"], row["num_silent"]) == (2, 1)
    assert (row["judge_score"], row["judge_score_stderr"]) == pytest.approx((2.5, 1.5))
    assert (row["response_length"], row["response_length_stderr"]) == pytest.approx((3.0, np.sqrt(7 / 3)))
    assert (row["truncation_rate"], row["truncation_rate_stderr"]) == pytest.approx((1 / 3, 1 / 3))
    silent = sampled_metrics(rollouts, None, None, np.full(3, np.nan))
    assert (silent["num_judged"], silent["num_silent"]) == (0, 3) and "judge_score" not in silent
    assert "num_judged" not in sampled_metrics(rollouts, None, None, None)


def test_prompts_are_numbered_as_they_appear() -> None:
    rollouts = rollouts_of([1, 1, 1], [True] * 3)
    clusters = prompt_clusters([rollouts[2], rollouts[0], rollouts[2], rollouts[1]])
    assert clusters.tolist() == [0, 1, 0, 2]
    assert np.arange(5)[prompt_clusters([])].shape == (0,)  # an index even where it is empty


def test_rollout_logps_of_a_model_whose_rows_are_padded() -> None:
    """Its attention reaches only so far back, so rows are not packed. At a temperature, against single sequences."""
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=6, initializer_range=0.4, sliding_window=3, num_key_value_heads=1, **SIZES)
    model, rollouts = MistralForCausalLM(config).eval(), rollouts_of([1, 3, 2], [True] * 3)
    sampled = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    found = response_logps(model, *sampled, PAD_ID, batch_size=3, temperature=0.5)
    for rollout, logp in zip(rollouts, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([rollout.prompt_ids + rollout.response_ids])).logits[0, 1:-1]
        assert logp == pytest.approx(float((logits / 0.5).log_softmax(-1)[:, 4].sum()), abs=1e-5)


def test_reward_model_judge_scores_as_the_model_does(arena: Arena, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=6, num_labels=1, pad_token_id=0, initializer_range=0.2, **SIZES)
    config.reward_mean, config.reward_scale = 0.5, 2.0
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(str(tmp_path))
    prompts = [[1, 3, 4], [1, 3], [1, 5, 5], [1, 4, 4]]
    responses = [[3, 2], [4, 0, 2], [2], [5, 5, 5]]
    head = ScalarHead(model)
    with torch.no_grad():
        expected = [float(scores(head, Sequences.of([x], [y]))) for x, y in zip(prompts, responses, strict=True)]
    judge: Judge = RewardModelJudge(tmp_path, batch_size=3)
    found = judge.score(prompts, responses)
    assert found.dtype == np.float64 and np.std(found) > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-6)
