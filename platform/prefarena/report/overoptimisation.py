"""Gao, Schulman and Hilton's two laws of over-optimisation (arXiv 2210.10760), fitted to what was measured on the way.

With d the root of KL(pi || pi_ref) and R the gold reward above the reference's,

    best of n:  R(d) = d (alpha - beta d),        learning:  R(d) = d (alpha - beta log d).

alpha is the gain of the first step, beta what over-optimisation takes of it; where beta > 0 the laws have a peak, at
d = alpha / (2 beta) and d = exp(alpha / beta - 1). Both are linear in alpha and beta: they are fitted by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from prefarena.report.results import EntryResult, EvalRow, Results, mean_and_error
from prefarena.report.significance import LEVEL, student_quantile
from prefarena.report.tables import Table, number

Law = Literal["best of n", "learning"]
#: Fewest points of a curve: two are fitted. Of a single curve two are left to say how well; several say it together.
_FEWEST, _FEWEST_OF_SEVERAL = 4, 3


class Interval(NamedTuple):
    """A value and the ends of its 95 % confidence interval; the ends are None where none can be given."""

    value: float
    low: float | None
    high: float | None


class Fit(NamedTuple):
    """A law through the curves of one entry, one for each seed.

    The interval is over seeds where there are several (Student's t), else from the residuals of the one curve, as if
    its points were independent. residual: root mean square, in units of the reward. num_points: of all curves.
    largest_kl: the largest KL that they reach.
    """

    law: Law
    alpha: Interval
    beta: Interval
    residual: float
    num_points: int
    largest_kl: float

    @property
    def peak(self) -> tuple[float, float] | None:
        """KL and gain at the law's peak; None where it has none, or only beyond twice the KL that was measured."""
        alpha, beta = self.alpha.value, self.beta.value
        if alpha <= 0 or beta <= 0:
            return None
        root = math.log(alpha / (2 * beta)) if self.law == "best of n" else alpha / beta - 1  # the logarithm of d
        if 2 * root > math.log(2 * self.largest_kl):
            return None
        kl = math.exp(2 * root)
        return kl, self.at(kl)

    def at(self, kl: float) -> float:
        """The gain in gold reward that the law has at a KL."""
        d = math.sqrt(kl)
        first, second = _design(np.array([d]), self.law)[0] if d > 0 else (0.0, 0.0)
        return float(self.alpha.value * first + self.beta.value * second)

    def line(self) -> np.ndarray:
        """(KL, gain) [60, 2] along the law, as far as was measured."""
        kls = self.largest_kl * np.linspace(0, 1, 60) ** 2
        return np.stack([kls, [self.at(float(kl)) for kl in kls]], axis=1)


def fit_law(law: Law, curves: Sequence[Sequence[EvalRow]]) -> Fit | None:
    """The law through one curve a seed, rows with `kl` and `reward`, the first of which is the reference.

    None where a curve has fewer than four points away from the reference, or three if there are several curves.
    """
    fewest = _FEWEST if len(curves) == 1 else _FEWEST_OF_SEVERAL
    fitted = [_fit_one(law, rows, fewest) for rows in curves]
    if not fitted or any(one is None for one in fitted):
        return None
    known = [one for one in fitted if one is not None]
    parameters = np.array([one[0] for one in known])
    residuals = np.concatenate([one[2] for one in known])
    rms = float(np.sqrt((residuals**2).mean()))
    if len(known) == 1:
        (alpha, beta), errors, _ = known[0]
        width = student_quantile(len(residuals) - 2)
        intervals = [
            Interval(float(value), float(value - width * error), float(value + width * error))
            for value, error in zip((alpha, beta), errors, strict=True)
        ]
    else:
        intervals = [_over_seeds(list(column)) for column in parameters.T]
    largest = max(row["kl"] for rows in curves for row in rows)
    return Fit(law, intervals[0], intervals[1], rms, len(residuals), largest)


def _fit_one(law: Law, rows: Sequence[EvalRow], fewest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """alpha and beta, their standard errors from the residuals, and the residuals; None for too few points."""
    start = rows[0]["reward"] if rows else 0.0
    points = np.array([(math.sqrt(row["kl"]), row["reward"] - start) for row in rows if row["kl"] > 0])
    if len(points) < fewest:
        return None
    design = _design(points[:, 0], law)
    if np.linalg.matrix_rank(design) < 2:
        return None
    found = np.linalg.lstsq(design, points[:, 1], rcond=None)[0]
    residuals = points[:, 1] - design @ found
    variance = float(residuals @ residuals) / (len(points) - 2)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return found, errors, residuals


def _design(d: np.ndarray, law: Law) -> np.ndarray:
    """The design matrix [N, 2]: what alpha and beta are multiplied by."""
    return np.stack([d, -(d**2) if law == "best of n" else -d * np.log(d)], axis=1)


def _over_seeds(values: list[float]) -> Interval:
    mean, error = mean_and_error(values)
    if error is None:
        return Interval(mean, None, None)
    width = student_quantile(len(values) - 1) * error
    return Interval(mean, mean - width, mean + width)


# ------------------------------------------------------------------------------------------------ report


def fits(results: Results) -> dict[str, Fit]:
    """The law of each entry whose policies were measured on the way: learning, or the best of ever more samples."""
    found = {}
    for entry in results.trained():
        learned, drawn = results.trajectories.get(entry.name), results.best_of_curves.get(entry.name)
        fit = None
        if learned:
            fit = fit_law("learning", list(learned.values()))
        elif drawn:
            fit = fit_law("best of n", list(drawn.values()))
        if fit is not None:
            found[entry.name] = fit
    return found


def law_line(results: Results, entry: EntryResult) -> np.ndarray | None:
    """(KL, gold reward) [60, 2] along the law fitted to an entry's training, as far as it was measured."""
    curves = list(results.trajectories.get(entry.name, {}).values())
    fit = fit_law("learning", curves) if curves else None
    if fit is None:
        return None
    start = float(np.mean([rows[0]["reward"] for rows in curves]))
    return fit.line() + np.array([0.0, start])


def law_table(results: Results) -> Table | None:
    """A row for each entry that a law was fitted to; None where there is none."""
    found = fits(results)
    if not found:
        return None
    rows = []
    for name, fit in found.items():
        peak = fit.peak
        rows.append(
            (
                name,
                "d(α − βd)" if fit.law == "best of n" else "d(α − β log d)",
                _shown(fit.alpha),
                _shown(fit.beta),
                number(peak[0] if peak else None, 2),
                number(peak[1] if peak else None, 3),
                number(fit.residual, 3),
                str(fit.num_points),
            )
        )
    several = len(results.seeds) > 1
    how = (
        "over seeds (Student's t)"
        if several
        else "from the residuals of the one curve, as if its points were independent"
    )
    caption = (
        "Laws of over-optimisation (Gao et al., arXiv 2210.10760) fitted by least squares: gold reward above the "
        f"reference's against d, the square root of KL(π ‖ ref). In brackets: {1 - LEVEL:.0%} confidence intervals, "
        f"{how}. With β above 0 the gain fades with distance; a peak is given if it lies within twice the KL that was "
        "measured. "
        "Residual: root mean square, in the reward's units; if it is not small compared with the gain, the law does "
        "not hold."
    )
    header = ("policy", "law", "α", "β", "KL at the peak", "gain there", "residual", "points")
    return Table(f"{results.name}: laws of over-optimisation", header, tuple(rows), caption, 2)


def _shown(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return number(interval.value, 3)
    return f"{number(interval.value, 3)} [{number(interval.low, 3)}, {number(interval.high, 3)}]"
