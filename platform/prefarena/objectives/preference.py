"""Objectives on preference pairs: log-probs in, loss and metrics out.

Every function takes the policy's and (where it needs them) the reference's sequence log-probs in nats, and
`labels` = P(chosen > rejected), all [B] float32. The loss is the mean over pairs. One metric name means the same
thing for every method:

    logps/chosen, logps/rejected          log pi(y|x), nats a sequence
    logratio/chosen, logratio/rejected    log pi(y|x) - log pi_ref(y|x)
    preference/accuracy                   share of pairs whose log-ratio to the reference orders them as labelled
    preference/margin                     h, the quantity that the method's loss is a function of
    preference/saturated                  share of pairs with |h| > 4 (for MPO: no gradient is left there)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefarena.objectives.output import Mean, ObjectiveOutput, mean_of

SATURATED = 4.0  # at |h| = 4 the gradient factor sigma(h)(1 - sigma(h)) is down to 7 % of its value at h = 0


@dataclass(frozen=True)
class PairLogps:
    """Sequence log-probs of both responses: `chosen`, `rejected` [B], nats."""

    chosen: Tensor
    rejected: Tensor

    def minus(self, other: PairLogps) -> PairLogps:
        return PairLogps(self.chosen - other.chosen, self.rejected - other.rejected)

    def per_token(self, num_tokens: PairLogps) -> PairLogps:
        return PairLogps(self.chosen / num_tokens.chosen, self.rejected / num_tokens.rejected)

    @property
    def margin(self) -> Tensor:
        """chosen - rejected, [B]."""
        return self.chosen - self.rejected


def mpo(
    policy: PairLogps,
    reference: PairLogps | None,
    labels: Tensor,
    num_tokens: PairLogps,
    *,
    beta: float,
    length_normalise: bool = False,
    reference_free: bool = False,
) -> ObjectiveOutput:
    """Maximum Preference Optimization (arXiv 2312.16430): -E[p sigma(h) + (1 - p) sigma(-h)].

    The importance-sampled expected reward of the preference policy pi^p = sigma(h), where
    h = beta (log pi(y_w) - log pi(y_l)), the paper's final form; with a reference, log pi is replaced by
    log pi - log pi_ref, and every pair starts at h = 0. `reference_free` takes the first form although a reference
    is given, which then serves the metrics alone. The gradient is -pi^p grad log pi^p: bounded, and fading on pairs
    that are settled either way. The regularisers (eta, gamma) are likelihood terms, see likelihood.py.
    """
    scores = policy if reference is None or reference_free else policy.minus(reference)
    h = beta * _scaled(scores, num_tokens, length_normalise).margin
    losses = -(labels * torch.sigmoid(h) + (1 - labels) * torch.sigmoid(-h))
    return _output(losses, h, policy, reference, labels)


def dpo(
    policy: PairLogps,
    reference: PairLogps,
    labels: Tensor,
    num_tokens: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalise: bool = False,
) -> ObjectiveOutput:
    """Direct Preference Optimization (arXiv 2305.18290, equation 7), with soft labels; smoothing e gives cDPO.

    -E[p log sigma(h) + (1 - p) log sigma(-h)], h = beta (rho_w - rho_l), rho = log pi - log pi_ref, and p moved
    towards its opposite by `label_smoothing`.
    """
    h = beta * _scaled(policy.minus(reference), num_tokens, length_normalise).margin
    p = labels * (1 - label_smoothing) + (1 - labels) * label_smoothing
    losses = -(p * F.logsigmoid(h) + (1 - p) * F.logsigmoid(-h))
    return _output(losses, h, policy, reference, labels)


def ipo(
    policy: PairLogps,
    reference: PairLogps,
    labels: Tensor,
    num_tokens: PairLogps,
    *,
    tau: float,
    length_normalise: bool = False,
) -> ObjectiveOutput:
    """Identity Preference Optimization (arXiv 2310.12036, equation 17): E[(h - (2p - 1) / (2 tau))^2].

    h = rho_w - rho_l, summed over tokens as in the paper; `length_normalise` averages over tokens, as TRL does.
    With a soft label p the two orderings' losses average to this form plus a constant.
    """
    h = _scaled(policy.minus(reference), num_tokens, length_normalise).margin
    losses = (h - (2 * labels - 1) / (2 * tau)) ** 2
    return _output(losses, h, policy, reference, labels)


def sft(policy: PairLogps, reference: PairLogps | None, labels: Tensor, num_tokens: PairLogps) -> ObjectiveOutput:
    """Supervised fine-tuning on the chosen responses: -E[log pi(y_w|x)], a mean over sequences."""
    return _output(-policy.chosen, policy.margin, policy, reference, labels)


def _scaled(scores: PairLogps, num_tokens: PairLogps, length_normalise: bool) -> PairLogps:
    return scores.per_token(num_tokens) if length_normalise else scores


def _output(
    losses: Tensor, h: Tensor, policy: PairLogps, reference: PairLogps | None, labels: Tensor
) -> ObjectiveOutput:
    """Reduce per-pair losses [B] and the metrics that all methods share."""
    metrics: dict[str, Mean] = {}
    with torch.no_grad():
        metrics["logps/chosen"] = mean_of(policy.chosen)
        metrics["logps/rejected"] = mean_of(policy.rejected)
        metrics["preference/margin"] = mean_of(h)
        metrics["preference/saturated"] = mean_of((h.abs() > SATURATED).to(h.dtype))
        if reference is not None:
            ratio = policy.minus(reference)
            metrics["logratio/chosen"] = mean_of(ratio.chosen)
            metrics["logratio/rejected"] = mean_of(ratio.rejected)
            metrics["preference/accuracy"] = mean_of(_agreement(ratio.margin, labels))
    return ObjectiveOutput(mean_of(losses), metrics)


def _agreement(margin: Tensor, labels: Tensor) -> Tensor:
    """1 where `margin` [B] orders the pair as its label does, 1/2 on ties, 0 otherwise."""
    return (torch.sign(margin) * torch.sign(labels - 0.5) + 1) / 2
