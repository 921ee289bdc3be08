"""Exact measures of policies whose responses are all listed: nothing is sampled, nothing is estimated.

Arrays: P prompts, N responses. `logps` and `ref_logps` float64 [P, N] are log pi(y|x) and log pi_ref(y|x) in nats,
`rewards` [P, N]. Means over prompts weigh every prompt alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prefarena.evaluation.statistics import mean_and_stderr

_KL_TOLERANCE = 1e-10
_MOST_STEPS = 200


class Optimum(NamedTuple):
    """A point of the frontier, at inverse temperature lambda = 1 / beta."""

    inverse_temperature: float
    kl: float
    reward: float
    variance: float  # of the reward within prompts; dKL/dlambda = lambda * variance


class Frontier:
    """The best mean reward at any mean KL(pi || pi_ref) over a group of prompts.

    The maximiser of E[r] - beta KL is pi*(y|x) ∝ pi_ref(y|x) exp(r(x, y) / beta). With one beta for all prompts it is
    the best policy at a budget on the *mean* KL over the prompts: nothing says how a policy shares its KL between
    prompts, and neither does the budget.
    """

    def __init__(self, ref_logps: np.ndarray, rewards: np.ndarray) -> None:
        self._probabilities = np.exp(ref_logps)
        self._probabilities /= self._probabilities.sum(axis=1, keepdims=True)
        supported = self._probabilities > 0
        best = np.where(supported, rewards, -np.inf).max(axis=1, keepdims=True)
        # [P, N] <= 0, so that exp never overflows; 0 where the reference never goes, which carries no weight.
        self._shortfalls = np.where(supported, rewards - best, 0.0)
        self._best = float(best.mean())
        mass_at_best = np.where(self._shortfalls == 0, self._probabilities, 0.0).sum(axis=1)
        #: KL and reward of the limit beta -> 0: all probability on the best responses.
        self.largest = Optimum(np.inf, float(-np.log(mass_at_best).mean()), self._best, 0.0)

    def at(self, inverse_temperature: float) -> Optimum:
        """The optimum for lambda = 1 / beta >= 0."""
        weights = self._probabilities * np.exp(inverse_temperature * self._shortfalls)
        partition = weights.sum(axis=1)
        first = np.einsum("pn,pn->p", weights, self._shortfalls) / partition
        second = np.einsum("pn,pn,pn->p", weights, self._shortfalls, self._shortfalls) / partition
        kl = inverse_temperature * first - np.log(partition)
        variance = float((second - first**2).mean())
        return Optimum(inverse_temperature, max(0.0, float(kl.mean())), self._best + float(first.mean()), variance)

    def optimum_at(self, kl: float) -> Optimum:
        """The optimum of mean KL `kl` (nats), to 1e-9; beyond the largest KL that raises the reward, `largest`.

        Newton on sqrt(KL), which is near linear in lambda, kept inside a bracket by bisection. Raises ValueError for a
        negative or undefined KL.
        """
        if not kl >= 0:
            raise ValueError(f"a KL divergence cannot be negative: {kl}")
        if kl >= self.largest.kl:
            return self.largest
        low, high = 0.0, np.inf
        point = self.at(float(np.sqrt(2 * kl)))
        for _ in range(_MOST_STEPS):
            if abs(point.kl - kl) <= _KL_TOLERANCE:
                break
            if point.kl < kl:
                low = point.inverse_temperature
            else:
                high = point.inverse_temperature
            slope = point.inverse_temperature * point.variance / (2 * np.sqrt(point.kl)) if point.kl > 0 else 0.0
            step = (np.sqrt(kl) - np.sqrt(point.kl)) / slope if slope > 0 else np.inf
            guess = float(point.inverse_temperature + step)
            if not low < guess < high:
                guess = (low + high) / 2 if np.isfinite(high) else 2 * max(low, 1e-3)
            if guess in (low, high):  # neighbouring floats: no better lambda exists
                break
            point = self.at(guess)
        return point

    def curve(self, num_points: int = 33) -> list[list[float]]:
        """`num_points` [kl, reward] from the reference to the limit, denser where the reward rises fast."""
        spread = max(float(np.sqrt(self.at(0.0).variance)), 1e-12)
        points = [self.at(float(tangent) / spread) for tangent in np.tan(np.linspace(0.0, 1.5, num_points - 1))]
        return [[point.kl, point.reward] for point in (*points, self.largest)]

    def logps(self, inverse_temperature: float) -> np.ndarray:
        """log pi* [P, N] for lambda = 1 / beta."""
        with np.errstate(divide="ignore"):
            unnormalised = np.log(self._probabilities) + inverse_temperature * self._shortfalls
        return unnormalised - np.logaddexp.reduce(unnormalised, axis=1, keepdims=True)


def groups(covered: np.ndarray) -> dict[str, np.ndarray]:
    """Masks [P] of the prompts by group: all, covered (with pairs) and uncovered; an empty group is left out."""
    masks = {"all": np.ones_like(covered), "covered": covered, "uncovered": ~covered}
    return {name: mask for name, mask in masks.items() if mask.any()}


def frontiers(ref_logps: np.ndarray, rewards: np.ndarray, covered: np.ndarray) -> dict[str, Frontier]:
    """The frontier of every group; computed once and used for all methods."""
    return {name: Frontier(ref_logps[mask], rewards[mask]) for name, mask in groups(covered).items()}


def exact_metrics(
    logps: np.ndarray,
    ref_logps: np.ndarray,
    rewards: np.ndarray,
    covered: np.ndarray,
    lengths: np.ndarray,
    limits: dict[str, Frontier] | None = None,
) -> dict[str, float]:
    """Every exact measure of one policy, keyed `measure/group`. `limits` are `frontiers(...)` when at hand.

    reward E_pi[r] · kl KL(pi || ref), forward_kl KL(ref || pi) and entropy, in nats per sequence · best_probability, of
    the response of highest reward · frontier_reward, the best mean reward at this KL · regret, frontier_reward -
    reward · response_length, tokens with eos. Beside them, for tables that hold estimates too: kl, judge_score and
    response_length over all prompts, with standard errors of 0. Groups without prompts have no keys.
    """
    limits = frontiers(ref_logps, rewards, covered) if limits is None else limits
    by_prompt = _by_prompt(logps, ref_logps, rewards, lengths)
    row: dict[str, float] = {}
    for group, mask in groups(covered).items():
        for measure, values in by_prompt.items():
            row[f"{measure}/{group}"] = float(values[mask].mean())
        best = limits[group].optimum_at(max(0.0, row[f"kl/{group}"])).reward
        row[f"frontier_reward/{group}"] = best
        row[f"regret/{group}"] = best - row[f"reward/{group}"]
    row |= {"kl": row["kl/all"], "kl_stderr": 0.0, "judge_score": row["reward/all"], "judge_score_stderr": 0.0}
    row |= {"response_length": row["response_length/all"], "response_length_stderr": 0.0}
    return row


def expected_scores(logps: np.ndarray, scores: np.ndarray, covered: np.ndarray) -> dict[str, float]:
    """`proxy_reward/group`: E_pi[score] for each group, of a score [P, N] that need not be the gold reward."""
    by_prompt = (np.exp(logps) * scores).sum(axis=1)
    return {f"proxy_reward/{group}": float(by_prompt[mask].mean()) for group, mask in groups(covered).items()}


def _by_prompt(
    logps: np.ndarray, ref_logps: np.ndarray, rewards: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute each measure [P] per prompt."""
    probabilities, ref_probabilities = np.exp(logps), np.exp(ref_logps)
    best = rewards.argmax(axis=1)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where neither policy goes: carries no weight below
        log_ratio = logps - ref_logps
    return {
        "reward": (probabilities * rewards).sum(axis=1),
        "kl": _expected(probabilities, log_ratio),
        "forward_kl": _expected(ref_probabilities, -log_ratio),
        "entropy": -_expected(probabilities, logps),
        "best_probability": probabilities[np.arange(len(best)), best],
        "response_length": probabilities @ lengths,
    }


def _expected(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_y p v [P] with 0 log 0 = 0."""
    return (probabilities * np.where(probabilities > 0, values, 0.0)).sum(axis=1)


class WinRates(NamedTuple):
    """P(row's response has the higher gold reward) + P(equal) / 2: [K, K], and its standard error over prompts."""

    win_rate: np.ndarray
    stderr: np.ndarray


def win_rates(policies: list[np.ndarray], rewards: np.ndarray) -> WinRates:
    """Exact win rates between K policies' independent draws, each `policies` entry a log-prob array [P, N].

    A win rate is a mean over prompts and its error is over prompts too: the draws add none. `win_rate` + its
    transpose is 1, and the diagonal 1/2.
    """
    by_prompt = np.stack(
        [_win_rates(np.exp([logps[p] for logps in policies]), rewards[p]) for p in range(len(rewards))]
    )
    num_policies = len(policies)
    cells = [mean_and_stderr(by_prompt[:, i, j]) for i in range(num_policies) for j in range(num_policies)]
    table = np.array(cells).reshape(num_policies, num_policies, 2)
    return WinRates(table[..., 0], table[..., 1])


def _win_rates(probabilities: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Win rates [K, K] for one prompt: probabilities [K, N], rewards [N]."""
    order = np.argsort(rewards, kind="stable")
    starts = np.flatnonzero(np.diff(rewards[order], prepend=-np.inf) > 0)  # first of each run of equal rewards
    mass = np.add.reduceat(probabilities[:, order], starts, axis=1)
    mass /= mass.sum(axis=1, keepdims=True)
    beaten = np.cumsum(mass, axis=1) - mass / 2  # probability of a lower reward, and half of an equal one
    return mass @ beaten.T
