"""Held-out preference accuracy of a policy: one definition, used for every method."""

from __future__ import annotations

import numpy as np

from prefarena.evaluation.statistics import binomial


def preference_accuracy(
    chosen_logps: np.ndarray, rejected_logps: np.ndarray, ref_chosen_logps: np.ndarray, ref_rejected_logps: np.ndarray
) -> dict[str, float]:
    """Share of held-out pairs [N] that a policy orders as the data does; a tie counts one half.

    `preference_accuracy` orders by the log-ratio log pi(y|x) - log pi_ref(y|x), for every method alike, whatever its
    training used: it measures what alignment changed, and is exactly 1/2 for the reference. `likelihood_accuracy`
    orders by log pi(y|x). Both with binomial standard errors. Arguments in nats per sequence.
    """
    margin = chosen_logps - rejected_logps
    ratio_margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    ratio, likelihood = binomial(_ordered(ratio_margin)), binomial(_ordered(margin))
    return {
        "preference_accuracy": ratio.mean,
        "preference_accuracy_stderr": ratio.stderr,
        "likelihood_accuracy": likelihood.mean,
        "likelihood_accuracy_stderr": likelihood.stderr,
    }


#: Margins (nats) below this are ties: reference log-probs are stored in float32, and differ by as much from a new pass.
TIE = 1e-5


def _ordered(margin: np.ndarray) -> np.ndarray:
    return (np.sign(np.where(np.abs(margin) < TIE, 0.0, margin)) + 1) / 2
