"""A transformers causal language model in, response log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefarena.modeling.chunked_head import chunked_logps
from prefarena.modeling.packing import Ids, PackedBatch, pack
from prefarena.modeling.support import body_keywords, body_output, has_plain_head, why_not_packed


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


class PackedModel(nn.Module):
    """A transformers model that runs on packed rows where it can, as a module that DDP and FSDP can wrap.

    packed: whether prompts may be shared between responses. notes: for the user, why the model takes a slower path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int | None = None,
        device: torch.device | None = None,
        attends_in: torch.dtype | None = None,
    ) -> None:
        """max_length: most tokens of a prompt and its response (for models whose attention reaches only so far).

        device, attends_in: where the model will run, and the kind of numbers in which it attends there, where that is
        not as it is now.
        """
        super().__init__()
        self.model = model
        reason = why_not_packed(model, max_length, device, attends_in)
        self.packed = reason is None
        self.notes = [f"prompts are not shared between responses, and rows are padded: {reason}"] if reason else []


class LogProbs(PackedModel):
    """A causal language model as a module whose forward gives response log-probs."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int | None = None,
        device: torch.device | None = None,
        attends_in: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, max_length, device, attends_in)
        self.plain_head = has_plain_head(model)
        if not self.plain_head:
            self.notes.append("its head is more than a linear map, so whole rows of logits are held in memory")

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens, and where asked the entropy of the policy there, [M] each, nats, float32.

        `temperature` divides the logits, as sampling does.
        """
        if not self.plain_head:
            return _from_logits(self._logits(batch), batch.targets, temperature, entropy)
        head = self.model.get_output_embeddings()
        hidden = body_output(self.model, batch).index_select(0, batch.sources)
        return chunked_logps(hidden, head.weight, head.bias, batch.targets, temperature=temperature, entropy=entropy)

    def _logits(self, batch: PackedBatch) -> Tensor:
        """[M, V] by the model's own head."""
        keywords = body_keywords(batch)
        if batch.trees is not None:
            return self.model(**keywords, logits_to_keep=batch.sources).logits[0]
        return self.model(**keywords).logits.flatten(0, 1).index_select(0, batch.sources)


def _from_logits(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_softmax = torch.log_softmax(at_least_float32(logits) / temperature, -1)
    logps = log_softmax.gather(-1, targets[:, None])[:, 0]
    return logps, -(log_softmax.exp() * log_softmax).sum(-1) if entropy else None


def can_pack(module: nn.Module) -> bool:
    """Of a `PackedModel`, as it is or in DDP."""
    return bool(getattr(module, "module", module).packed)


def pack_sequences(sequences: Sequences, packed: bool) -> PackedBatch:
    """Each sequence as a prompt with one response, on the sequences' device."""
    prompts, responses = sequences.ids()
    return pack(prompts, [[ids] for ids in responses], shared=packed, device=sequences.input_ids.device)


def token_logps(module: nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Response token log-probs [B, T-1], nats, float32; zero outside the response. module: a `LogProbs`."""
    logps, _ = module(pack_sequences(sequences, can_pack(module)), temperature)
    return at_responses(logps, sequences)


def token_logps_and_entropy(module: nn.Module, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Response token log-probs and the policy's entropy at each response position, both [B, T-1], nats, float32.

    Zero outside the response.
    """
    logps, entropy = module(pack_sequences(sequences, can_pack(module)), temperature, True)
    return at_responses(logps, sequences), at_responses(entropy, sequences)


def sequence_logps(
    module: nn.Module,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    *,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    pad_id: int = 0,
) -> tuple[Tensor, PackedBatch]:
    """log pi(y|x) [R] of the responses to each prompt in one pass, nats, float32; and the batch.

    module: a `LogProbs`.
    """
    batch = pack(prompts, responses, shared=can_pack(module), device=device, pad_id=pad_id)
    return batch.sums(module(batch, temperature)[0]), batch


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def at_responses(values: Tensor, sequences: Sequences) -> Tensor:
    """Values [M] of response tokens as [B, T-1], zero outside the responses."""
    mask = sequences.response_mask
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
