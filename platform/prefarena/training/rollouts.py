"""From prompts to experience: which prompts an iteration samples on, and the tensors that PPO learns from.

Every worker generates and scores a contiguous share, then all shares are gathered, so that each worker holds the
whole rollout batch: whitening, minibatches and metrics are the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefarena.modeling.logprobs import Sequences, collate, token_logps_and_entropy
from prefarena.records import Rollout
from prefarena.training.worker import Worker


def prompt_indices(num_prompts: int, batch_size: int, iteration: int, seed: int) -> list[int]:
    """The prompts of an iteration: consecutive stretches of seeded permutations, so all are used equally often."""
    first = iteration * batch_size
    epochs = range(first // num_prompts, (first + batch_size - 1) // num_prompts + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_prompts) for epoch in epochs])
    offset = first - epochs.start * num_prompts
    return [int(index) for index in order[offset : offset + batch_size]]


def minibatches(num_rows: int, num_minibatches: int, seed: int, iteration: int, epoch: int) -> list[Tensor]:
    """One pass over the rollouts: a seeded permutation in `num_minibatches` parts whose sizes differ by at most one."""
    order = np.random.default_rng([seed, iteration, epoch]).permutation(num_rows)
    return [torch.from_numpy(part) for part in np.array_split(order, num_minibatches)]


def share(num_rows: int, rank: int, world_size: int) -> slice:
    """The contiguous rows of one worker."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


@dataclass(frozen=True)
class Experience:
    """A rollout batch. Per-token fields are [B, T-1] like `sequences.response_mask`, zero outside it.

    generator_logps, old_logps, reference_logps, entropy: nats, at the sampling temperature. values: of the critic that
    starts the iteration. scores: [B] rewards as judged, before clipping and penalties. finished: [B], ended by eos.
    """

    sequences: Sequences
    generator_logps: Tensor
    old_logps: Tensor
    reference_logps: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    finished: Tensor

    @property
    def mask(self) -> Tensor:
        return self.sequences.response_mask

    @property
    def num_sequence_tokens(self) -> int:
        """Prompt and response tokens of the batch."""
        return int(self.sequences.attention_mask.sum())

    def __len__(self) -> int:
        return len(self.scores)


def select(sequences: Sequences, rows: Tensor) -> Sequences:
    """Some rows of a batch, padding that none of them needs cut off."""
    picked = replace(sequences, **{name: getattr(sequences, name)[rows] for name in sequences.__dataclass_fields__})
    longest = int((picked.prompt_lengths + picked.response_lengths).max())
    return replace(picked, input_ids=picked.input_ids[:, :longest], attention_mask=picked.attention_mask[:, :longest])


def generator_logps(rollouts: list[Rollout], sequences: Sequences) -> Tensor:
    """The log-probs that came with the rollouts, [B, T-1], where the trainer's stand."""
    spread = torch.zeros(sequences.response_mask.shape)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids) - 1
        spread[row, start : start + len(rollout.token_logps)] = torch.tensor(rollout.token_logps)
    return spread


@dataclass(frozen=True)
class Scorers:
    """The models that turn sequences into experience; all but the policy's and critic's weights are frozen.

    values: sequences to [B, T-1]; reward: sequences to [B].
    """

    policy: nn.Module
    reference: nn.Module
    values: Callable[[Sequences], Tensor]
    reward: Callable[[Sequences], Tensor]
    temperature: float
    micro_batch_size: int
    autocast: Callable[[], Any]

    @torch.no_grad()
    def log_probs(self, sequences: Sequences) -> dict[str, Tensor]:
        """Log-probs of policy and reference, entropy and values, each [B, T-1]."""

        def compute(part: Sequences) -> dict[str, Tensor]:
            with self.autocast():
                old, entropy = token_logps_and_entropy(self.policy, part, self.temperature)
                reference, _ = token_logps_and_entropy(self.reference, part, self.temperature)
                values = self.values(part) * part.response_mask
            return {"old_logps": old, "entropy": entropy, "reference_logps": reference, "values": values}

        return self._in_parts(sequences, compute)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Tensor:
        """The judge's scores [B]."""
        return self._in_parts(sequences, lambda part: {"scores": self.reward(part)})["scores"]

    def _in_parts(self, sequences: Sequences, compute: Callable[[Sequences], dict[str, Tensor]]) -> dict[str, Tensor]:
        num_rows, width = sequences.response_mask.shape
        parts: list[dict[str, Tensor]] = []
        for rows in torch.arange(num_rows, device=sequences.input_ids.device).split(self.micro_batch_size):
            part = compute(select(sequences, rows))
            parts.append({name: _widen(value.float(), width) for name, value in part.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _widen(tensor: Tensor, width: int) -> Tensor:
    """A [B, T'] tensor padded with zeros to [B, width]; a [B] tensor as it is."""
    return tensor if tensor.dim() == 1 else nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def assemble(rollouts: list[Rollout], scorers: Scorers, sequences: Sequences, scores: Tensor) -> Experience:
    """One worker's experience from its rollouts, already collated and scored."""
    device = sequences.input_ids.device
    return Experience(
        sequences=sequences,
        generator_logps=generator_logps(rollouts, sequences.to("cpu")).to(device),
        scores=scores.float(),
        finished=torch.tensor([rollout.finished for rollout in rollouts], device=device).float(),
        **scorers.log_probs(sequences),
    )


def gather(local: Experience, num_rows: int, worker: Worker) -> Experience:
    """The experience of all workers, in the order of the prompts, on every worker."""
    if worker.world_size == 1:
        return local
    width = torch.zeros(worker.world_size, dtype=torch.long, device=worker.device)
    width[worker.rank] = local.sequences.input_ids.shape[1]
    longest = int(worker.sum(width).max())
    rows = share(num_rows, worker.rank, worker.world_size)

    def everywhere(tensor: Tensor, columns: int | None) -> Tensor:
        full = tensor.new_zeros((num_rows,) if columns is None else (num_rows, columns))
        full[rows] = tensor if columns is None else nn.functional.pad(tensor, (0, columns - tensor.shape[1]))
        return worker.sum(full)

    def columns_of(name: str) -> int | None:
        if name in ("input_ids", "attention_mask"):
            return longest
        return None if name in ("prompt_lengths", "response_lengths", "scores", "finished") else longest - 1

    sequences = {
        name: everywhere(getattr(local.sequences, name), columns_of(name))
        for name in local.sequences.__dataclass_fields__
    }
    rest = {
        name: everywhere(getattr(local, name), columns_of(name))
        for name in local.__dataclass_fields__
        if name != "sequences"
    }
    return Experience(sequences=Sequences(**sequences), **rest)


def collate_rollouts(rollouts: list[Rollout], pad_id: int, device: torch.device) -> Sequences:
    """Rollouts as a right-padded batch on `device`."""
    batch = collate(
        [rollout.prompt_ids for rollout in rollouts], [rollout.response_ids for rollout in rollouts], pad_id
    )
    return batch.to(device)
