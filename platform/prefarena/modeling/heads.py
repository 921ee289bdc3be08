"""Scalar heads: a reward model's score at the true last token, a critic's values at every position.

A reward model's normalisation (mean and scale on reference samples) lives in its config as
`reward_mean` and `reward_scale`, and is applied wherever it scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefarena.modeling.logprobs import Sequences, at_least_float32


def token_scores(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The raw head at every position, [B, T] float32, for a sequence-classification model with one label.

    The body is causal and padding is on the right, so no attention mask is needed (see `modeling/logprobs.py`).
    """
    body = getattr(model, model.base_model_prefix)
    hidden = body(input_ids=sequences.input_ids, use_cache=False).last_hidden_state
    return at_least_float32(model.get_submodule("score")(hidden)[..., 0])


class ScalarHead(torch.nn.Module):
    """A sequence-classification model as a module whose forward gives `token_scores`, so that DDP can wrap it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences: Sequences) -> Tensor:
        return token_scores(self.model, sequences)


class ValueHead(ScalarHead):
    """The same as a critic: forward gives `token_values`."""

    def forward(self, sequences: Sequences) -> Tensor:
        return token_values(self.model, sequences)


def last_token(token_values: Tensor, sequences: Sequences) -> Tensor:
    """[B, T] to [B]: the value at each sequence's true last token, whatever the padding."""
    return token_values.gather(1, sequences.last_positions[:, None])[:, 0]


def scores(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Normalised rewards [B] of whole sequences."""
    return normalised(model, last_token(token_scores(model, sequences), sequences))


def normalised(model: PreTrainedModel, raw: Tensor) -> Tensor:
    """Raw scores of any shape, normalised by the mean and scale in the model's config."""
    return (raw - getattr(model.config, "reward_mean", 0.0)) / getattr(model.config, "reward_scale", 1.0)


def token_values(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Critic values [B, T-1]: at t, of the state before token t+1; normalised like the reward it starts from."""
    return normalised(model, token_scores(model, sequences)[:, :-1])
