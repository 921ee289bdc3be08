"""The best mean reward at any mean KL from the reference, estimated from samples of the reference. Pure numpy.

The optimum is pi* ∝ pi_ref exp(lambda r) on every prompt, lambda = 1 / beta (`exact.Frontier`). With n samples of the
reference to each of P prompts, self-normalised importance sampling gives its normaliser, reward and KL on each prompt:

    Z = mean exp(lambda r),   R = sum w r with w = exp(lambda r) / sum exp(lambda r),   KL = lambda R - log Z.

log Z and R are biased by O(1/n), which no number of prompts mends; a jackknife over a prompt's samples takes that away.
n samples cannot show a policy further than log n from the reference, and long before that a handful of them carries all
weight: `largest_kl` says how far the estimate is to be trusted, and nothing is given beyond it.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import numpy as np

from prefarena.evaluation.statistics import Estimate, mean_and_stderr

_MOST_STEPS = 100
#: The estimate is trusted where on all but this share of the prompts the weight lies on as many samples as that, by
#: their effective number. With fewer the jackknife no longer keeps up with the bias, as
#: tests/unit/test_estimated_frontier.py shows.
_FEW_PROMPTS, _LEAST_SAMPLES = 0.1, 3.0
#: The largest inverse temperature that is looked at, in units of the reward's spread: all weight on the best samples.
_MOST_SPREADS = 1e3
#: What the reference itself is taken at, where the formulas have 0 / 0; in units of the reward's spread.
_LEAST = 1e-6


class Point(NamedTuple):
    """The optimum at an inverse temperature: its mean KL and reward over prompts, and the reward's standard error.

    stderr: of the frontier's height at this KL, over prompts. As the frontier's slope is 1 / lambda, it is the error of
    the mean of R - KL / lambda = log(Z) / lambda.
    """

    inverse_temperature: float
    kl: float
    reward: float
    stderr: float


class _Moments(NamedTuple):
    """Moments of every prompt [P]: log Z, R, and the effective sample size 1 / sum w^2."""

    log_partition: np.ndarray
    reward: np.ndarray
    effective: np.ndarray


class EstimatedFrontier:
    """The frontier from scores [N] of the reference's samples and their prompts' numbers [N]; nan: unknown score.

    `prompts` [P]: those that it was estimated on, which have two known scores or more.
    """

    def __init__(self, scores: np.ndarray, clusters: np.ndarray) -> None:
        known = ~np.isnan(scores)
        numbers, counts = np.unique(clusters[known], return_counts=True)
        self.prompts = numbers[counts > 1]
        rows = [scores[known & (clusters == prompt)] for prompt in self.prompts]
        width = max((len(row) for row in rows), default=0)
        self._scores = np.array([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])
        self._scores = self._scores.reshape(len(rows), width)
        self._counts = np.array([len(row) for row in rows])
        self._largest, self._is_whole = self._trusted()

    def of(self, prompts: np.ndarray) -> EstimatedFrontier:
        """The frontier of some of its prompts."""
        kept, found = np.isin(self.prompts, prompts), copy(self)
        found.prompts, found._scores, found._counts = self.prompts[kept], self._scores[kept], self._counts[kept]
        found._largest, found._is_whole = found._trusted()
        return found

    @property
    def largest_kl(self) -> float:
        """The largest KL from the reference up to which the estimate can be trusted."""
        return self._largest.kl

    def at(self, inverse_temperature: float) -> Point:
        """The optimum for lambda = 1 / beta > 0."""
        moments = self._moments(inverse_temperature)
        kl = inverse_temperature * moments.reward - moments.log_partition
        height = mean_and_stderr(moments.log_partition / inverse_temperature)
        return Point(inverse_temperature, float(kl.mean()), float(moments.reward.mean()), height.stderr)

    def optimum_at(self, kl: float) -> Point | None:
        """The optimum of mean KL `kl`, nats; None beyond `largest_kl`. At 0 and below it is the reference.

        Where the samples show the frontier to its end (all weight on the best responses, of which there are many), that
        end is the optimum of every larger KL.
        """
        if not len(self.prompts):
            return None
        if kl > self._largest.kl:
            return self._largest if self._is_whole else None
        low, high = self._least, self._largest.inverse_temperature
        if kl <= self.at(low).kl:
            return self.at(low)._replace(kl=0.0)
        for _ in range(_MOST_STEPS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (middle, high) if self.at(middle).kl < kl else (low, middle)
        return self.at(high)

    def regret(self, kls: np.ndarray, rewards: np.ndarray) -> Estimate | None:
        """How far below the frontier a policy's mean reward lies at its own mean KL, and the standard error.

        kls, rewards: the policy's means on each of the frontier's prompts [P], in their order. Paired by prompt: with
        lambda that of the optimum at the policy's KL, the regret is the mean of (log Z + KL) / lambda - reward, which
        is KL(policy || optimum) / lambda, and lambda makes it as small as it can be, so that its own error is no part
        of that of the mean. None beyond `largest_kl`.
        """
        point = self.optimum_at(float(kls.mean())) if len(kls) else None
        if point is None:
            return None
        moments, strength = self._moments(point.inverse_temperature), point.inverse_temperature
        if kls.mean() > self._largest.kl:
            return mean_and_stderr(moments.reward - rewards)
        spent = kls if point.kl > 0 else np.zeros_like(kls)
        return mean_and_stderr((moments.log_partition + spent) / strength - rewards)

    def curve(self, num_points: int = 33) -> list[Point]:
        """Points from the reference as far as the estimate is to be trusted, evenly spread in the root of the KL."""
        if not len(self.prompts):
            return []
        kls = self._largest.kl * np.linspace(0, 1, num_points) ** 2
        found = [self.optimum_at(float(kl)) for kl in kls[:-1]]
        return [*(point for point in found if point is not None), self._largest]

    @property
    def _least(self) -> float:
        spread = float(np.sqrt(np.nanmean(np.nanvar(self._scores, axis=1))))
        return _LEAST / max(spread, 1e-12)

    def _trusted(self) -> tuple[Point, bool]:
        """The furthest optimum that the samples still show, to within a thousandth of its inverse temperature.

        Also whether it is the frontier's end.
        """
        if not len(self.prompts):
            return Point(0.0, 0.0, float("nan"), float("nan")), False
        low, high, end = self._least, self._least, _MOST_SPREADS * self._least / _LEAST
        if not self._is_shown(low):
            return self.at(low)._replace(kl=0.0), False
        while high < end and self._is_shown(high):
            low, high = high, 2 * high
        is_whole = self._is_shown(high)
        while high - low > 1e-3 * low:
            middle = (low + high) / 2
            low, high = (middle, high) if self._is_shown(middle) else (low, middle)
        return self.at(low), is_whole

    def _is_shown(self, inverse_temperature: float) -> bool:
        """Whether enough samples carry the weight, and the KL is not near what these samples can show at the most."""
        moments = self._moments(inverse_temperature)
        kl = inverse_temperature * moments.reward - moments.log_partition
        enough = np.quantile(moments.effective, _FEW_PROMPTS) >= _LEAST_SAMPLES
        return bool(enough and kl.mean() <= np.log(self._counts).mean() - 1)

    def _moments(self, inverse_temperature: float) -> _Moments:
        scores, counts = np.nan_to_num(self._scores), self._counts
        known = ~np.isnan(self._scores)
        top = np.where(known, scores, -np.inf).max(axis=1)
        weights = np.where(known, np.exp(inverse_temperature * np.where(known, scores - top[:, None], 0.0)), 0.0)
        total = weights.sum(axis=1)
        weights /= total[:, None]
        log_partition = np.log(total / counts) + inverse_temperature * top
        reward = (weights * scores).sum(axis=1)
        # Without one sample each; a sample that has all the weight leaves nothing, and is not trusted anyway.
        left = 1 - np.minimum(weights, 1 - 1e-9)
        one_less = np.log(total / (counts - 1))[:, None] + np.log(left) + inverse_temperature * top[:, None]
        reward_less = (reward[:, None] - weights * scores) / left
        return _Moments(
            _jackknifed(log_partition, one_less, known),
            _jackknifed(reward, reward_less, known),
            1 / (weights**2).sum(axis=1),
        )


def _jackknifed(whole: np.ndarray, without_one: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Remove the bias of O(1/n) from the estimates [P], with those that leave out each sample [P, n]."""
    counts = known.sum(axis=1)
    mean = np.where(known, without_one, 0.0).sum(axis=1) / counts
    return counts * whole - (counts - 1) * mean
