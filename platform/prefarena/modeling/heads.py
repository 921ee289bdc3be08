"""Scalar heads: a reward model's score at the true last token, a critic's values before each response token.

A reward model's normalisation (mean and scale on reference samples) lives in its config as
`reward_mean` and `reward_scale`, and is applied wherever it scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefarena.modeling.logprobs import PackedModel, Sequences, at_least_float32, at_responses, can_pack
from prefarena.modeling.packing import PackedBatch
from prefarena.modeling.roles import Role
from prefarena.modeling.support import body_output


class ScalarHead(PackedModel):
    """A sequence-classification model with one label."""

    def forward(self, batch: PackedBatch) -> Tensor:
        """Raw scores [R] of the responses, each at its true last token; float32."""
        return self._at(batch, batch.last)

    def _at(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        self.count(batch)
        hidden = body_output(self.model, batch).index_select(0, positions)
        score = self.model.get_submodule("score")
        if isinstance(score, nn.Linear):  # a score of eight bits would make ties of near responses
            raw = F.linear(at_least_float32(hidden), at_least_float32(score.weight), score.bias)
        else:
            raw = score(hidden)
        return at_least_float32(raw)[..., 0].clone()  # what FSDP wraps must not return a view


class ValueHead(ScalarHead):
    """A sequence-classification model with one label, used as a critic."""

    def forward(self, batch: PackedBatch) -> Tensor:
        """Values [M]: of the state before each response token; normalised like the reward it starts from."""
        return normalised(self.model, self._at(batch, batch.sources))


@torch.no_grad()
def scores(head: ScalarHead | Role, sequences: Sequences) -> Tensor:
    """Normalised rewards [B] of whole sequences."""
    return normalised(head.model, head(sequences.layout(head.packed)))


def normalised(model: PreTrainedModel, raw: Tensor) -> Tensor:
    """Normalise raw scores of any shape by the mean and scale in the model's config."""
    return (raw - getattr(model.config, "reward_mean", 0.0)) / getattr(model.config, "reward_scale", 1.0)


def token_values(module: nn.Module, sequences: Sequences) -> Tensor:
    """Critic values [B, T-1]: at t, of the state before token t+1; zero outside the response. module: a `ValueHead`."""
    batch = sequences.layout(can_pack(module))
    return at_responses(module(batch), batch, sequences.width)
