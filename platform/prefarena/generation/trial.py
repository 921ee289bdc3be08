"""Whether an engine's results with new weights equal those of transformers: the part of a trial without an engine.

Reading weights back shows that they arrived, where their layout is known. Log-probs show it whatever the layout, and
that the engine computes the same function of them. No Ray, no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prefarena.generation.interface import WeightMismatchError

#: Mean difference of token log-probs (nats) that rounding explains, in float32 and in types of 16 bits.
_FLOAT32_GAP, _HALF_GAP = 0.005, 0.1
#: In 16 bits the new weights' log-probs must also be so much nearer than the old weights'.
_NEARER = 0.5
_FACTOR, _ADDED = 33 / 32, 2**-10
_NUM_PROMPTS, _PROMPT_TOKENS, _RESPONSE_TOKENS = 4, 4, 8


def trial_prompts(vocab_size: int, max_length: int) -> tuple[list[list[int]], int]:
    """A few short prompts of tokens from the whole vocabulary, and how many tokens to generate after each.

    max_length: most tokens of both.
    """
    step = max(1, vocab_size // (_NUM_PROMPTS * _PROMPT_TOKENS))
    flat = [index * step % vocab_size for index in range(_NUM_PROMPTS * _PROMPT_TOKENS)]
    length = max(1, min(_PROMPT_TOKENS, max_length // 2))
    prompts = [flat[start::_NUM_PROMPTS][:length] for start in range(_NUM_PROMPTS)]
    return prompts, min(_RESPONSE_TOKENS, max_length - length)


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Change every number in place, enough to differ in 16-bit types but not so much that the model breaks."""
    for parameter in model.parameters():
        parameter.mul_(_FACTOR).add_(_ADDED)


@torch.no_grad()
def change_back(model: nn.Module) -> None:
    """Undo `change`, up to rounding."""
    for parameter in model.parameters():
        parameter.sub_(_ADDED).div_(_FACTOR)


@torch.no_grad()
def token_logps(model: nn.Module, sequences: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probs [N] of all tokens of responses, each given with its prompt, at temperature 1."""
    found = []
    for prompt, response in sequences:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def check_served(engine: Tensor, new: Tensor, old: Tensor, dtype: torch.dtype) -> None:
    """Raise WeightMismatchError where an engine's log-probs [N] of its own samples are not those of the new weights.

    new, old: what transformers gives for the same tokens with the weights that were sent, and with those before.
    dtype: the engine's.
    """
    gap, old_gap = (float((engine - other).abs().mean()) for other in (new, old))
    allowed = _FLOAT32_GAP if dtype == torch.float32 else max(_HALF_GAP, _NEARER * old_gap)
    if not gap <= allowed:  # NaN is no agreement
        raise WeightMismatchError(
            f"with new weights its log-probs differ from those of transformers by {gap:.2g} nats per token on average "
            f"(with the weights before them by {old_gap:.2g}; {allowed:.2g} is allowed)"
        )
