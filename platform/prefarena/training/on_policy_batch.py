"""Data of one update: the method's advantages over a whole rollout batch, and the batch's metrics."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prefarena.config import OnPolicyTraining
from prefarena.modeling.logprobs import Sequences
from prefarena.modeling.transfer import rows_on
from prefarena.objectives.advantages import explained_variance, masked_moments
from prefarena.objectives.kl import k1, k3
from prefarena.objectives.ppo import effective_sample_size, importance_weights, overlong_penalties
from prefarena.objectives.rollouts import Judged, Minibatch
from prefarena.training.experience import Experience


@dataclass(frozen=True, kw_only=True)
class Batch(Minibatch):
    """Rollouts, and the tensors [B, T-1] that the update's losses read, zero outside the response.

    weights: the truncated importance weight of each token, times what the method weighs it with.
    """

    sequences: Sequences

    def select(self, rows: Tensor) -> Batch:
        """Return some of the rollouts, without the padding that none of them needs. rows: on the host."""
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
    """Clip and penalise the scores, and turn them into the method's advantages.

    Rollouts that the judge is silent about are in no baseline and no loss. response_limit: most tokens of a response,
    for the penalty of long ones.
    """
    mask, scored = experience.sequences.response_mask, None
    if experience.silent is not None:
        scored = ~experience.silent_rows
        mask = mask & scored[:, None]
    rollouts = Judged(
        scores=_penalised(experience, settings, response_limit),
        mask=mask,
        old_logps=experience.old_logps,
        reference_logps=experience.reference_logps,
        values=experience.values,
        scored=scored,
    )
    found = settings.advantages(rollouts, kl_coef)
    weights = importance_weights(experience.old_logps, experience.generator_logps, settings.importance_cap) * mask
    batch = Batch(
        sequences=experience.sequences,
        mask=mask,
        old_logps=experience.old_logps,
        advantages=found.advantages,
        weights=weights if found.weights is None else weights * found.weights,
        reference_logps=found.reference_logps,
        values=None if found.returns is None else experience.values,
        returns=found.returns,
    )
    return Targets(batch, found.rewards)


def _penalised(experience: Experience, settings: OnPolicyTraining, response_limit: int | None) -> Tensor:
    """The scores [B], clipped, less the penalties of responses that were cut off or are long."""
    scores = experience.scores.clamp(-settings.reward_clip, settings.reward_clip)
    scores = scores - settings.missing_eos_penalty * (1 - experience.finished)
    if settings.overlong_penalty > 0:
        if response_limit is None:
            raise TypeError("the penalty of long responses needs their limit")
        lengths = experience.sequences.response_mask.sum(1)
        long = overlong_penalties(lengths, response_limit, settings.overlong_tokens)
        scores = scores - settings.overlong_penalty * long
    return scores


@torch.no_grad()
def experience_metrics(
    experience: Experience, targets: Targets, importance_cap: float | None, kl: str = "kl"
) -> dict[str, float]:
    """Metrics of one rollout batch: KLs are sums over tokens, in nats per sequence; entropy is in nats per token.

    kl: the name under which KLs are logged, since KLs to a reference that moves are different quantities.
    """
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
        row[f"{kl}/{name}"] = per_sequence.mean()
        row[f"{kl}/{name}_stderr"] = per_sequence.std() / len(per_sequence) ** 0.5
    if experience.monitor_scores is not None:
        unknown = experience.monitor_scores.isnan()
        if not unknown.all():
            row["reward/judge"] = experience.monitor_scores[~unknown].mean()
        if unknown.any():
            row["reward/judge_num_silent"] = unknown.sum()
    if targets.batch.returns is not None and targets.batch.values is not None:
        returns = targets.batch.returns
        row["value/explained_variance"] = explained_variance(targets.batch.values, returns, targets.batch.mask)
    if not scored.all():
        row["reward/num_silent"] = (~scored).sum()
    return {name: float(value) for name, value in row.items()}


def _share_above(values: Tensor, cap: float | None) -> Tensor:
    return torch.zeros(()) if cap is None else (values > cap).double().mean()
