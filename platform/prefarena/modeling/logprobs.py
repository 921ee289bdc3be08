"""A transformers causal language model in, response log-probs out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefarena.modeling.awaited import standing_in
from prefarena.modeling.chunked_head import Head, chunked_logps
from prefarena.modeling.compiled_layers import compile_layers, why_not_compiled
from prefarena.modeling.packing import Ids, PackedBatch, pack
from prefarena.modeling.passes import Worked
from prefarena.modeling.support import body_keywords, body_output, has_plain_head, why_not_packed
from prefarena.modeling.transfer import moved


@dataclass(frozen=True)
class Sequences:
    """B prompts, each with its response: token ids on the host, and the device on which passes over them run.

    The host lays every pass out from the ids (see packing.py), so they never have to be read back from a device.
    prompts, responses: B arrays of ids. [B, T-1] below: T is the longest sequence's number of tokens.
    """

    prompts: list[NDArray[np.int64]]
    responses: list[NDArray[np.int64]]
    device: torch.device
    _layouts: dict[bool, PackedBatch] = field(init=False, repr=False, compare=False, default_factory=dict)

    @classmethod
    def of(cls, prompts: Sequence[Ids], responses: Sequence[Ids], device: torch.device | str = "cpu") -> Sequences:
        """Make a batch from one list of token ids for each prompt and each response."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        own, answers = ([np.asarray(ids, np.int64) for ids in side] for side in (prompts, responses))
        return cls(own, answers, torch.device(device))

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """The lengths [B], in tokens."""
        return np.array([len(ids) for ids in self.prompts], np.int64)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """The lengths of the responses [B], in tokens."""
        return np.array([len(ids) for ids in self.responses], np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The total lengths [B], in tokens, of each prompt and its response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def width(self) -> int:
        """The width T-1 of per-token tensors."""
        return int(self.lengths.max()) - 1

    @property
    def response_mask(self) -> Tensor:
        """Bool mask [B, T-1] on the device: true at t if token t+1 is the response's, so that logits[t] score it."""
        starts, stops = moved([self.prompt_lengths - 1, self.lengths - 1], self.device)
        position = torch.arange(self.width, device=self.device)[None, :]
        return (position >= starts[:, None]) & (position < stops[:, None])

    def to(self, device: torch.device | str) -> Sequences:
        return replace(self, device=torch.device(device))

    def select(self, rows: Iterable[int]) -> Sequences:
        """Select some rows, in the order asked for."""
        rows = list(rows)
        return replace(self, prompts=[self.prompts[i] for i in rows], responses=[self.responses[i] for i in rows])

    def layout(self, packed: bool) -> PackedBatch:
        """Each sequence as a prompt with one response, on the device; made and sent once, for all models and passes."""
        if packed not in self._layouts:
            self._layouts[packed] = pack(
                self.prompts, [[ids] for ids in self.responses], shared=packed, device=self.device
            )
        return self._layouts[packed]


class PackedModel(nn.Module):
    """A transformers model that runs on packed rows where it can, as a module that DDP and FSDP can wrap.

    packed: whether prompts may be shared between responses. notes: for the user, why the model takes a slower path.
    worked: what its passes on this worker have gone through. On a GPU its layers are compiled, where they can be. Both
    are tried on its first layers where its weights are awaited.
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
        self.model, self.worked = model, Worked()
        tried = standing_in(model)
        reason = why_not_packed(tried, max_length, device, attends_in)
        self.packed = reason is None
        self.notes = [f"prompts are not shared between responses, and rows are padded: {reason}"] if reason else []
        if tried is not model and self.packed:
            model.set_attn_implementation(tried.config._attn_implementation)
        self._try_head(tried)
        where = device or tried.device
        if where.type != "cuda" or tried.device.type == "meta":
            return
        slow = why_not_compiled(tried, where, attends_in or tried.dtype, self.packed)
        if slow is None:
            compile_layers(model)
        else:
            self.notes.append(f"its layers run one operation at a time: they cannot be compiled for {where} ({slow})")

    def count(self, batch: PackedBatch) -> None:
        """Count a pass over the batch."""
        self.worked.count(batch.passed, with_gradient=torch.is_grad_enabled())

    def _try_head(self, tried: PreTrainedModel) -> None:
        """Find out, by trying it, whether the model's head is plain."""


class LogProbs(PackedModel):
    """A causal language model as a module whose forward gives response log-probs."""

    def _try_head(self, tried: PreTrainedModel) -> None:
        self.plain_head = has_plain_head(tried)
        if not self.plain_head:
            self.notes.append("its head is not just a linear map, so whole rows of logits are kept in memory")

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens, and where asked the entropy of the policy there, [M] each, nats, float32.

        `temperature` divides the logits, as sampling does.
        """
        self.count(batch)
        if not self.plain_head:
            return _from_logits(self.logits(batch), batch.targets, temperature, entropy)
        weight, bias = self.head
        return chunked_logps(
            self.head_inputs(batch), weight, bias, batch.targets, temperature=temperature, entropy=entropy
        )

    @property
    def head(self) -> Head:
        """The head of a model whose head is plain."""
        head = self.model.get_output_embeddings()
        return Head(head.weight, head.bias)

    def head_inputs(self, batch: PackedBatch) -> Tensor:
        """The last hidden states [M, D] that score the response tokens: what a plain head takes."""
        return body_output(self.model, batch).index_select(0, batch.sources)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits [M, V] by the model's own head."""
        keywords = body_keywords(batch)
        if batch.trees is not None:
            return self.model(**keywords, logits_to_keep=batch.sources).logits[0]
        return self.model(**keywords).logits.flatten(0, 1).index_select(0, batch.sources)


def _from_logits(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_softmax = torch.log_softmax(at_least_float32(logits) / temperature, -1)
    logps = log_softmax.gather(-1, targets[:, None])[:, 0]
    return logps, -(log_softmax.exp() * log_softmax).sum(-1) if entropy else None


def can_pack(module: nn.Module) -> bool:
    """Whether a `PackedModel`, as it is or in DDP, can pack rows."""
    return bool(getattr(module, "module", module).packed)


def token_logps(module: nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Response token log-probs [B, T-1], nats, float32; zero outside the response. module: a `LogProbs`."""
    batch = sequences.layout(can_pack(module))
    return at_responses(module(batch, temperature)[0], batch, sequences.width)


def token_logps_and_entropy(module: nn.Module, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Response token log-probs and the policy's entropy at each response position, both [B, T-1], nats, float32.

    Zero outside the response.
    """
    batch = sequences.layout(can_pack(module))
    logps, entropy = (at_responses(values, batch, sequences.width) for values in module(batch, temperature, True))
    return logps, entropy


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
    """Widen half precision to float32; leave float32 and float64 as they are."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def at_responses(values: Tensor, batch: PackedBatch, width: int) -> Tensor:
    """Values [M] of a batch's response tokens as [R, width], each at the position that scores its token; else zero.

    Places are named one by one: a mask would have to be read back to count them, in the backward pass at least.
    """
    if batch.position_ids is not None:
        position = batch.position_ids[0].index_select(0, batch.sources)
    else:
        position = batch.sources - batch.response_of * batch.input_ids.shape[1]
    return values.new_zeros(len(batch.lengths), width).index_put((batch.response_of, position), values)
