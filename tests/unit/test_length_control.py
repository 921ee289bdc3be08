"""Win rates at equal length: what a judge's liking for length leaves, against exact values and by simulation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from test_sampled import TASK, Arena

from prefarena.evaluation.length_control import Answers, Pairs, all_pairs, win_rate_at_equal_length
from prefarena.tasks.pairs import sample_responses

_DRAWS = 20


def sigmoid(value: float | np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(value)))


def simulated(seed: int, intercept: float, slope: float, num_prompts: int = 2000) -> Pairs:
    """Verdicts of a judge whose liking for length is exactly what the regression supposes; own responses are longer."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(3.0, 2.0, size=num_prompts).round()
    chance = sigmoid(intercept + slope * np.tanh(differences / differences.std()))
    return Pairs((rng.random(num_prompts) < chance).astype(float), differences, np.arange(num_prompts))


def test_a_liking_for_length_is_taken_away() -> None:
    """A policy that is no better but longer wins 80 %; at equal length half."""
    pairs = simulated(0, 0.0, 2.0)
    found = win_rate_at_equal_length(pairs)
    assert pairs.outcomes.mean() > 0.75
    assert abs(found.mean - 0.5) < 3 * found.stderr < 0.2


def test_the_standard_error_is_the_spread_of_the_estimate() -> None:
    estimates = np.array([win_rate_at_equal_length(simulated(seed, 0.4, 1.0, 300)) for seed in range(300)])
    z_scores = (estimates[:, 0] - sigmoid(0.4)) / estimates[:, 1]
    assert 0.85 < z_scores.std() < 1.15 and abs(z_scores.mean()) < 0.25


def test_verdicts_that_are_all_alike_stay_a_rate() -> None:
    differences, prompts = np.array([1.0, -2.0, 3.0, 0.0]), np.arange(4)
    for outcome in (0.0, 1.0):
        found = win_rate_at_equal_length(Pairs(np.full(4, outcome), differences, prompts))
        assert 0 < found.mean < 1 and abs(found.mean - outcome) < 0.15 and math.isfinite(found.stderr)
    longer_wins = win_rate_at_equal_length(Pairs((differences > 0).astype(float), differences, prompts))
    assert 0 < longer_wins.mean < 1


def test_lengths_that_do_not_differ_leave_the_plain_rate() -> None:
    found = win_rate_at_equal_length(Pairs(np.array([1.0, 0.0, 1.0, 1.0]), np.full(4, 2.0), np.array([0, 0, 1, 2])))
    assert found.mean == pytest.approx((0.5 + 1 + 1) / 3) and found.stderr == pytest.approx(1 / 6)


def test_one_prompt_has_no_error_and_no_pair_no_rate() -> None:
    one = win_rate_at_equal_length(Pairs(np.array([1.0, 0.0]), np.array([1.0, 2.0]), np.zeros(2)))
    assert math.isfinite(one.mean) and math.isnan(one.stderr)
    none = win_rate_at_equal_length(Pairs(*np.zeros((3, 0))))
    assert math.isnan(none.mean) and math.isnan(none.stderr)


def test_every_response_meets_every_other_to_its_prompt_but_for_those_without_a_score() -> None:
    nan = float("nan")
    own = Answers(np.array([3.0, nan, 1.0]), np.array([5, 6, 7]), np.array([0, 0, 1]))
    other = Answers(np.array([3.0, 4.0, 0.0]), np.array([1, 2, 3]), np.array([0, 0, 1]))
    pairs = all_pairs(own, other)
    assert pairs.outcomes.tolist() == [0.5, 0.0, 1.0] and pairs.differences.tolist() == [4, 3, 4]
    assert pairs.clusters.tolist() == [0, 0, 1]


def test_twenty_draws_on_the_language_agree_with_the_exact_rate(tmp_path: Path) -> None:
    """Exact: the same regression on all pairs of responses, weighed by their probabilities."""
    arena = Arena(tmp_path)
    (ref, policy), lengths = arena.exact, arena.exact[0].lengths
    size, kept = len(lengths), range(TASK.num_prompts)
    weights = [np.outer(np.exp(policy.logps[p]), np.exp(ref.logps[p])).ravel() for p in kept]
    every = all_pairs(
        *(Answers(arena.rewards.ravel(), np.tile(lengths, len(kept)), np.repeat(kept, size)) for _ in range(2))
    )
    exact = win_rate_at_equal_length(every, np.concatenate(weights)).mean
    for seed in range(_DRAWS):
        rng = np.random.default_rng(seed)
        prompts, sides = rng.integers(len(kept), size=60), []
        for logps in (policy.logps, ref.logps):
            rows = np.stack([sample_responses(rng, logps[prompt], 4) for prompt in prompts])
            scores = arena.rewards[prompts[:, None], rows]
            sides.append(Answers(scores.ravel(), lengths[rows].ravel(), np.repeat(np.arange(60), 4)))
        found = win_rate_at_equal_length(all_pairs(*sides))
        assert abs(found.mean - exact) < 3 * found.stderr, seed
