"""Exact evaluation against brute force: plain loops over every response, one full forward pass each."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from prefarena.config import LanguageTask
from prefarena.errors import UserError
from prefarena.evaluation.enumeration import Responses, enumerate_responses
from prefarena.evaluation.exact import Frontier, exact_metrics, expected_scores, frontiers, win_rates
from prefarena.evaluation.preferences import TIE, preference_accuracy
from prefarena.tasks.gold import GoldReward
from prefarena.tasks.language import Language

VOCAB_SIZE, LIMIT, EOS = 6, 3, 2
PROMPTS = [[1, 3, 4], [1, 5], [1, 4, 4]]
RESPONSES = Responses.listed(VOCAB_SIZE, LIMIT, EOS)


def tiny_model(kind: str) -> PreTrainedModel:
    """Random weights, large enough that the distribution is far from uniform."""
    torch.manual_seed(0)
    shared = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.4}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **shared))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **sizes, **shared))
    if kind == "mistral":  # its attention window is shorter than the sequences
        return MistralForCausalLM(MistralConfig(sliding_window=3, num_key_value_heads=1, **sizes, **shared))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes, **shared))


def brute_force(model: PreTrainedModel, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """log pi(y|x) of every response: each token sequence that eos or the limit ends, by a forward pass of its own."""
    logps = {}
    for length in range(1, LIMIT + 1):
        for response in itertools.product(range(VOCAB_SIZE), repeat=length):
            if EOS in response[:-1] or (length < LIMIT and response[-1] != EOS):
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].double()
            rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            logps[response] = float(sum(row[token] for row, token in zip(rows, response, strict=True)))
    return logps


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-9),
        ("llama", torch.float32, 1e-5),
        ("qwen2", torch.float32, 1e-5),
        ("mistral", torch.float32, 1e-5),
    ],
)
def test_enumeration_agrees_with_brute_force(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(kind).to(dtype).eval()
    result = enumerate_responses(model, PROMPTS, LIMIT, EOS)
    np.testing.assert_allclose(np.exp(result.logps).sum(axis=1), 1, atol=1e-6)
    assert result.logps.dtype == np.float64
    for row, prompt in enumerate(PROMPTS):
        expected = brute_force(model, prompt)
        assert len(expected) == result.logps.shape[1] and np.ptp(list(expected.values())) > 3
        found = result.response_logps(np.full(len(expected), row), [list(response) for response in expected])
        np.testing.assert_allclose(found, list(expected.values()), rtol=tolerance, atol=tolerance)


def test_enumeration_is_the_same_in_chunks_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2").double().train()  # with dropout
    whole = enumerate_responses(model, PROMPTS, LIMIT, EOS)
    np.testing.assert_allclose(enumerate_responses(model, PROMPTS, LIMIT, EOS, max_rows=1).logps, whole.logps)
    assert model.training


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="empty prompt"):
        enumerate_responses(tiny_model("gpt2"), [[1], []], LIMIT, EOS)


def test_every_response_is_listed_once() -> None:
    expected = {
        response
        for length in range(1, 5)
        for response in itertools.product(range(4), repeat=length)
        if 2 not in response[:-1] and (length == 4 or response[-1] == 2)
    }
    responses = Responses.listed(4, 4, 2)
    listed = [tuple(int(token) for token in row if token >= 0) for row in responses.sequences]
    assert len(listed) == len(expected) and set(listed) == expected
    np.testing.assert_array_equal(responses.lengths, [len(response) for response in listed])
    assert len(Responses.listed(16, 4, 2).lengths) == 54_241


def test_a_response_is_found_or_refused() -> None:
    rows = np.random.default_rng(0).permutation(len(RESPONSES.lengths))
    responses = [[int(token) for token in RESPONSES.sequences[row] if token >= 0] for row in rows]
    np.testing.assert_array_equal(RESPONSES.index(responses), rows)
    assert len(RESPONSES.index([])) == 0
    for bad in ([3], [2, 3], [3, 3, 3, 2]):
        with pytest.raises(UserError, match=r"neither ended|more than 3"):
            RESPONSES.index([[2], bad])


def test_too_many_responses_are_refused() -> None:
    with pytest.raises(UserError, match="too many to list"):
        Responses.listed(32_000, 4, 2)


def distributions(seed: int, num_prompts: int = 4, num_responses: int = 30, spread: float = 1.0) -> np.ndarray:
    logits = spread * np.random.default_rng(seed).normal(size=(num_prompts, num_responses))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


REF, REWARDS = distributions(0), np.random.default_rng(1).normal(size=(4, 30))
LENGTHS, COVERED = np.random.default_rng(2).integers(1, 5, size=30), np.array([True, False, True, True])


def test_metrics_agree_with_plain_loops() -> None:
    logps = distributions(3)
    row = exact_metrics(logps, REF, REWARDS, COVERED, LENGTHS)
    for group, prompts in {"all": [0, 1, 2, 3], "covered": [0, 2, 3], "uncovered": [1]}.items():
        sums = dict.fromkeys(("reward", "kl", "forward_kl", "entropy", "best_probability", "response_length"), 0.0)
        for x in prompts:
            best = max(range(30), key=lambda y: REWARDS[x][y])
            sums["best_probability"] += math.exp(logps[x][best])
            for y in range(30):
                p, q = math.exp(logps[x][y]), math.exp(REF[x][y])
                sums["reward"] += p * REWARDS[x][y]
                sums["kl"] += p * math.log(p / q)
                sums["forward_kl"] += q * math.log(q / p)
                sums["entropy"] -= p * math.log(p)
                sums["response_length"] += p * LENGTHS[y]
        for measure, total in sums.items():
            assert row[f"{measure}/{group}"] == pytest.approx(total / len(prompts), abs=1e-10)
        assert row[f"regret/{group}"] == pytest.approx(row[f"frontier_reward/{group}"] - row[f"reward/{group}"])
        assert row[f"regret/{group}"] > 0
    for name, measure in {"kl": "kl", "judge_score": "reward", "response_length": "response_length"}.items():
        assert (row[name], row[f"{name}_stderr"]) == (row[f"{measure}/all"], 0.0)


def test_expected_scores_agree_with_plain_loops() -> None:
    logps, values = distributions(3), np.random.default_rng(9).normal(size=(4, 30))
    found = expected_scores(logps, values, COVERED)
    for group, prompts in {"all": [0, 1, 2, 3], "covered": [0, 2, 3], "uncovered": [1]}.items():
        total = sum(math.exp(logps[x][y]) * values[x][y] for x in prompts for y in range(30))
        assert found[f"proxy_reward/{group}"] == pytest.approx(total / len(prompts), abs=1e-12)


def test_the_reference_is_at_the_frontiers_origin() -> None:
    row = exact_metrics(REF, REF, REWARDS, COVERED, LENGTHS, frontiers(REF, REWARDS, COVERED))
    for group in ("all", "covered", "uncovered"):
        assert row[f"kl/{group}"] == 0 and row[f"regret/{group}"] == pytest.approx(0, abs=1e-12)


def test_frontiers_at_hand_are_used() -> None:
    """Those of a reward that is twice as large, so that they differ from what would be computed."""
    limits = frontiers(REF, 2 * REWARDS, COVERED)
    row = exact_metrics(distributions(3), REF, REWARDS, COVERED, LENGTHS, limits)
    for group, limit in limits.items():
        assert row[f"frontier_reward/{group}"] == limit.optimum_at(row[f"kl/{group}"]).reward


def test_groups_without_prompts_have_no_keys() -> None:
    row = exact_metrics(distributions(3), REF, REWARDS, np.ones(4, dtype=bool), LENGTHS)
    assert "kl/covered" in row and not any(key.endswith("/uncovered") for key in row)
    assert row["reward/covered"] == row["reward/all"]


def test_a_probability_of_zero_counts_as_zero() -> None:
    logps = np.where(np.arange(30) == 5, 0.0, -np.inf) + np.zeros((4, 1))
    row = exact_metrics(logps, REF, REWARDS, COVERED, LENGTHS)
    assert row["entropy/all"] == 0 and row["kl/all"] == pytest.approx(-REF[:, 5].mean())
    assert row["forward_kl/all"] == math.inf


@pytest.mark.filterwarnings("error")
def test_responses_that_neither_policy_gives_change_nothing() -> None:
    """Five more of them, of higher rewards: every measure but that of the best response stays."""
    logps, nowhere = distributions(3), np.full((4, 5), -np.inf)
    row = exact_metrics(logps, REF, REWARDS, COVERED, LENGTHS)
    wider = exact_metrics(
        np.hstack([logps, nowhere]), np.hstack([REF, nowhere]), np.hstack([REWARDS, np.full((4, 5), 9.0)]),
        COVERED, np.append(LENGTHS, [4] * 5),
    )  # fmt: skip
    assert wider["best_probability/all"] == 0
    for name, value in row.items():
        if not name.startswith("best_probability"):
            assert wider[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("kl", [1e-8, 1e-3, 0.1, 0.7, 1.5, 2.5])
def test_optimum_at_meets_its_kl_and_is_attained(kl: float) -> None:
    frontier = Frontier(REF, REWARDS)
    point = frontier.optimum_at(kl)
    assert point.kl == pytest.approx(kl, abs=1e-9)
    logps = frontier.logps(point.inverse_temperature)
    expected = REF + point.inverse_temperature * REWARDS
    np.testing.assert_allclose(logps, expected - np.logaddexp.reduce(expected, axis=1, keepdims=True), atol=1e-9)
    row = exact_metrics(logps, REF, REWARDS, COVERED, LENGTHS)
    assert (row["kl/all"], row["reward/all"]) == pytest.approx((point.kl, point.reward), abs=1e-9)
    assert abs(row["regret/all"]) < 1e-9


def test_optimum_in_closed_form() -> None:
    """Two responses, uniform reference, rewards 0 and 1: reward p costs log 2 - H(p)."""
    frontier = Frontier(np.full((1, 2), math.log(0.5)), np.array([[0.0, 1.0]]))
    for p in (0.5, 0.6, 0.9, 0.999, 1 - 1e-9):
        cost = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
        assert frontier.optimum_at(cost).reward == pytest.approx(p, abs=1e-6)
    assert frontier.optimum_at(5.0) == (math.inf, pytest.approx(math.log(2)), 1.0, 0.0)


def test_a_constant_reward_has_nothing_to_gain() -> None:
    frontier = Frontier(REF, np.full((4, 30), 0.25))
    for kl in (0.0, 1.0):
        assert frontier.optimum_at(kl).reward == pytest.approx(0.25)


def test_a_negative_kl_is_refused() -> None:
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="cannot be negative"):
            Frontier(REF, REWARDS).optimum_at(bad)


def test_no_policy_beats_the_frontier() -> None:
    """Random policies, and the best of a temperature for each prompt: all lie at or under the shared-beta frontier."""
    frontier, rng = Frontier(REF, REWARDS), np.random.default_rng(5)
    gaps = []
    for trial in range(200):
        tilt = rng.gamma(1.0, 2.0, size=(4, 1)) * REWARDS + (trial % 2) * rng.normal(size=REF.shape)
        logps = REF + tilt
        logps -= np.logaddexp.reduce(logps, axis=1, keepdims=True)
        probabilities = np.exp(logps)
        kl = float((probabilities * (logps - REF)).sum(axis=1).mean())
        gaps.append(frontier.optimum_at(kl).reward - float((probabilities * REWARDS).sum(axis=1).mean()))
    assert min(gaps) > -1e-9 and max(gaps) > 0.1 and min(gaps) < 0.05


def test_the_curve_rises_from_the_reference_to_the_best_responses() -> None:
    frontier = Frontier(REF, REWARDS)
    kls, gains = np.array(frontier.curve()).T
    assert kls[0] == pytest.approx(0, abs=1e-12)
    assert gains[0] == pytest.approx((np.exp(REF) * REWARDS).sum(axis=1).mean())
    assert (np.diff(kls) > 0).all() and (np.diff(gains) > 0).all()
    assert gains[-1] == pytest.approx(REWARDS.max(axis=1).mean())
    best = -REF[np.arange(4), REWARDS.argmax(axis=1)]
    assert kls[-1] == pytest.approx(best.mean())


def test_win_rates_agree_with_double_loops() -> None:
    rewards = np.round(REWARDS, 0)  # many equal rewards
    policies = [REF, distributions(6), distributions(7, spread=3.0)]
    result = win_rates(policies, rewards)
    for i, j in itertools.product(range(3), repeat=2):
        by_prompt = [
            sum(
                math.exp(policies[i][x][a] + policies[j][x][b])
                * (1.0 if rewards[x][a] > rewards[x][b] else 0.5 if rewards[x][a] == rewards[x][b] else 0.0)
                for a in range(30)
                for b in range(30)
            )
            for x in range(4)
        ]
        assert result.win_rate[i, j] == pytest.approx(np.mean(by_prompt), abs=1e-10)
        assert result.stderr[i, j] == pytest.approx(np.std(by_prompt, ddof=1) / 2, abs=1e-10)


def test_win_rates_of_rounded_log_probs_sum_to_one() -> None:
    """Probabilities that miss 1 by a thousandth, as after rounding, give the rates of those that do not."""
    policies = [REF, distributions(6)]
    result = win_rates([policies[0] + 1e-3, policies[1] - 1e-3], REWARDS)
    np.testing.assert_allclose(result.win_rate, win_rates(policies, REWARDS).win_rate, atol=1e-12)
    np.testing.assert_allclose(result.win_rate.diagonal(), 0.5, atol=1e-12)


def test_preference_accuracy_has_one_definition() -> None:
    chosen, rejected = np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-2.0, -1.0, -4.0, -4.0])
    of_reference = preference_accuracy(chosen, rejected, chosen, rejected)
    assert of_reference["preference_accuracy"] == 0.5
    assert of_reference["likelihood_accuracy"] == (1 + 0 + 1 + 0.5) / 4
    moved = preference_accuracy(chosen + np.array([0.1, 0.1, -0.1, 0.0]), rejected, chosen, rejected)
    assert moved["preference_accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert moved["preference_accuracy_stderr"] == pytest.approx(math.sqrt(0.625 * 0.375 / 4))
    moved_more = preference_accuracy(chosen + 0.2, rejected + 0.5, chosen, rejected)
    assert moved_more["preference_accuracy"] == 0.0  # both rose, the rejected ones more
    assert moved_more["likelihood_accuracy"] == 0.5  # margins 0.7, -1.3, 0.7 and -0.3
    assert moved_more["likelihood_accuracy_stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 / 4))


def test_margins_below_the_precision_of_what_is_stored_are_ties() -> None:
    zero = np.zeros(4)
    result = preference_accuracy(np.array([TIE / 2, -TIE / 2, TIE, -2 * TIE]), zero, zero, zero)
    assert result["preference_accuracy"] == result["likelihood_accuracy"] == (0.5 + 0.5 + 1 + 0) / 4
    assert preference_accuracy(np.full(4, TIE / 2), zero, zero, zero)["preference_accuracy"] == 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_language_leaves_room_to_align(seed: int) -> None:
    """Were the reference the source itself: entropy of some nats, and 2 standard deviations to gain at 4 nats."""
    task = LanguageTask(seed=seed, num_prompts=24)
    language, responses = Language(task), Responses.listed(16, task.response_limit, EOS)
    logps = language.source_logps(responses.sequences)
    gold = GoldReward.fit(task, language.prompt_ids, responses.sequences, logps)
    rewards = gold.table(language.prompt_ids, responses.sequences)
    row = exact_metrics(logps, logps, rewards, language.covered, responses.lengths)
    assert 3 < row["entropy/all"] < 6 and 2.5 < row["response_length/all"] < 3.8
    assert Frontier(logps, rewards).optimum_at(4.0).reward > 2
