"""Log-probs of continuations, and whether greedy decoding gives them, for multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from prefarena.evaluation.divergence import Samples
from prefarena.modeling.logprobs import LogProbs, at_least_float32
from prefarena.modeling.packing import PackedBatch

#: Positions whose rows of logits are held at a time.
_POSITIONS = 512


@torch.no_grad()
def continuation_logps(module: LogProbs, samples: Samples) -> np.ndarray:
    """[N, 2]: log pi(y|x), nats, and 1 where each token of y is the likeliest one after those before it, else 0."""
    found = np.empty((len(samples.prompts), 2))
    for rows in samples.passes(np.arange(len(found)), module.model.device):
        batch = samples.batch(module, rows)
        logps, is_first = (torch.cat(parts) for parts in zip(*_by_position(module, batch), strict=True))
        misses = batch.sums((~is_first).float())
        found[rows] = torch.stack([batch.sums(logps).double(), (misses == 0).double()], 1).cpu().numpy()
    return found


def _by_position(module: LogProbs, batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """The log-prob of each token of the responses, float32, and whether it is the likeliest; some positions at once."""
    plain = module.plain_head
    states = module.head_inputs(batch) if plain else module.logits(batch)
    for start in range(0, len(states), _POSITIONS):
        part, targets = states[start : start + _POSITIONS], batch.targets[start : start + _POSITIONS]
        logits = at_least_float32(linear(part, module.head.weight, module.head.bias) if plain else part)
        logps = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
        yield logps, logits.argmax(-1) == targets
