"""How rollouts become the tensors that the update learns from.

Every worker scores the share that it generated, then all shares are gathered, so that each worker holds the whole
rollout batch: whitening, groups, minibatches and metrics are the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefarena.judges.spec import Judge, may_be_silent
from prefarena.modeling.heads import token_values
from prefarena.modeling.logprobs import Sequences, token_logps, token_logps_and_entropy
from prefarena.modeling.transfer import rows_on
from prefarena.records import Rollout
from prefarena.training.rollouts import share
from prefarena.training.worker import Worker

Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Experience:
    """A rollout batch. Per-token fields are [B, T-1] like `sequences.response_mask`, zero outside it.

    generator_logps, old_logps, reference_logps, entropy: nats, at the sampling temperature. scores: [B] rewards as
    judged, before clipping and penalties. finished: [B], not cut off at the limit. staleness: [B], how many updates
    older than the policy the weights are that generated it. values: of the critic that starts the iteration, where
    there is a critic. monitor_scores: [B] of a judge that is not learned from, nan where it gave none. silent: [B], 1
    where a judge that may be silent gave no score, which is 0 then; None means that it gave all.
    """

    sequences: Sequences
    generator_logps: Tensor
    old_logps: Tensor
    reference_logps: Tensor
    entropy: Tensor
    scores: Tensor
    finished: Tensor
    staleness: Tensor
    values: Tensor | None = None
    monitor_scores: Tensor | None = None
    silent: Tensor | None = None

    @property
    def silent_rows(self) -> Tensor:
        """The rows without a score, [B] bool."""
        return torch.zeros_like(self.scores, dtype=torch.bool) if self.silent is None else self.silent > 0

    @property
    def num_sequence_tokens(self) -> int:
        """Prompt and response tokens of the batch."""
        return int(self.sequences.lengths.sum())

    @property
    def num_response_tokens(self) -> int:
        return int(self.sequences.response_lengths.sum())

    def __len__(self) -> int:
        return len(self.scores)


def by_length(sequences: Sequences, rows: Tensor, size: int) -> list[Tensor]:
    """Divide `rows` on the host into parts of at most `size` with sequences of similar length, for little padding."""
    lengths = torch.from_numpy(sequences.lengths)[rows]
    return list(rows[lengths.argsort(stable=True)].split(size))


def generator_logps(rollouts: list[Rollout], mask: Tensor) -> Tensor:
    """The log-probs that came with the rollouts, [B, T-1], where the trainer's stand (`mask`)."""
    values = torch.tensor(list(chain.from_iterable(rollout.token_logps for rollout in rollouts)))
    return torch.zeros(mask.shape).masked_scatter(mask, values)


@dataclass(frozen=True)
class Scorers:
    """The models that turn rollouts into experience.

    policy, reference: called as a `LogProbs` is. critic: as a `ValueHead`; none where the method has no critic.
    """

    policy: nn.Module
    reference: nn.Module
    critic: nn.Module | None
    reward: Judge
    monitor: Judge | None
    temperature: float
    batch_size: int
    device: torch.device

    @torch.no_grad()
    def experience(self, rollouts: list[Rollout], staleness: list[int], phase: Phase) -> Experience:
        """One worker's experience; `phase` times its parts."""
        prompts = [rollout.prompt_ids for rollout in rollouts]
        responses = [rollout.response_ids for rollout in rollouts]
        with phase("score"):
            scores, silent = self._judged(self.reward, prompts, responses), None
            monitored = None
            if self.monitor is not None:
                same = self.monitor is self.reward
                monitored = scores if same else self._judged(self.monitor, prompts, responses)
            if may_be_silent(self.reward):
                silent, scores = scores.isnan().float(), scores.nan_to_num()
        with phase("logprobs"):
            sequences = Sequences.of(prompts, responses, self.device)
            logps = self._in_parts(sequences, self._log_probs)
        values = None
        if self.critic is not None:
            with phase("values"):
                values = self._in_parts(sequences, self._values)["values"]
        return Experience(
            sequences=sequences,
            generator_logps=generator_logps(rollouts, sequences.to("cpu").response_mask).to(self.device),
            scores=scores,
            finished=torch.tensor([rollout.finished for rollout in rollouts], device=self.device).float(),
            staleness=torch.tensor(staleness, device=self.device).float(),
            values=values,
            monitor_scores=monitored,
            silent=silent,
            **logps,
        )

    def _judged(self, judge: Judge, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        return torch.from_numpy(judge.score(prompts, responses)).float().to(self.device)

    def _log_probs(self, part: Sequences) -> dict[str, Tensor]:
        old, entropy = token_logps_and_entropy(self.policy, part, self.temperature)
        reference = token_logps(self.reference, part, self.temperature)
        return {"old_logps": old, "entropy": entropy, "reference_logps": reference}

    def _values(self, part: Sequences) -> dict[str, Tensor]:
        return {"values": token_values(self.critic, part)} if self.critic else {}

    def _in_parts(self, sequences: Sequences, compute: Callable[[Sequences], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run `compute` on parts of similar length, and put the results together in the batch's order as [B, T-1]."""
        shape = len(sequences.prompts), sequences.width
        whole: dict[str, Tensor] = {}
        for rows in by_length(sequences, torch.arange(shape[0]), self.batch_size):
            there = rows_on(self.device, rows)
            for name, value in compute(sequences.select(rows.tolist())).items():
                whole.setdefault(name, value.new_zeros(shape))[there, : value.shape[1]] = value
        return whole


def as_many_as_others(rollouts: list[Rollout], num_rows: int, worker: Worker) -> list[Rollout]:
    """This worker's rollouts, the last one twice where sharded models are scored with and others have one more.

    The layers of a sharded model are gathered in every pass, so all workers must make the same number of passes.
    """
    largest = -(-num_rows // worker.world_size)
    return rollouts + rollouts[-1:] * (largest - len(rollouts)) if worker.shards else rollouts


def gather(local: Experience, num_rows: int, worker: Worker) -> Experience:
    """The experience of all workers, in the order of the prompts, on every worker.

    What a worker has beyond its share of `num_rows` is left out (see `as_many_as_others`).
    """
    if worker.world_size == 1:
        return local
    width = torch.zeros(worker.world_size, dtype=torch.long, device=worker.device)
    width[worker.rank] = local.sequences.width
    widest = int(worker.sum(width).max())
    rows = share(num_rows, worker.rank, worker.world_size)

    def everywhere(tensor: Tensor, columns: int) -> Tensor:
        """Gather [b] or [b, T'] to the whole batch's [B] or [B, columns]."""
        tensor = tensor[: rows.stop - rows.start]
        full = tensor.new_zeros((num_rows, columns)[: tensor.dim()])
        full[rows] = tensor if tensor.dim() == 1 else nn.functional.pad(tensor, (0, columns - tensor.shape[1]))
        return worker.sum(full)

    present = {
        field.name: getattr(local, field.name)
        for field in fields(Experience)
        if field.name != "sequences" and getattr(local, field.name) is not None
    }
    gathered = {name: everywhere(tensor, widest) for name, tensor in present.items()}
    # NCCL sends what is on a GPU alone, so token ids go there and come back: once for a whole rollout batch.
    table = everywhere(_as_table(local.sequences).to(worker.device), widest + 3).cpu().numpy()
    return Experience(sequences=_from_table(table, local.sequences.device), **gathered)


def _as_table(sequences: Sequences) -> Tensor:
    """Make a table [b, 2 + T]: the lengths of prompt and response, their tokens, and zeros."""
    table = np.zeros((len(sequences.prompts), sequences.width + 3), np.int64)
    table[:, 0], table[:, 1] = sequences.prompt_lengths, sequences.response_lengths
    for row, prompt, response in zip(table, sequences.prompts, sequences.responses, strict=True):
        row[2 : 2 + len(prompt) + len(response)] = np.concatenate([prompt, response])
    return torch.from_numpy(table)


def _from_table(table: NDArray[np.int64], device: torch.device) -> Sequences:
    """The inverse of `_as_table`; further zeros do no harm."""
    rows = [(row[2 : 2 + row[0]], row[2 + row[0] : 2 + row[0] + row[1]]) for row in table]
    return Sequences.of([prompt for prompt, _ in rows], [response for _, response in rows], device)
