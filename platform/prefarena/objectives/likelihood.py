"""Likelihood terms: supervised fine-tuning, and the off-policy KL regularisers of any off-policy method.

KL(pi_ref || pi) = const - E_{y ~ pi_ref}[log pi(y|x)], so the mean negative log-likelihood of demonstrations is a
forward KL up to a constant (arXiv 2312.16430): no reference model is run.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefarena.objectives.output import Mean, ObjectiveOutput, mean_of


def negative_log_likelihood(
    logps: Tensor, num_tokens: Tensor, *, mean: Literal["sequences", "tokens"] = "sequences"
) -> ObjectiveOutput:
    """-E[log pi(y|x)] over sequences [B] (the formula), or over their tokens."""
    total = -logps.sum()
    count = logps.new_tensor(logps.numel()) if mean == "sequences" else num_tokens.sum().to(logps.dtype)
    with torch.no_grad():
        metrics = {
            "demonstration/nll": mean_of(-logps),
            "demonstration/nll_token": Mean(-logps.sum(), num_tokens.sum()),
        }
    return ObjectiveOutput(Mean(total, count), metrics)
