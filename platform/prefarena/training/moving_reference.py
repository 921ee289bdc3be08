"""A reference that follows the policy: every so many iterations it moves towards the policy, or becomes it.

The penalty then holds each stretch of a training near where the one before it came to, and the policy may end far from
where it started (arXiv 2404.10719; 2404.09656 does so in training on pairs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prefarena.modeling.parts import own_part
from prefarena.settings.on_policy import OnPolicyTraining
from prefarena.training.learner import Learner
from prefarena.training.on_policy_models import POLICY, REFERENCE, OnPolicyModels


class MovingReference:
    """The reference's weights beside the policy's: all of them, or the adapters of two roles on one body.

    Every worker moves what it holds, a copy or its part, by the same rule, so nothing is sent.
    """

    def __init__(self, models: OnPolicyModels, policy: Learner, settings: OnPolicyTraining) -> None:
        """models: already placed. policy: the policy's learner, towards whose parameters the reference moves."""
        self._root: nn.Module = models.reference if models.body is None else models.body
        self._every, self._mix = settings.reference_every, settings.reference_mix
        self._reference = models.followers
        self._policy = {name.replace(f".{POLICY}.", f".{REFERENCE}."): one for name, one in policy.trained.items()}
        if self._reference.keys() != self._policy.keys():
            raise TypeError("the reference has other weights than the policy that it is to follow")

    @torch.no_grad()
    def after(self, num_iterations: int) -> None:
        """Move the reference if this iteration is due: pi_ref <- (1 - mix) pi_ref + mix pi, weight by weight."""
        if self._every is None or num_iterations % self._every:
            return
        self._spread_again()
        for name, weight in self._reference.items():
            own_part(weight).lerp_(own_part(self._policy[name]), self._mix)

    def tensors(self) -> dict[str, Tensor]:
        """Return this worker's part of the reference for a checkpoint."""
        return {f"{REFERENCE}.{name}": own_part(weight) for name, weight in self._reference.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self._spread_again()
        for name, weight in self._reference.items():
            own_part(weight).copy_(tensors[f"{REFERENCE}.{name}"])

    def _spread_again(self) -> None:
        """Drop FSDP's gathered copy of the root, kept until a backward pass: the next pass would use it as weights."""
        if isinstance(self._root, FSDPModule):
            self._root.reshard()
