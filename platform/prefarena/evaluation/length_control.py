"""Win rates at equal length: what a policy would win if its responses were as long as the other's. Pure numpy.

A judge may like length for its own sake. As AlpacaEval 2 does (arXiv 2404.04475), a logistic regression of who wins on
the difference in length takes that away: P(win) = sigmoid(a + b tanh(d / s)), d the own response's tokens less the
other's and s the standard deviation of d, and the win rate at equal length is sigmoid(a). AlpacaEval's third term, how
hard each instruction is, needs verdicts of many policies and is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from prefarena.evaluation.statistics import Estimate, mean_and_stderr

#: Of the squares of a and b, in units of one prompt's pairs: it matters only where every pair has the same winner.
_RIDGE = 1e-2
_MOST_STEPS = 100


class Pairs(NamedTuple):
    """N pairs of responses to one prompt each.

    outcomes [N]: 1 where the own response wins, 0 where the other does, 1/2 for a tie. differences [N]: the own
    response's tokens less the other's. clusters [N]: the prompt.
    """

    outcomes: np.ndarray
    differences: np.ndarray
    clusters: np.ndarray


class Answers(NamedTuple):
    """N responses of a policy: their scores (nan where a judge was silent), tokens, and prompts."""

    scores: np.ndarray
    lengths: np.ndarray
    clusters: np.ndarray


def all_pairs(own: Answers, other: Answers) -> Pairs:
    """Every response of one policy with every one of the other to the same prompt, except those without a score."""
    parts = []
    for prompt in np.intersect1d(own.clusters, other.clusters):
        one, two = (np.flatnonzero((side.clusters == prompt) & ~np.isnan(side.scores)) for side in (own, other))
        outcomes = (np.sign(own.scores[one][:, None] - other.scores[two]) + 1) / 2
        differences = own.lengths[one][:, None] - other.lengths[two]
        parts.append((outcomes.ravel(), differences.ravel(), np.full(outcomes.size, prompt)))
    return (
        Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else Pairs(*np.zeros((3, 0)))
    )


def win_rate_at_equal_length(pairs: Pairs, weights: ArrayLike | None = None) -> Estimate:
    """sigmoid(a) of the regression above, with its standard error over prompts (sandwich, delta method).

    Prompts weigh alike; `weights` [N] share a prompt's weight among its pairs, by default evenly. Where no two
    differences differ it is the plain win rate. Without pairs both are nan.
    """
    outcomes, clusters = np.asarray(pairs.outcomes, np.float64), np.asarray(pairs.clusters)
    if not len(outcomes):
        return Estimate(float("nan"), float("nan"))
    _, prompt = np.unique(clusters, return_inverse=True)
    number = int(prompt.max()) + 1
    shares = np.ones(len(outcomes)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / np.bincount(prompt, weights=shares)[prompt]
    spread = _spread(pairs.differences, shares)
    if spread == 0:
        return mean_and_stderr(np.bincount(prompt, weights=shares * outcomes))
    design = np.stack([np.ones(len(outcomes)), np.tanh(pairs.differences / spread)], axis=1)
    found = _fit(design, outcomes, shares)
    chances = _sigmoid(design @ found)
    bread = np.linalg.inv(_curvature(design, chances, shares))
    residuals = design * (shares * (outcomes - chances))[:, None]
    scores = np.stack([np.bincount(prompt, weights=column) for column in residuals.T], axis=1)
    if number < 2:
        return Estimate(float(_sigmoid(found[0])), float("nan"))
    variance = number / (number - 1) * (bread @ (scores.T @ scores) @ bread)[0, 0]
    rate = float(_sigmoid(found[0]))
    return Estimate(rate, rate * (1 - rate) * float(np.sqrt(variance)))


def _fit(design: np.ndarray, outcomes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(a, b) of the largest penalised likelihood, by Newton's method with halved steps where one is too long."""

    def loss(parameters: np.ndarray) -> float:
        logits = design @ parameters
        return float(shares @ (np.logaddexp(0, logits) - outcomes * logits) + _RIDGE / 2 * parameters @ parameters)

    found = np.zeros(2)
    for _ in range(_MOST_STEPS):
        chances = _sigmoid(design @ found)
        gradient = design.T @ (shares * (chances - outcomes)) + _RIDGE * found
        step = np.linalg.solve(_curvature(design, chances, shares), gradient)
        if np.abs(step).max() < 1e-10:
            break
        before, size = loss(found), 1.0
        while loss(found - size * step) > before and size > 1e-6:
            size /= 2
        found = found - size * step
    return found


def _curvature(design: np.ndarray, chances: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return (design.T * (shares * chances * (1 - chances))) @ design + _RIDGE * np.eye(2)


def _spread(differences: np.ndarray, shares: np.ndarray) -> float:
    mean = np.average(differences, weights=shares)
    return float(np.sqrt(np.average((differences - mean) ** 2, weights=shares)))


def _sigmoid(values: np.ndarray | float) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.asarray(values, np.float64)))
