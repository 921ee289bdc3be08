"""Means with their standard errors. Pure numpy; float64 throughout.

A standard error that cannot be estimated (one observation) is nan, never 0: a single seed shows no spread.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float


def mean_and_stderr(values: ArrayLike) -> Estimate:
    """Mean of independent `values` [N] (seeds, prompts) and its standard error s / sqrt(N), s with N - 1."""
    array = _vector(values)
    stderr = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else float("nan")
    return Estimate(float(array.mean()), stderr)


def paired_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Mean of first - second over pairs [N] (the same seed or prompt in both) with its standard error."""
    one, two = _vector(first), _vector(second)
    if len(one) != len(two):
        raise ValueError(f"there must be equally many paired values: {len(one)} and {len(two)}")
    return mean_and_stderr(one - two)


def binomial(values: ArrayLike) -> Estimate:
    """Share of successes among independent `values` [N] in [0, 1] and sqrt(p (1 - p) / N).

    Ties may be given as 1/2; the error is then an upper bound.
    """
    array = _vector(values)
    if array.min() < 0 or array.max() > 1:
        raise ValueError("successes lie outside [0, 1]")
    share = float(array.mean())
    return Estimate(share, float(np.sqrt(share * (1 - share) / len(array))))


def clustered(values: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Mean of `values` [N] and its standard error when values of one cluster [N] (a prompt) hang together.

    The sandwich of the sample mean with its small-sample factor G / (G - 1) for G clusters. Clusters of equal size
    give the standard error of the cluster means; clusters of one, that of `mean_and_stderr`.
    """
    array = _vector(values)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(index) != len(array):
        raise ValueError(f"{len(array)} values have {len(index)} cluster labels")
    mean, number = float(array.mean()), int(index.max()) + 1
    if number < 2:
        return Estimate(mean, float("nan"))
    totals = np.bincount(index, weights=array - mean)
    return Estimate(mean, float(np.sqrt(number / (number - 1) * (totals**2).sum()) / len(array)))


def _vector(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array):
        raise ValueError("no values to average")
    return array
