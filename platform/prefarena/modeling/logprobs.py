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
    first, logits = _scoring_logits(model, sequences, temperature)
    log_softmax = torch.log_softmax(logits, -1)
    logps = log_softmax.gather(-1, sequences.input_ids[:, first + 1 :, None])[..., 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return _at_responses(logps, first, sequences), _at_responses(entropy, first, sequences)


def token_logps(model: PreTrainedModel | torch.nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Response token log-probs [B, T-1], nats, float32; zero outside the response."""
    first, logits = _scoring_logits(model, sequences, temperature)
    targets = sequences.input_ids[:, first + 1 :]
    logps = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return _at_responses(logps.view(targets.shape), first, sequences)


def sequence_logps(model: PreTrainedModel | torch.nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """log pi(y|x) [B]: the sum over the response's tokens, nats, float32."""
    return token_logps(model, sequences, temperature).sum(-1)


def _scoring_logits(
    model: PreTrainedModel | torch.nn.Module, sequences: Sequences, temperature: float
) -> tuple[int, Tensor]:
    """The first position [0, T-1) that scores a response token of any row, and logits [B, T-1-first, V] from there on.

    No attention mask is passed: padding is on the right and attention is causal, so no token of a sequence sees it, and
    the positions of tokens are what they are without it. Attention without a mask is the faster.
    """
    length = sequences.input_ids.shape[1]
    first = max(0, int(sequences.prompt_lengths.min()) - 1)
    scoring = torch.arange(first, length - 1, device=sequences.input_ids.device)
    logits = model(input_ids=sequences.input_ids, use_cache=False, logits_to_keep=scoring).logits
    return first, at_least_float32(logits) if temperature == 1 else at_least_float32(logits) / temperature


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _at_responses(values: Tensor, first: int, sequences: Sequences) -> Tensor:
    """Values [B, T-1-first] as [B, T-1], zero outside the responses."""
    return torch.nn.functional.pad(values, (first, 0)).masked_fill(~sequences.response_mask, 0.0)
