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


def numbers_up_to(most: int) -> list[int]:
    """The numbers 1, 2, 4, … of samples, and `most`: those whose best are measured."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


def best_of_curve(ranking: np.ndarray, scores: np.ndarray, n: int, *, is_proxy: bool) -> list[dict[str, float]]:
    """Rows of the best of 1, 2, 4, … and n samples, from M consecutive groups of n: `ranking` and `scores` [M * n].

    `step`: how many samples; `kl`: its upper bound; `reward` and `proxy_reward`: means of the scores, and of what ranks
    them. Where the latter is a proxy for the scores, `standard_gain` and `standard_proxy_gain` over the first row are
    in standard deviations of the samples; neither is there if all samples have one score.
    """
    values, rows = {"reward": scores, "proxy_reward": ranking}, list[dict[str, float]]()
    for k in numbers_up_to(n):
        means = {name: float(np.nanmean(expected_best(ranking, one, n, k))) for name, one in values.items()}
        rows.append({"step": k, "kl": kl_bound(k), **means})
    spreads = {name: float(np.nanstd(one)) for name, one in values.items()}
    if is_proxy and min(spreads.values()) > 0:
        for row in rows:
            gains = {name: (row[name] - rows[0][name]) / spread for name, spread in spreads.items()}
            row |= {"standard_gain": gains["reward"], "standard_proxy_gain": gains["proxy_reward"]}
    return rows


def expected_best(ranking: np.ndarray, values: np.ndarray, n: int, k: int) -> np.ndarray:
    """Return, for each group of n samples, the mean value of the best of `k` of them over all subsets of that size [M].

    It is unbiased for the best of `k` samples, and spreads less than one subset's. `ranking`, `values` [M * n]; samples
    without a rank (nan) come last, and those without a value are left out. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"the best of {k} among {n} samples is not defined")
    known = np.where(np.isnan(ranking), -np.inf, ranking).reshape(-1, n)
    order = np.argsort(-known, axis=1, kind="stable")
    ordered = np.take_along_axis(values.reshape(-1, n), order, axis=1)
    # The sample in place j is the best of those subsets that take it and k - 1 of the n - 1 - j behind it.
    weights = np.array([math.comb(n - 1 - place, k - 1) / math.comb(n, k) for place in range(n)])
    there = np.where(np.isnan(ordered), 0.0, weights)
    with np.errstate(invalid="ignore"):
        return (there * np.nan_to_num(ordered)).sum(axis=1) / there.sum(axis=1)


def pick_best(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices [M] of the best of each of M consecutive groups of n samples, from scores [M * n]; the first of a tie.

    A sample without a score (nan) is the best of its group only where no other has one either.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    return np.arange(0, len(scores), n) + known.reshape(-1, n).argmax(axis=1)
