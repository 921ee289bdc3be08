"""Every response to a prompt with its exact probability under a language model, or its score by a reward model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from prefarena.errors import UserError
from prefarena.modeling.heads import normalised
from prefarena.tasks.language import PADDING, padded

_MOST_RESPONSES = 5_000_000


@dataclass(frozen=True)
class Responses:
    """All N responses of at most L tokens over V tokens, each ended by eos or by the limit.

    Those that eos ends come first, shorter before longer, then those that the limit cuts off; rows of one length
    are in the order of their tokens. `sequences` int64 [N, L] with -1 behind the response, `lengths` int64 [N] with
    eos counted.
    """

    sequences: np.ndarray
    lengths: np.ndarray
    vocab_size: int

    @property
    def limit(self) -> int:
        """L, the most tokens in a response."""
        return self.sequences.shape[1]

    @classmethod
    def listed(cls, vocab_size: int, response_limit: int, eos_id: int) -> Responses:
        """List all responses. Raises UserError when there are more than five million of them."""
        number = sum((vocab_size - 1) ** t for t in range(response_limit + 1))
        if number > _MOST_RESPONSES:
            raise UserError(
                f"{vocab_size} tokens and a response limit of {response_limit} make {number:,} responses, "
                f"too many to list (the limit is {_MOST_RESPONSES:,})"
            )
        others = _other_tokens(vocab_size, eos_id)
        prefixes = np.zeros((1, 0), dtype=np.int64)
        blocks = []
        for _ in range(response_limit):
            ended = np.full((len(prefixes), 1), eos_id)
            blocks.append(_widened(np.concatenate([prefixes, ended], axis=1), response_limit))
            following = np.tile(others, len(prefixes))[:, None]
            prefixes = np.concatenate([prefixes.repeat(len(others), axis=0), following], axis=1)
        sequences = np.concatenate([*blocks, prefixes])
        return cls(sequences, (sequences != PADDING).sum(axis=1), vocab_size)

    def index(self, responses: list[list[int]]) -> np.ndarray:
        """The row [M] of each of M responses (token ids with eos). Raises UserError when one is not in the list."""
        if not responses:
            return np.zeros(0, dtype=np.int64)
        width = self.sequences.shape[1]
        if max(map(len, responses)) > width:
            raise UserError(f"a response has more than {width} tokens: {max(responses, key=len)}")
        codes, wanted = self._codes(self.sequences), self._codes(_widened(padded(responses), width))
        order = np.argsort(codes)
        rows = order[np.minimum(np.searchsorted(codes, wanted, sorter=order), len(codes) - 1)]
        missing = np.flatnonzero(codes[rows] != wanted)
        if len(missing):
            raise UserError(
                f"{responses[missing[0]]} is neither ended by eos nor as long as the limit of {width} tokens"
            )
        return rows

    def _codes(self, sequences: np.ndarray) -> np.ndarray:
        """A number for each row: its places are digits from -1 (behind the response) to the last token."""
        return sequences @ (self.vocab_size + 1) ** np.arange(sequences.shape[1])


@dataclass(frozen=True)
class Enumeration:
    """A policy on P prompts: `logps` float64 [P, N], nats, of the N `responses`."""

    responses: Responses
    logps: np.ndarray

    @property
    def sequences(self) -> np.ndarray:
        """int64 [N, L], -1 behind the response."""
        return self.responses.sequences

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], eos counted."""
        return self.responses.lengths

    def response_logps(self, prompt_rows: np.ndarray, responses: list[list[int]]) -> np.ndarray:
        """log pi(y|x) [M] of M responses, each to the prompt in row `prompt_rows` [M]."""
        return self.logps[prompt_rows, self.responses.index(responses)]


@torch.no_grad()
def enumerate_responses(
    model: PreTrainedModel,
    prompts: list[list[int]],
    response_limit: int,
    eos_id: int,
    max_rows: int = 8192,
) -> Enumeration:
    """log pi(y|x) of every response of at most `response_limit` tokens, ended by eos or by the limit.

    The whole vocabulary counts, control tokens included, so the probabilities of a prompt sum to 1. The tree of
    prefixes is walked level by level with the key-value cache; its leaves need no forward pass. Log-softmax and sums
    are in float64. `max_rows` bounds the prefixes in one forward pass (one prompt's widest level is the least).
    Raises UserError when the responses are too many to list or a prompt is empty.
    """
    vocab_size = int(model.config.get_text_config().vocab_size)
    responses = Responses.listed(vocab_size, response_limit, eos_id)
    chunk = max(1, max_rows // (vocab_size - 1) ** (response_limit - 1))
    with _evaluating(model):
        logps = _by_prompt(prompts, chunk, lambda some: _tree_logps(model, some.to(model.device), responses, eos_id))
    return Enumeration(responses, logps)


@torch.no_grad()
def enumerate_scores(
    model: PreTrainedModel,
    prompts: list[list[int]],
    response_limit: int,
    eos_id: int,
    max_rows: int = 8192,
) -> np.ndarray:
    """The reward model's normalised score, float64 [P, N], of every response in the order of `Responses`.

    `modeling.heads.scores` of each sequence, by the same walk: the score is read at the response's last token, so here
    the leaves do need a forward pass, and it is made for at most `max_rows` sequences at a time. Raises UserError as
    `enumerate_responses` does.
    """
    vocab_size = int(model.config.get_text_config().vocab_size)
    responses = Responses.listed(vocab_size, response_limit, eos_id)
    chunk = max(1, max_rows // (vocab_size - 1) ** (response_limit - 1))
    with _evaluating(model):
        return _by_prompt(
            prompts, chunk, lambda some: _tree_scores(model, some.to(model.device), responses, eos_id, max_rows)
        )


def _by_prompt(prompts: list[list[int]], chunk: int, walk: Callable[[torch.Tensor], np.ndarray]) -> np.ndarray:
    """Compute [P, N] from walks of [B, T] prompts of one length, at most `chunk` at a time."""
    if not all(prompts):
        raise UserError("an empty prompt cannot be enumerated: a language model needs a token to start from")
    rows_by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_by_length.setdefault(len(prompt), []).append(row)
    found: dict[int, np.ndarray] = {}
    for rows in rows_by_length.values():
        for start in range(0, len(rows), chunk):
            some = rows[start : start + chunk]
            found |= zip(some, walk(torch.tensor([prompts[row] for row in some])), strict=True)
    return np.stack([found[row] for row in range(len(prompts))])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and leave the model as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _tree_logps(model: PreTrainedModel, tokens: torch.Tensor, responses: Responses, eos_id: int) -> np.ndarray:
    """[B, N] log-probs in the order of `Responses` for B prompts [B, T] of one length."""
    cache, blocks, num_prompts = DynamicCache(config=model.config), [], len(tokens)
    others = torch.tensor(_other_tokens(responses.vocab_size, eos_id), device=model.device)
    totals = torch.zeros(num_prompts, 1, device=model.device)  # [B, prefixes], float64 from the first token on
    for level in range(responses.limit):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        following = logits.double().log_softmax(dim=-1).unflatten(0, (num_prompts, -1)) + totals[..., None]
        blocks.append(following[..., eos_id])
        totals = following[..., others].flatten(1)
        if level + 1 < responses.limit:
            cache.batch_repeat_interleave(len(others))
            tokens = others.repeat(len(tokens))[:, None]
    return torch.cat([*blocks, totals], dim=1).cpu().numpy()


def _tree_scores(
    model: PreTrainedModel, tokens: torch.Tensor, responses: Responses, eos_id: int, max_rows: int
) -> np.ndarray:
    """[B, N] normalised scores in the order of `Responses` for B prompts [B, T] of one length."""
    cache, blocks, num_prompts = DynamicCache(config=model.config), [], len(tokens)
    others = torch.tensor(_other_tokens(responses.vocab_size, eos_id), device=model.device)
    eos = torch.tensor([eos_id], device=model.device)
    for level in range(responses.limit):
        model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        blocks.append(_scores_after(model, cache, len(tokens), eos, max_rows).view(num_prompts, -1))
        if level + 1 < responses.limit:
            cache.batch_repeat_interleave(len(others))
            tokens = others.repeat(len(tokens))[:, None]
    blocks.append(_scores_after(model, cache, len(tokens), others, max_rows).view(num_prompts, -1))
    return torch.cat(blocks, dim=1).double().cpu().numpy()


def _scores_after(
    model: PreTrainedModel, cache: DynamicCache, num_rows: int, following: torch.Tensor, max_rows: int
) -> torch.Tensor:
    """Scores [num_rows * F] at each of F `following` tokens behind each row of the cache, which stays as it is."""
    parts = []
    for rows in torch.arange(num_rows, device=following.device).split(max(1, max_rows // len(following))):
        extended = copy.copy(cache)  # selecting and extending give a layer new tensors: the old ones are not touched
        extended.layers = [copy.copy(layer) for layer in cache.layers]
        extended.batch_select_indices(rows.repeat_interleave(len(following)))
        tokens = following.repeat(len(rows))[:, None]
        hidden = model.base_model(input_ids=tokens, past_key_values=extended, use_cache=True).last_hidden_state
        parts.append(normalised(model, model.get_submodule("score")(hidden)[:, -1, 0].float()))
    return torch.cat(parts)


def _other_tokens(vocab_size: int, eos_id: int) -> np.ndarray:
    return np.delete(np.arange(vocab_size), eos_id)


def _widened(sequences: np.ndarray, width: int) -> np.ndarray:
    return np.pad(sequences, ((0, 0), (0, width - sequences.shape[1])), constant_values=PADDING)
