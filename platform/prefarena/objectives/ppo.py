"""Proximal Policy Optimization (arXiv 1707.06347) on token-level rollouts, as pure functions.

All tensors are [B, T] over positions that score a token; `mask` [B, T] bool is true at response tokens and everything
outside it is ignored. Losses are sums: the step divides by the token count of the whole optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefarena.objectives.kl import LOG_RATIO_LIMIT, k2, k3, k3_straight_through
from prefarena.objectives.output import ObjectiveOutput, inside, mean_of
from prefarena.objectives.rollouts import Minibatch


def penalised_rewards(scores: Tensor, token_kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards [B, T]: -kl_coef * token_kl, and the response's score [B] added at its last token."""
    position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = (position * mask).amax(1)
    rewards = -kl_coef * inside(token_kl, mask)
    return rewards.scatter_add(1, last[:, None], inside(scores, mask.any(1))[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] (GAE, arXiv 1506.02438), zero outside the mask.

    Positions outside the mask are skipped over: the next value and advantage are carried across them.
    """
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0])
    next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * gae_lambda * next_advantage
        advantages[:, t] = inside(advantage, mask[:, t])
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    return advantages, inside(advantages + values, mask)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance [] over the mask, in float64."""
    selected = values[mask].double()
    return selected.mean(), selected.var(correction=0)


def whiten(values: Tensor, mask: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(values - mean) / std inside the mask, zero outside; moments come from the whole rollout batch."""
    whitened = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    return inside(whitened, mask).to(values.dtype)


def overlong_penalties(lengths: Tensor, limit: int, tokens: int) -> Tensor:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, equation 13, with the sign turned), [B].

    lengths: [B], in tokens. 0 up to `tokens` before the limit, 1 at the limit, and linear between.
    """
    return ((lengths - (limit - tokens)) / tokens).clamp(0, 1)


def importance_weights(logps: Tensor, generator_logps: Tensor, cap: float | None) -> Tensor:
    """Truncated weights min(pi_trainer / pi_generator, cap) per token (Ionides 2008); ones without a cap."""
    if cap is None:
        return torch.ones_like(logps)
    return (logps - generator_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (N sum w^2) [] of N importance weights given as logarithms [N]: 1 where all are equal."""
    weights = torch.softmax(log_weights.double(), 0)
    return 1 / (len(weights) * (weights**2).sum())


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    weights: Tensor | None = None,
) -> ObjectiveOutput:
    """-sum min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) over the mask, rho = exp(logps - old_logps).

    clip_high: defaults to `clip`. The log-ratio is clamped to +-20 nats before exp. `weights` [B, T] multiply each
    token's term, without gradient.
    """
    logps = inside(logps, mask)
    log_ratio = (logps - old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantages
    losses = -torch.minimum(free, clipped)
    if weights is not None:
        losses = losses * weights.detach()
    with torch.no_grad():
        metrics = {
            "policy/loss": mean_of(losses, mask),
            "policy/clip_fraction": mean_of((clipped < free).to(losses.dtype), mask),
            "policy/update_kl": mean_of(k3(old_logps, logps), mask),
        }
    return ObjectiveOutput(mean_of(losses, mask), metrics)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float) -> ObjectiveOutput:
    """sum max((v - R)^2, (v_clipped - R)^2) / 2 over the mask, v_clipped within `clip` of the old value."""
    values = inside(values, mask)
    # exactly `values` where nothing is clipped, so that rounding never counts as clipping
    near = values.clamp(old_values - clip, old_values + clip)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    losses = 0.5 * torch.maximum(free, clipped)
    with torch.no_grad():
        metrics = {
            "value/loss": mean_of(losses, mask),
            "value/clip_fraction": mean_of((clipped > free).to(losses.dtype), mask),
        }
    return ObjectiveOutput(mean_of(losses, mask), metrics)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[R - V] / Var[R] [] over the mask; 0 where the returns do not vary."""
    _, residual = masked_moments(returns - values, mask)
    _, total = masked_moments(returns, mask)
    return torch.where(total > 0, 1 - residual / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def kl_loss(
    logps: Tensor, reference_logps: Tensor, mask: Tensor, *, estimator: str, weights: Tensor | None = None
) -> ObjectiveOutput:
    """Sum over the mask of a per-token KL estimate (`k2`, `k3` or `k3_straight_through`), with `weights` [B, T]."""
    logps = inside(logps, mask)
    estimate = {"k2": k2, "k3": k3, "k3_straight_through": k3_straight_through}[estimator](logps, reference_logps)
    return ObjectiveOutput(mean_of(estimate if weights is None else estimate * weights.detach(), mask), {})


def with_kl_loss(
    loss: ObjectiveOutput, logps: Tensor, batch: Minibatch, kl_coef: float, *, estimator: str
) -> ObjectiveOutput:
    """`loss` and `kl_coef` times `kl_loss`, if the penalty is in the loss: then a minibatch has reference_logps."""
    if batch.reference_logps is None:
        return loss
    penalty = kl_loss(logps, batch.reference_logps, batch.mask, estimator=estimator, weights=batch.weights)
    return loss.plus(penalty, kl_coef)


def sequence_mean_weights(mask: Tensor) -> Tensor:
    """Weights [B, T]: 1 / the row's length inside the mask, so that a sum over tokens is one of token means."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1)
