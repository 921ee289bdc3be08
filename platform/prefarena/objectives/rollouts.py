"""Inputs and outputs of an on-policy method: tensors of a whole rollout batch, and of the part in one pass.

Per-token tensors are [B, T] over positions that score a token, zero outside the responses.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Judged:
    """The rollout batch of all workers, from which advantages are computed.

    scores: [B], clipped and penalised. mask: [B, T] bool, the tokens of responses that have a score. old_logps,
    reference_logps: nats. values: of the critic that starts the iteration, where the method has one. scored: [B] bool,
    false where the judge was silent and the score means nothing; None means that all have one. The rows of a group are
    consecutive.
    """

    scores: Tensor
    mask: Tensor
    old_logps: Tensor
    reference_logps: Tensor
    values: Tensor | None = None
    scored: Tensor | None = None


@dataclass(frozen=True)
class Advantages:
    """The advantages that a method computes for a rollout batch, and what else its losses need.

    advantages: [B, T]. rewards: [B], the rewards that they compare, penalties included. weights: [B, T], the factor of
    each token's loss in addition to its importance weight; None means 1. reference_logps: [B, T], where the loss reads
    them. returns: [B, T], what a critic is to predict.
    """

    advantages: Tensor
    rewards: Tensor
    weights: Tensor | None = None
    reference_logps: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """The data that losses read besides the log-probs or values of the model in training.

    weights: the factor of each token's loss, without gradient. reference_logps: where the loss reads them. values,
    returns: where there is a critic.
    """

    mask: Tensor
    old_logps: Tensor
    advantages: Tensor
    weights: Tensor
    reference_logps: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
