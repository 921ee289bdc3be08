"""What an update learns from: rewards, advantages and returns of a whole rollout batch, and its metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefarena.config import PPOTraining
from prefarena.modeling.logprobs import Sequences
from prefarena.objectives.kl import k1, k3
from prefarena.objectives.ppo import (
    effective_sample_size,
    explained_variance,
    generalised_advantages,
    masked_moments,
    mean_per_sequence,
    penalised_rewards,
    whiten,
)
from prefarena.training.rollouts import Experience, select


@dataclass(frozen=True)
class Batch:
    """Targets of the update, [B, T-1], zero outside the response; rewards include the KL penalty."""

    sequences: Sequences
    generator_logps: Tensor
    old_logps: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def mask(self) -> Tensor:
        return self.sequences.response_mask

    def select(self, rows: Tensor) -> Batch:
        """Some rollouts, padding that none of them needs cut off."""
        rows = rows.to(self.values.device)
        sequences = select(self.sequences, rows)
        width = sequences.input_ids.shape[1] - 1
        tensors = {name: getattr(self, name)[rows, :width] for name in self.__dataclass_fields__ if name != "sequences"}
        return replace(self, sequences=sequences, **tensors)


def learnable(experience: Experience, settings: PPOTraining, kl_coef: float) -> Batch:
    """Clip and penalise the scores, add the KL penalty per token, and whiten the advantages over the whole batch."""
    mask = experience.mask
    scores = experience.scores.clamp(-settings.reward_clip, settings.reward_clip)
    scores = scores - settings.missing_eos_penalty * (1 - experience.finished)
    rewards = penalised_rewards(scores, k1(experience.old_logps, experience.reference_logps), mask, kl_coef)
    advantages, returns = generalised_advantages(
        rewards, experience.values, mask, discount=settings.discount, gae_lambda=settings.gae_lambda
    )
    return Batch(
        sequences=experience.sequences,
        generator_logps=experience.generator_logps,
        old_logps=experience.old_logps,
        values=experience.values,
        rewards=rewards,
        advantages=whiten(advantages, mask, *masked_moments(advantages, mask)),
        returns=returns,
    )


@torch.no_grad()
def experience_metrics(experience: Experience, batch: Batch) -> dict[str, float]:
    """Of one rollout batch: KLs are sums over tokens, in nats a sequence; entropy is nats a token."""
    mask = experience.mask
    gap = (experience.old_logps - experience.generator_logps).abs()[mask]
    log_weights = (experience.old_logps - experience.generator_logps).sum(1)
    values = {
        "reward/mean": experience.scores.mean(),
        "reward/penalised": batch.rewards.sum(1).mean(),
        "kl/k1": mean_per_sequence(k1(experience.old_logps, experience.reference_logps), mask).value,
        "kl/k3": mean_per_sequence(k3(experience.old_logps, experience.reference_logps), mask).value,
        "entropy": masked_moments(experience.entropy, mask)[0],
        "value/explained_variance": explained_variance(experience.values, batch.returns, mask),
        "logp_gap/mean": gap.mean(),
        "logp_gap/max": gap.max(),
        "response_length": mask.sum(1).double().mean(),
        "truncation_rate": 1 - experience.finished.mean(),
        "importance/ess": effective_sample_size(log_weights),
    }
    return {name: float(value) for name, value in values.items()}
