"""KL divergences of two policies along sampled responses, exact over the vocabulary at every position; and log-probs.

By the chain rule the divergence of two policies is the expectation, over responses of the first, of the sum over
positions of the divergence of their next-token distributions. Each term of that sum is computed exactly, so only the
responses are sampled (the Rao-Blackwellised estimator of arXiv 2504.10637): unbiased like k1, which adds the noise of
every token that was drawn. The log-probs of the responses, of which k1 is made, come from the same passes.

One model is held at a time: what the first one's head takes is kept on the host, with the head, until the second one
has run. A model whose head is more than a linear map has to be held beside the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prefarena.data.plan import bounded_passes, largest_scored
from prefarena.modeling.chunked_head import Compared, chunked_comparison
from prefarena.modeling.logprobs import LogProbs, at_least_float32, can_pack
from prefarena.modeling.packing import PackedBatch, pack

#: Most numbers of hidden states that are kept on the host at a time: 512 MiB in float32.
_MOST_NUMBERS = 1 << 27
#: Most logits of one model that are held at a time where the head is more than a linear map.
_MOST_LOGITS = 1 << 25


class Loaded(Protocol):
    """A policy whose weights are loaded when they are needed, and freed afterwards."""

    def module(self) -> LogProbs: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Samples:
    """N responses, each with its prompt; passes hold at most `batch_size` of them, and as many tokens as
    `largest_scored` or one response.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    pad_id: int
    batch_size: int
    temperature: float = 1.0

    def passes(self, rows: np.ndarray, device: torch.device) -> Iterator[np.ndarray]:
        """Return indices of these rows in passes for this device, with rows of similar length together."""
        lengths = np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)], np.int64)
        for places in bounded_passes(lengths[rows], self.batch_size, largest_scored(device.type)):
            yield rows[places]

    def batch(self, module: LogProbs, rows: np.ndarray) -> PackedBatch:
        prompts, responses = [self.prompts[i] for i in rows], [[self.responses[i]] for i in rows]
        return pack(prompts, responses, shared=can_pack(module), device=module.model.device, pad_id=self.pad_id)


@torch.no_grad()
def along_samples(policy: Loaded, other: Loaded, samples: Samples) -> np.ndarray:
    """[N, 4], nats: along each response y to x the sums over positions of KL(policy || other) and of
    KL(other || policy), and log policy(y|x) and log other(y|x).

    The mean of the first over samples of the policy estimates KL(policy || other), that of the second over samples of
    the other KL(other || policy); all at the temperature that the samples were drawn at.
    """
    found = np.empty((len(samples.prompts), 4))
    if not policy.module().plain_head:
        for rows in samples.passes(np.arange(len(found)), policy.module().model.device):
            found[rows] = _by_logits(policy.module(), other.module(), samples, rows)
        return found
    width = policy.module().head.weight.shape[1]
    for block in _blocks(samples, max(1, _MOST_NUMBERS // width)):
        own = policy.module()
        passes = list(samples.passes(block, own.model.device))
        hidden, head = [own.head_inputs(samples.batch(own, rows)).cpu() for rows in passes], own.head
        del own
        policy.release()
        module = other.module()
        for rows, states in zip(passes, hidden, strict=True):
            batch = samples.batch(module, rows)
            there = states.to(module.model.device)
            own_states = module.head_inputs(batch)
            values = chunked_comparison(
                there, head, own_states, module.head, batch.targets, temperature=samples.temperature
            )
            found[rows] = _sums(batch, values)
        del module
        if block[-1] + 1 < len(found):
            other.release()
    return found


def _blocks(samples: Samples, most_tokens: int) -> Iterator[np.ndarray]:
    """Consecutive rows of at most `most_tokens` response tokens, or one response."""
    start, tokens = 0, 0
    for row, response in enumerate(samples.responses):
        if tokens and tokens + len(response) > most_tokens:
            yield np.arange(start, row)
            start, tokens = row, 0
        tokens += len(response)
    if start < len(samples.responses):
        yield np.arange(start, len(samples.responses))


def _by_logits(policy: LogProbs, other: LogProbs, samples: Samples, rows: np.ndarray) -> np.ndarray:
    """Compute [n, 4] for some rows from full rows of logits, a few responses at a time."""
    size = policy.model.config.get_text_config().vocab_size
    longest = max(len(samples.responses[i]) for i in rows)
    step = max(1, _MOST_LOGITS // (size * longest))
    found = []
    for start in range(0, len(rows), step):
        batches = [samples.batch(module, rows[start : start + step]) for module in (policy, other)]
        logps = [
            torch.log_softmax(at_least_float32(module.logits(batch)) / samples.temperature, -1)
            for module, batch in zip((policy, other), batches, strict=True)
        ]
        given = [own.gather(-1, batches[0].targets[:, None])[:, 0].double() for own in logps]
        divergences = _expected_ratio(logps[0], logps[1]), _expected_ratio(logps[1], logps[0])
        found.append(_sums(batches[0], Compared(*divergences, *given)))
    return np.concatenate(found)


def _expected_ratio(logps: Tensor, other_logps: Tensor) -> Tensor:
    """[M] sum of p (log p - log q) over the vocabulary; tokens of no probability carry no weight."""
    probs = logps.exp()
    return torch.where(probs > 0, probs * (logps - other_logps), 0.0).sum(-1).double()


def _sums(batch: PackedBatch, values: Compared) -> np.ndarray:
    return np.stack([batch.sums(value).cpu().numpy() for value in values], axis=1)
