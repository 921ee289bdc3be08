"""Means and their standard errors, against closed forms and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefarena.evaluation.statistics import binomial, clustered, mean_and_stderr, paired_difference


def test_mean_and_stderr_by_hand() -> None:
    assert mean_and_stderr([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt((4 + 1 + 0 + 9) / 3 / 4)))


@pytest.mark.filterwarnings("error")
def test_one_value_has_no_stderr() -> None:
    mean, stderr = mean_and_stderr([2.5])
    assert mean == 2.5 and math.isnan(stderr)
    mean, stderr = clustered([1.0, 2.0], ["a", "a"])
    assert mean == 1.5 and math.isnan(stderr)


def test_two_clusters_have_a_stderr() -> None:
    """Means 2 and 5 of two clusters of two: 3.5, with the error of two independent values."""
    assert clustered([1.0, 3.0, 4.0, 6.0], [7, 7, 9, 9]) == pytest.approx((3.5, 1.5))


def test_single_precision_is_summed_in_double() -> None:
    """In float32 2^24 + 1 is 2^24."""
    values = np.array([2.0**24, 1.0, 1.0, 1.0], dtype=np.float32)
    assert mean_and_stderr(values).mean == (2**24 + 3) / 4


def test_paired_difference_removes_what_pairs_share() -> None:
    shared = np.random.default_rng(0).normal(size=50) * 100
    noise = np.random.default_rng(1).normal(size=50)
    difference = paired_difference(shared + 1 + noise, shared)
    assert difference == pytest.approx(mean_and_stderr(1 + noise))
    assert difference.stderr < 0.3


def test_binomial_by_hand() -> None:
    assert binomial([1, 1, 1, 0]) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 4)))
    assert binomial([0.5, 0.5]) == pytest.approx((0.5, math.sqrt(0.25 / 2)))


def test_clustered_equals_the_stderr_of_equal_clusters_means() -> None:
    values = np.random.default_rng(0).normal(size=(12, 5))
    labels = np.repeat([f"prompt {i}" for i in range(12)], 5)
    assert clustered(values.ravel(), labels) == pytest.approx(mean_and_stderr(values.mean(axis=1)))
    assert clustered(values.ravel(), np.arange(60)) == pytest.approx(mean_and_stderr(values))


def test_clustered_stderr_is_the_spread_of_the_mean() -> None:
    """Unequal clusters with a shared part: 2000 simulated means spread as their estimated errors say."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), rng.integers(1, 6, size=40))
    estimates = np.array(
        [clustered(rng.normal(size=40)[labels] + rng.normal(size=len(labels)), labels) for _ in range(2000)]
    )
    spread, claimed = estimates[:, 0].std(), np.sqrt((estimates[:, 1] ** 2).mean())
    assert claimed == pytest.approx(spread, rel=0.06)
    naive = np.sqrt(2 / len(labels))
    assert spread > 1.3 * naive


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_and_stderr([])
    with pytest.raises(ValueError, match="there must be equally many paired values"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="outside"):
        binomial([0.0, 1.5])
    with pytest.raises(ValueError, match="3 values have 2"):
        clustered([1.0, 2.0, 3.0], [0, 1])
