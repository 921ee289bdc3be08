"""The best of ever more samples, from one set of n samples a prompt: against all subsets, and against new samples."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from prefarena.evaluation.best_of_n import best_of_curve, expected_best, kl_bound, pick_best


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_expected_best_is_the_mean_over_all_subsets(k: int) -> None:
    rng = np.random.default_rng(k)
    ranking, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    ranking[2, 1], values[3, 0] = np.nan, np.nan
    expected = []
    for ranks, own in zip(ranking, values, strict=True):
        ordered = np.where(np.isnan(ranks), -np.inf, ranks)
        best = [max(subset, key=lambda place: ordered[place]) for subset in combinations(range(5), k)]
        expected.append(np.nanmean(own[best]) if not np.isnan(own[best]).all() else np.nan)
    found = expected_best(ranking.ravel(), values.ravel(), 5, k)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_best_of_all_samples_is_the_one_that_is_picked() -> None:
    rng = np.random.default_rng(0)
    ranking, values = rng.normal(size=24), rng.normal(size=24)
    np.testing.assert_allclose(expected_best(ranking, values, 8, 8), values[pick_best(ranking, 8)])


@pytest.mark.parametrize("k", [0, 9])
def test_the_best_of_no_sample_or_of_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"best of {k} among 8"):
        expected_best(np.zeros(8), np.zeros(8), 8, k)


def test_a_curve_agrees_with_the_best_of_new_samples() -> None:
    """Gold and proxy are correlated normals: the best of k by the proxy gains as much as order statistics say."""
    rng, n, share = np.random.default_rng(7), 8, 0.6
    proxy = rng.normal(size=40_000 * n)
    gold = share * proxy + math.sqrt(1 - share**2) * rng.normal(size=len(proxy))
    rows = best_of_curve(proxy, gold, n, is_proxy=True)
    assert [(row["step"], row["kl"]) for row in rows] == [(k, kl_bound(k)) for k in (1, 2, 4, 8)]
    largest = {1: 0.0, 2: 0.56419, 4: 1.02938, 8: 1.42360}  # expectations of the largest of k standard normals
    for row in rows:
        assert row["proxy_reward"] == pytest.approx(largest[int(row["step"])], abs=0.01)
        assert row["reward"] == pytest.approx(share * largest[int(row["step"])], abs=0.01)
        assert row["standard_gain"] == pytest.approx(share * row["standard_proxy_gain"], abs=0.01)


def test_gains_need_a_proxy_and_samples_that_differ() -> None:
    values = np.arange(8.0)
    assert "standard_gain" not in best_of_curve(values, values, 4, is_proxy=False)[-1]
    assert "standard_gain" not in best_of_curve(values, np.ones(8), 4, is_proxy=True)[-1]


def test_the_number_of_samples_itself_ends_a_curve() -> None:
    values = np.arange(12.0)
    assert [row["step"] for row in best_of_curve(values, values, 6, is_proxy=True)] == [1, 2, 4, 6]
