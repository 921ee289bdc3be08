"""Bradley-Terry reward model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefarena.objectives.output import ObjectiveOutput, mean_of


def bradley_terry(
    chosen_scores: Tensor, rejected_scores: Tensor, labels: Tensor, *, centre_weight: float = 0.0
) -> ObjectiveOutput:
    """-E[p log sigma(d) + (1 - p) log sigma(-d)], d = r(x, y_w) - r(x, y_l); scores and labels [B].

    `centre_weight` adds (r_w + r_l)^2 (arXiv 2312.09244), which only shifts the scores towards zero.
    """
    difference = chosen_scores - rejected_scores
    losses = -(labels * F.logsigmoid(difference) + (1 - labels) * F.logsigmoid(-difference))
    losses = losses + centre_weight * (chosen_scores + rejected_scores) ** 2
    with torch.no_grad():
        agreement = (torch.sign(difference) * torch.sign(labels - 0.5) + 1) / 2
        metrics = {
            "reward_model/accuracy": mean_of(agreement),
            "reward_model/margin": mean_of(difference),
            "reward_model/chosen": mean_of(chosen_scores),
            "reward_model/rejected": mean_of(rejected_scores),
        }
    return ObjectiveOutput(mean_of(losses), metrics)
