"""How good a reward model's probabilities are on held-out pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_BINS = 10


def calibration(margins: np.ndarray, num_bins: int = NUM_BINS) -> dict[str, Any]:
    """Accuracy, log loss, Brier score, expected calibration error and its table, of sigmoid(margins) as P(chosen wins).

    margins: raw score of the chosen response minus that of the rejected, [N]. The chosen one always wins, so a table
    over P(chosen wins) would observe nothing but wins. Every pair is therefore taken in the order that the model
    prefers: the prediction is its confidence sigmoid(|margin|) in [1/2, 1], the outcome whether it was right (a tie
    counts 1/2). Bins hold equally many pairs in the order of confidence (Naeini et al. 2015's equal-mass form of
    Guo et al. 2017, arXiv:1706.04599); the error is sum over bins of count / N x |mean predicted - observed|. It is
    biased upwards by about the bins' standard errors, which the table gives. Log loss in nats (ln 2 is chance); Brier
    score: mean of (1 - P(chosen wins))^2 (1/4 is chance).
    """
    margins = np.asarray(margins, dtype=np.float64)
    correct = np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
    accuracy = float(correct.mean())
    confidence = 0.5 * (1 + np.tanh(np.abs(margins) / 2))
    table = _reliability(confidence, correct, num_bins)
    gaps = [row["num_pairs"] * abs(row["predicted"] - row["observed"]) for row in table]
    return {
        "accuracy": accuracy,
        "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / len(correct))),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "brier": float(np.mean((0.5 * (1 - np.tanh(margins / 2))) ** 2)),
        "ece": float(sum(gaps) / len(correct)),
        "num_pairs": len(correct),
        "reliability": table,
    }


def _reliability(confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> list[dict[str, float]]:
    """One row per bin: mean predicted, observed with its binomial standard error, count."""
    rows = []
    for bin_rows in np.array_split(np.argsort(confidence, kind="stable"), min(num_bins, len(confidence))):
        observed = float(correct[bin_rows].mean())
        rows.append(
            {
                "predicted": float(confidence[bin_rows].mean()),
                "observed": observed,
                "observed_stderr": float(np.sqrt(observed * (1 - observed) / len(bin_rows))),
                "num_pairs": len(bin_rows),
            }
        )
    return rows
