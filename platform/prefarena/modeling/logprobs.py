"""A transformers causal language model in, response log-probs out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sequences:
    """A right-padded batch of prompt + response.

    input_ids, attention_mask: [B, T]; prompt_lengths, response_lengths: [B], in tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    def to(self, device: torch.device | str) -> Sequences:
        fields = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__}
        return replace(self, **fields)

    @property
    def response_mask(self) -> Tensor:
        """[B, T-1] bool: true at t where token t+1 belongs to the response, so that logits[t] score it."""
        position = torch.arange(self.input_ids.shape[1] - 1, device=self.input_ids.device)[None, :] + 1
        start = self.prompt_lengths[:, None]
        return (position >= start) & (position < start + self.response_lengths[:, None])

    def ids(self) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts and the responses, as lists of token ids."""
        prompts, responses = [], []
        lengths = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        for row, (start, length) in zip(self.input_ids.tolist(), lengths, strict=True):
            prompts.append(row[:start])
            responses.append(row[start : start + length])
        return prompts, responses

    @property
    def last_positions(self) -> Tensor:
        """[B]: the position of each sequence's last token."""
        return self.prompt_lengths + self.response_lengths - 1


def collate(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> Sequences:
    """Lists of token ids to a right-padded batch. Padding is told apart by lengths, never by the pad id."""
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    response_lengths = torch.tensor([len(response) for response in responses])
    lengths = prompt_lengths + response_lengths
    attention_mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    input_ids = torch.full(attention_mask.shape, pad_id, dtype=torch.long)
    tokens = chain.from_iterable(chain(*pair) for pair in zip(prompts, responses, strict=True))
    input_ids[attention_mask] = torch.tensor(list(tokens), dtype=torch.long)
    return Sequences(input_ids, attention_mask.long(), prompt_lengths, response_lengths)


def token_logps_and_entropy(
    model: PreTrainedModel | torch.nn.Module, sequences: Sequences, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Response token log-probs and the policy's entropy at each response position, both [B, T-1], nats, float32.

    Zero outside the response. `temperature` divides the logits, as sampling does.
    """
    mask = sequences.response_mask
    log_softmax = _response_log_softmax(model, sequences, mask, temperature)
    token_logps = log_softmax.gather(-1, sequences.input_ids[:, 1:][mask][:, None])[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return _spread(token_logps, mask), _spread(entropy, mask)


def token_logps(model: PreTrainedModel | torch.nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Response token log-probs [B, T-1], nats, float32; zero outside the response."""
    mask = sequences.response_mask
    log_softmax = _response_log_softmax(model, sequences, mask, temperature)
    return _spread(log_softmax.gather(-1, sequences.input_ids[:, 1:][mask][:, None])[:, 0], mask)


def sequence_logps(model: PreTrainedModel | torch.nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """log pi(y|x) [B]: the sum over the response's tokens, nats, float32."""
    return token_logps(model, sequences, temperature).sum(-1)


def _response_log_softmax(
    model: PreTrainedModel | torch.nn.Module, sequences: Sequences, mask: Tensor, temperature: float
) -> Tensor:
    """log-softmax rows [num response tokens, V], of the positions that score a response token."""
    logits = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False).logits
    return torch.log_softmax(logits[:, :-1][mask].float() / temperature, dim=-1)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values at the true positions of `mask` [B, T-1], zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
