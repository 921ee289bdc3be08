"""Win rates and position bias from a judge that was asked about every pair in both orders. Pure numpy."""

from __future__ import annotations

import numpy as np

from prefarena.evaluation.statistics import clustered, mean_and_stderr


def pair_values(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The value of each pair [N], from the own response's shares where it is shown first and where it is second.

    Shares are 1 (preferred), 1/2 (tie), 0 and nan (silent). A pair counts 1 where both orders prefer the own response,
    0 where both prefer the other, and 1/2 where they disagree or one is a tie; nan where one is silent.
    """
    values = np.where((first == 1) & (second == 1), 1.0, np.where((first == 0) & (second == 0), 0.0, 0.5))
    return np.where(np.isnan(first) | np.isnan(second), np.nan, values)


def pairwise_metrics(
    first: np.ndarray, second: np.ndarray, asked: np.ndarray, clusters: np.ndarray
) -> dict[str, float]:
    """Every estimate from N pairs, as `judges.pairwise.Games` has them; clusters [N] name their prompts.

    win_rate: the mean of `pair_values`, prompts weighing alike, with its standard error over prompts. tie_rate: share
    of pairs that count 1/2. Of the pairs that were asked about: position_bias, the share in which the response shown
    first was preferred in both orders less the share in which the one shown second was, in [-1, 1], 0 for a judge that
    does not look at the place; order_agreement, the share in which both orders say the same. num_pairs: pairs with a
    verdict in both orders; num_silent_pairs: the others, which are in no mean; num_identical: pairs of equal texts,
    which count as ties. A measure that has no pair left has no key.
    """
    values = pair_values(first, second)
    known = ~np.isnan(values)
    row: dict[str, float] = {
        "num_pairs": int(known.sum()),
        "num_silent_pairs": int((~known).sum()),
        "num_identical": int((~asked).sum()),
    }
    if known.any():
        shares = [values[known & (clusters == prompt)].mean() for prompt in np.unique(clusters[known])]
        row |= _named("win_rate", mean_and_stderr(shares))
        row |= _named("tie_rate", clustered(values[known] == 0.5, clusters[known]))
    told = known & asked
    if told.any():
        by_place = np.where((first == 1) & (second == 0), 1.0, np.where((first == 0) & (second == 1), -1.0, 0.0))
        row |= _named("position_bias", clustered(by_place[told], clusters[told]))
        row |= _named("order_agreement", clustered((first == second)[told], clusters[told]))
    return row


def _named(name: str, estimate: tuple[float, float]) -> dict[str, float]:
    """A standard error that cannot be estimated is left out."""
    mean, stderr = estimate
    return {name: mean} if np.isnan(stderr) else {name: mean, f"{name}_stderr": stderr}
