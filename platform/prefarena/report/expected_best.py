"""The value that the best of k trials is expected to reach, from n made trials (Dodge et al., arXiv 1909.03004).

Of n values, the best of k that are drawn without replacement is on average

    sum over i of v_(i) C(i - 1, k - 1) / C(n, k),

with v_(1) <= ... <= v_(n): v_(i) is the best of those subsets of k that hold it and k - 1 of the i - 1 below it. Dodge
et al. draw with replacement, sum over i of v_(i) ((i / n)^k - ((i - 1) / n)^k), which is too low on average, since a
draw may hold one trial twice; at k = n it is lower than what was found. The sum above is right on average for k
independent trials (Tang et al., arXiv 2004.13705) and at k = n is the best that was found, so that curve and winner
agree. It varies more, and on values with a long upper tail is off by more in the mean square (Dodge et al., arXiv
2110.00613); on values under a ceiling, as rewards within a limit of KL are, it is the better one in both
(`docs/tuning.md` has the numbers).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
_NUM_RESAMPLES = 1000
_FEWEST = 4  # trials: fewer say nothing of how trials spread


class ExpectedBest(NamedTuple):
    """For k = 1 … n: the expected best of k trials, and its interval [n, 2]; nan where none can be given."""

    mean: np.ndarray
    interval: np.ndarray


def expected_best(values: ArrayLike) -> np.ndarray:
    """The mean, over all subsets of k = 1 … n of the n `values`, of their maximum, [n]."""
    ordered = np.sort(_vector(values))
    return ordered @ _weights(len(ordered))


def expected_best_with_interval(values: ArrayLike, seed: int) -> ExpectedBest:
    """The curve, with percentile intervals of trials that are drawn again with replacement, from this seed.

    No interval is given for more than half of the trials, nor for fewer than four: no resample holds a better trial
    than the best that was found, so that near k = n the interval misses what a luckier search finds.
    """
    found = _vector(values)
    number = len(found)
    interval = np.full((number, 2), np.nan)
    if number >= _FEWEST:
        places = np.random.default_rng(seed).integers(number, size=(_NUM_RESAMPLES, number))
        curves = np.sort(found[places], axis=1) @ _weights(number)[:, : number // 2]
        interval[: number // 2] = np.quantile(curves, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T
    return ExpectedBest(expected_best(found), interval)


def best_so_far(values: ArrayLike) -> np.ndarray:
    """The largest of the first k = 1 … n values, in the order in which the trials were made, [n]."""
    return np.maximum.accumulate(_vector(values))


def _weights(number: int) -> np.ndarray:
    """Weights [n, n]: in column k - 1, how often each of the ordered values is the best of k.

    By w(n) = k / n and w(i - 1) = w(i) (i - k) / (i - 1), which needs no binomials of large numbers.
    """
    k = np.arange(1, number + 1)
    rows = [k / number]
    for i in range(number, 1, -1):
        rows.append(rows[-1] * np.maximum(i - k, 0) / (i - 1))
    return np.array(rows[::-1])


def _vector(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array):
        raise ValueError("no trials: there is no best of them")
    return array
