"""What an update learns from: each method's advantages over a whole rollout batch, and the batch's metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefarena.config import GRPOTraining, OnPolicyTraining, PPOTraining, RLOOTraining
from prefarena.modeling.logprobs import Sequences
from prefarena.modeling.transfer import rows_on
from prefarena.objectives.advantages import (
    explained_variance,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    masked_moments,
    penalised_rewards,
    whiten,
)
from prefarena.objectives.kl import k1, k3
from prefarena.objectives.ppo import (
    effective_sample_size,
    importance_weights,
    overlong_penalties,
    sequence_mean_weights,
)
from prefarena.training.experience import Experience


@dataclass(frozen=True)
class Batch:
    """Targets of the update. Tensors are [B, T-1], zero outside the response.

    weights: of each token's loss, without gradient: the truncated importance weight, and 1 / length where the loss is
    a mean over sequences. reference_logps: where the KL penalty is part of the loss. values and returns: with a critic.
    """

    sequences: Sequences
    mask: Tensor
    old_logps: Tensor
    advantages: Tensor
    weights: Tensor
    reference_logps: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def select(self, rows: Tensor) -> Batch:
        """Some rollouts, padding that none of them needs cut off. rows: on the host."""
        sequences = self.sequences.select(rows.tolist())
        width, there = sequences.width, rows_on(self.mask.device, rows)
        named = {field.name: getattr(self, field.name) for field in fields(Batch) if field.name != "sequences"}
        cut: dict[str, Any] = {name: None if whole is None else whole[there, :width] for name, whole in named.items()}
        return replace(self, sequences=sequences, **cut)

    def __len__(self) -> int:
        return len(self.mask)


@dataclass(frozen=True)
class Targets:
    """The batch to learn from, and the rewards [B] that its advantages compare, penalties included.

    The mask of a rollout without a score is empty: nothing is learnt from it, and its reward means nothing.
    """

    batch: Batch
    rewards: Tensor


def learnable(
    experience: Experience, settings: OnPolicyTraining, kl_coef: float, response_limit: int | None = None
) -> Targets:
    """Clip and penalise the scores, and turn them into advantages as the method does.

    PPO: the KL penalty per token, GAE, advantages whitened over the whole batch. GRPO: the score against its group's
    mean. RLOO: the score less the sequence's KL penalty, against the mean of the others in its group. Rollouts that the
    judge is silent about are in no baseline and no loss. response_limit: most tokens of a response, for the penalty of
    long ones.
    """
    mask, silent = experience.sequences.response_mask, experience.silent_rows
    if experience.silent is not None:
        mask = mask & ~silent[:, None]
    scores = experience.scores.clamp(-settings.reward_clip, settings.reward_clip)
    scores = scores - settings.missing_eos_penalty * (1 - experience.finished)
    if settings.overlong_penalty > 0:
        if response_limit is None:
            raise TypeError("the penalty of long responses needs their limit")
        lengths = experience.sequences.response_mask.sum(1)
        long = overlong_penalties(lengths, response_limit, settings.overlong_tokens)
        scores = scores - settings.overlong_penalty * long
    token_kl = k1(experience.old_logps, experience.reference_logps)
    batch = Batch(
        sequences=experience.sequences,
        mask=mask,
        old_logps=experience.old_logps,
        advantages=torch.zeros_like(experience.old_logps),
        weights=importance_weights(experience.old_logps, experience.generator_logps, settings.importance_cap) * mask,
    )
    match settings:
        case PPOTraining():
            return _with_critic(batch, experience, settings, penalised_rewards(scores, token_kl, mask, kl_coef))
        case GRPOTraining():
            in_loss = settings.kl_in == "loss"
            rewards = scores if in_loss else scores - kl_coef * (token_kl * mask).sum(1)
            if settings.loss_mean == "sequences":
                batch = replace(batch, weights=batch.weights * sequence_mean_weights(mask))
            if in_loss:
                batch = replace(batch, reference_logps=experience.reference_logps)
            normalised = partial(group_advantages, normalise_std=settings.normalise_std)
            advantages = _among_scored(normalised, rewards, experience, settings.group_size)
        case RLOOTraining():
            rewards = scores - kl_coef * (token_kl * mask).sum(1)
            advantages = _among_scored(leave_one_out_advantages, rewards, experience, settings.group_size)
        case _:
            raise TypeError(f"no advantages for {type(settings).__name__}")
    return Targets(replace(batch, advantages=advantages[:, None] * mask), rewards)


def _among_scored(
    advantages: Callable[[Tensor, int], Tensor], rewards: Tensor, experience: Experience, group_size: int
) -> Tensor:
    """`advantages` of rewards [B] in groups of `group_size` rows, each among those of its group that have a score.

    Rows without one, and the only row with one in its group, have the advantage 0.
    """
    silent = experience.silent_rows
    if experience.silent is None or not silent.any():
        return advantages(rewards, group_size)
    found = torch.zeros_like(rewards)
    for rows in torch.arange(len(rewards), device=rewards.device).split(group_size):
        scored = rows[~silent[rows]]
        if len(scored) > 1:
            found[scored] = advantages(rewards[scored], len(scored))
    return found


def _with_critic(batch: Batch, experience: Experience, settings: PPOTraining, rewards: Tensor) -> Targets:
    if experience.values is None:
        raise TypeError("PPO needs the critic's values")
    advantages, returns = generalised_advantages(
        rewards, experience.values, batch.mask, discount=settings.discount, gae_lambda=settings.gae_lambda
    )
    advantages = whiten(advantages, batch.mask, *masked_moments(advantages, batch.mask))
    return Targets(replace(batch, advantages=advantages, values=experience.values, returns=returns), rewards.sum(1))


@torch.no_grad()
def experience_metrics(experience: Experience, targets: Targets, importance_cap: float | None) -> dict[str, float]:
    """Of one rollout batch: KLs are sums over tokens, in nats per sequence; entropy is nats per token."""
    mask, scored = experience.sequences.response_mask, ~experience.silent_rows
    log_weights = experience.old_logps - experience.generator_logps  # zero outside the response
    gap = log_weights.abs()[mask]
    row = {
        "reward/mean": experience.scores[scored].mean(),
        "reward/penalised": targets.rewards[scored].mean(),
        "entropy": masked_moments(experience.entropy, mask)[0],
        "logp_gap/mean": gap.mean(),
        "logp_gap/max": gap.max(),
        "response_length": mask.sum(1).double().mean(),
        "truncation_rate": 1 - experience.finished.mean(),
        "staleness": experience.staleness.mean(),
        "importance/ess": effective_sample_size(log_weights.sum(1)),
        "importance/capped": _share_above(log_weights.exp()[mask], importance_cap),
    }
    for name, estimator in (("k1", k1), ("k3", k3)):
        per_sequence = (estimator(experience.old_logps, experience.reference_logps) * mask).sum(1).double()
        row[f"kl/{name}"] = per_sequence.mean()
        row[f"kl/{name}_stderr"] = per_sequence.std() / len(per_sequence) ** 0.5
    if experience.monitor_scores is not None:
        row["reward/judge"] = experience.monitor_scores.mean()
    if targets.batch.returns is not None and targets.batch.values is not None:
        returns = targets.batch.returns
        row["value/explained_variance"] = explained_variance(targets.batch.values, returns, targets.batch.mask)
    if not scored.all():
        row["reward/num_silent"] = (~scored).sum()
    return {name: float(value) for name, value in row.items()}


def _share_above(values: Tensor, cap: float | None) -> Tensor:
    return torch.zeros(()) if cap is None else (values > cap).double().mean()
