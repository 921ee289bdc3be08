"""What objectives on preference pairs share: their inputs, and the metrics besides the loss.

The objectives themselves are in `prefarena.methods`. Each takes the policy's and the reference's sequence log-probs in
nats, and `labels` = P(chosen > rejected), all [B] float32. The loss is the mean over pairs. One metric name means the
same thing for every method:

    logps/chosen, logps/rejected          log pi(y|x), nats per sequence
    logratio/chosen, logratio/rejected    log pi(y|x) - log pi_ref(y|x)
    preference/accuracy                   share of pairs whose log-ratio to the reference orders them as labelled
    preference/margin                     h, the quantity that the method's loss is a function of
    preference/saturated                  share of pairs with |h| > 4 (for MPO: no gradient is left there)
    preference/weight                     what each pair's loss is multiplied by, where `pair_weight` is set
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    def double(self) -> PairLogps:
        """These log-probs in float64."""
        return PairLogps(self.chosen.double(), self.rejected.double())

    @property
    def swapped(self) -> PairLogps:
        """The same pairs with the other response as the chosen one."""
        return PairLogps(self.rejected, self.chosen)

    @property
    def margin(self) -> Tensor:
        """chosen - rejected, [B]."""
        return self.chosen - self.rejected


def scaled(scores: PairLogps, num_tokens: PairLogps, length_normalise: bool) -> PairLogps:
    """Return these log-probs per token if `length_normalise` is set, else per sequence."""
    return scores.per_token(num_tokens) if length_normalise else scores


def desensitised(whole: PairLogps, shared: PairLogps, tail_weight: float) -> PairLogps:
    """LD-DPO's log-probs (arXiv 2409.06411): tokens beyond the length of the shorter response weigh less.

    shared: log-probs of as many first tokens as the shorter response of a pair has, nats per sequence.
    """
    tail = whole.minus(shared)
    return PairLogps(shared.chosen + tail_weight * tail.chosen, shared.rejected + tail_weight * tail.rejected)


def likelihood_weights(policy: PairLogps, num_tokens: PairLogps) -> Tensor:
    """WPO's weights [B] (arXiv 2406.11827): how likely a token of each response is, multiplied. No gradient."""
    logps = policy.per_token(num_tokens)
    return torch.exp((logps.chosen + logps.rejected).detach())


def ratio_weights(policy: PairLogps, reference: PairLogps, max_log_ratio: float) -> Tensor:
    """Importance weights [B] of both responses, if they were drawn from the reference (arXiv 2506.08681). No gradient.

    Responses that the policy would hardly ever give thus count little; a ratio above `max_log_ratio` nats is clipped to
    it.
    """
    ratio = policy.minus(reference)
    return torch.exp((ratio.chosen + ratio.rejected).detach().clamp(max=max_log_ratio))


def preference_output(
    losses: Tensor, h: Tensor, policy: PairLogps, reference: PairLogps, labels: Tensor
) -> ObjectiveOutput:
    """Reduce per-pair losses [B] and the metrics that all methods share."""
    metrics: dict[str, Mean] = {}
    with torch.no_grad():
        metrics["logps/chosen"] = mean_of(policy.chosen)
        metrics["logps/rejected"] = mean_of(policy.rejected)
        metrics["preference/margin"] = mean_of(h)
        metrics["preference/saturated"] = mean_of((h.abs() > SATURATED).to(h.dtype))
        ratio = policy.minus(reference)
        metrics["logratio/chosen"] = mean_of(ratio.chosen)
        metrics["logratio/rejected"] = mean_of(ratio.rejected)
        metrics["preference/accuracy"] = mean_of(agreement(ratio.margin, labels))
    return ObjectiveOutput(mean_of(losses), metrics)


def agreement(margin: Tensor, labels: Tensor) -> Tensor:
    """1 where `margin` [B] orders the pair as its label does, 1/2 on ties, 0 otherwise."""
    return (torch.sign(margin) * torch.sign(labels - 0.5) + 1) / 2
