"""The expected best of k trials, against the enumeration of all subsets, and what its intervals hold."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from prefarena.report.expected_best import best_so_far, expected_best, expected_best_with_interval

TRIALS = [
    pytest.param([0.3, -1.2, 0.9, 0.3, 2.5, 0.0, 0.9], id="with ties"),
    pytest.param([4.0], id="one trial"),
    pytest.param([1.0, 1.0, 1.0], id="all alike"),
    pytest.param([-3.0, -1.0, -2.0, -9.0], id="all below zero"),
]


@pytest.mark.parametrize("values", TRIALS)
def test_it_is_the_mean_of_the_best_of_all_subsets(values: list[float]) -> None:
    by_hand = [np.mean([max(chosen) for chosen in combinations(values, k)]) for k in range(1, len(values) + 1)]
    np.testing.assert_allclose(expected_best(values), by_hand, rtol=1e-12)


@pytest.mark.parametrize("values", TRIALS)
def test_it_begins_at_the_mean_and_ends_at_the_best(values: list[float]) -> None:
    curve = expected_best(values)
    assert curve[0] == pytest.approx(np.mean(values)) and curve[-1] == pytest.approx(max(values))
    assert (np.diff(curve) >= -1e-12).all()


def test_draws_with_replacement_would_be_lower_at_every_number_but_one() -> None:
    """The estimator of 1909.03004, by enumeration of all tuples: it does not reach what was found."""
    values = [0.3, -1.2, 0.9, 2.5]
    tuples = [np.mean([max(chosen) for chosen in product(values, repeat=k)]) for k in range(1, 5)]
    curve = expected_best(values)
    assert curve[0] == pytest.approx(tuples[0]) and (curve[1:] > np.array(tuples[1:]) + 0.1).all()


def test_the_order_of_trials_changes_what_happened_and_not_what_is_expected() -> None:
    values = [0.3, -1.2, 0.9, 0.3, 2.5, 0.0]
    np.testing.assert_allclose(expected_best(values), expected_best(values[::-1]))
    assert best_so_far(values).tolist() == [0.3, 0.3, 0.9, 0.9, 2.5, 2.5]
    assert best_so_far(values[::-1]).tolist() == [0.0, 2.5, 2.5, 2.5, 2.5, 2.5]


def test_many_trials_overflow_nothing() -> None:
    values = np.random.default_rng(0).normal(size=1500)
    curve = expected_best(values)
    assert np.isfinite(curve).all() and curve[-1] == pytest.approx(values.max())


def test_it_is_right_on_average_for_new_trials() -> None:
    """Of uniform values the best of k is k / (k + 1) on average, also as estimated from ten of them."""
    searches = np.random.default_rng(1).random((1000, 10))
    found = np.mean([expected_best(search) for search in searches], axis=0)
    k = np.arange(1, 11)
    np.testing.assert_allclose(found, k / (k + 1), atol=1e-2)


def test_intervals_hold_the_truth_about_as_often_as_they_say_where_they_are_given() -> None:
    searches = np.random.default_rng(2).random((80, 24))
    found = np.array([expected_best_with_interval(search, 0).interval for search in searches])
    truth = np.arange(1, 25) / np.arange(2, 26)
    held = ((found[:, :, 0] <= truth) & (truth <= found[:, :, 1])).mean(axis=0)
    assert (held[:4] > 0.8).all()
    assert np.isnan(found[:, 12:]).all() and not np.isnan(found[:, :12]).any()


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=16)
    one, again, other = (expected_best_with_interval(values, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.interval, again.interval)
    assert not np.array_equal(one.interval[0], other.interval[0])
    assert (one.interval[:8, 0] <= one.mean[:8]).all() and (one.mean[:8] <= one.interval[:8, 1]).all()


def test_three_trials_have_no_interval() -> None:
    assert np.isnan(expected_best_with_interval([1.0, 2.0, 3.0], 0).interval).all()
    assert not np.isnan(expected_best_with_interval([1.0, 2.0, 3.0, 4.0], 0).interval[:2]).any()


def test_no_trials_have_no_best() -> None:
    with pytest.raises(ValueError, match="no trials"):
        expected_best([])
