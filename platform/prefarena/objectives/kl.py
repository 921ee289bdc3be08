"""KL divergence to the reference: the per-sample estimators k1 and k3, and the controller of the penalty's weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Log-ratios are clamped to this range (nats) before exp.
LOG_RATIO_LIMIT = 20.0


def k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """log pi - log pi_ref per token, any shape, nats: unbiased for the KL under samples of pi; may be negative."""
    return logps - reference_logps


def k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """k1^2 / 2 per token, nats: biased, but its gradient under samples of pi is that of the KL."""
    return 0.5 * (logps - reference_logps) ** 2


def k3_straight_through(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """k3's value with k2's gradient."""
    surrogate = k2(logps, reference_logps)
    return k3(logps, reference_logps).detach() + surrogate - surrogate.detach()


def k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1 per token, any shape, nats: unbiased too, never negative (http://joschu.net/blog/kl-approx.html).

    Summed over a response's tokens it estimates the sequence's KL, as k1 does.
    """
    log_ratio = (reference_logps - logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio  # in float32, exp(x) - 1 - x is noise where x is small


@dataclass(frozen=True)
class KLController:
    """The weight of the KL penalty; fixed without a target.

    With a target (nats per sequence) it adapts in proportion to the relative error, clipped to 20 % and spread over
    `horizon` rollouts (arXiv 1909.08593, section 2.2).
    """

    coef: float
    target: float | None
    horizon: int

    def update(self, observed_kl: float, num_rollouts: int) -> KLController:
        """The controller after `num_rollouts` rollouts with mean k1 `observed_kl`."""
        if self.target is None:
            return self
        error = min(max(observed_kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * num_rollouts / self.horizon))
