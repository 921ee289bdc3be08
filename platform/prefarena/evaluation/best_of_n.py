"""Best-of-n: the response that a score ranks first among n independent samples of the reference.

Nothing is trained, so it is the baseline of whatever a score is optimised with. Where all responses are listed its
distribution is known exactly; where they are not, the KL divergence has an analytic upper bound.
"""

from __future__ import annotations

import math

import numpy as np


def best_of_n_logps(ref_logps: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Return log pi(y|x) [P, N], nats, of the best of `n` samples of the reference; ties are broken at random.

    With F(s) the probability that a sample scores at most s, the best sample scores s with probability
    F(s)^n - F(s-)^n, which responses of equal score share in proportion to their probability under the reference.
    `ref_logps`, `scores` [P, N]; rows of `ref_logps` sum to 1 in probability. Raises ValueError where n < 1.
    """
    if n < 1:
        raise ValueError(f"the best of {n} samples is not defined")
    return np.stack([_best_of_n(logps, values, n) for logps, values in zip(ref_logps, scores, strict=True)])


def _best_of_n(ref_logps: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Compute the log-probs [N] for one prompt."""
    run = np.unique(scores, return_inverse=True)[1]  # equal scores have one number, and higher ones a higher
    masses = np.bincount(run, weights=np.exp(ref_logps))
    masses = masses / masses.sum()
    at_most = np.minimum(np.cumsum(masses), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # (F^n - (F - m)^n) / m in logarithms: neither a small mass nor a large n loses digits
        gained = n * np.log(at_most) + np.log(-np.expm1(n * np.log1p(-masses / at_most))) - np.log(masses)
    return ref_logps + np.where(masses > 0, gained, 0.0)[run]


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n, nats per sequence: no less than KL(best of n || reference), whatever the score.

    It is the KL where no two samples are ever alike or tied, which on long responses is nearly so (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def pick_best(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices [M] of the best of each of M consecutive groups of n samples, from scores [M * n]; the first of a tie.

    A sample without a score (nan) is the best of its group only where no other has one either.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    return np.arange(0, len(scores), n) + known.reshape(-1, n).argmax(axis=1)
