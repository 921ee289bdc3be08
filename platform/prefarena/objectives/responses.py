"""What objectives on single responses share, each labelled as desirable or not: their metrics.

The objectives themselves are in `prefarena.methods`. Each takes the policy's and the reference's sequence log-probs in
nats and `labels` = P(desirable), all [B], and a baseline [] of the whole optimizer step. A response with a soft label
counts towards each metric in proportion to its label:

    logps/desirable, logps/undesirable          log pi(y|x), nats per sequence
    logratio/desirable, logratio/undesirable    log pi(y|x) - log pi_ref(y|x)
    response/accuracy                           share of responses whose h has the sign of their label
    response/baseline                           what the log-ratio is held against: KTO's z0, BCO's delta
    response/saturated                          share of responses with |h| > 4
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefarena.objectives.output import Mean, ObjectiveOutput, mean_of
from prefarena.objectives.preference import SATURATED, agreement


def response_output(
    losses: Tensor, h: Tensor, logps: Tensor, ratio: Tensor, labels: Tensor, baseline: Tensor
) -> ObjectiveOutput:
    """Reduce losses of responses [B] and the metrics that all methods share."""
    with torch.no_grad():
        metrics = {
            "response/accuracy": mean_of(agreement(h, labels)),
            "response/baseline": mean_of(baseline.expand(len(labels))),
            "response/saturated": mean_of((h.abs() > SATURATED).to(h.dtype)),
        }
        for name, share in (("desirable", labels), ("undesirable", 1 - labels)):
            metrics[f"logps/{name}"] = Mean((share * logps).sum(), share.sum())
            metrics[f"logratio/{name}"] = Mean((share * ratio).sum(), share.sum())
    return ObjectiveOutput(mean_of(losses), metrics)
