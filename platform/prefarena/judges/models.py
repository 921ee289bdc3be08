"""The judges that this project trains or defines: a reward model, and the language's gold reward."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from prefarena.data.plan import bounded_passes, largest_scored
from prefarena.modeling.arithmetic import Arithmetic, body_in_weights, products_of
from prefarena.modeling.heads import ScalarHead, scores
from prefarena.modeling.load import load_reward_model
from prefarena.modeling.logprobs import Sequences
from prefarena.modeling.roles import Role
from prefarena.tasks.gold import GoldReward


class GoldRewardJudge:
    """The gold reward of the enumerable language, from the JSON that its stage wrote."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when the file cannot be read."""
        self._gold = GoldReward.load(path)

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Gold rewards float64 [N]: mean 0 and unit variance under the reference."""
        return self._gold.score(prompts, responses)


class RewardModelJudge:
    """A reward model (a transformers sequence-classification folder).

    It scores in passes of at most `batch_size` sequences and as many tokens as `largest_scored`; one `of` a model in
    memory by their number alone, as workers that hold a part of it each must make equally many.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 64,
        device: str | torch.device = "cpu",
        arithmetic: Arithmetic = "float32",
    ) -> None:
        model = body_in_weights(load_reward_model(path), arithmetic)
        torch.nn.Module.to(model, device)
        self.head: ScalarHead | Role = ScalarHead(model)
        self._arithmetic: Arithmetic | None
        most_tokens = largest_scored(torch.device(device).type)
        self._batch_size, self._most_tokens, self._arithmetic = batch_size, most_tokens, arithmetic
        self._device: torch.device | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | Role,
        batch_size: int = 64,
        arithmetic: Arithmetic | None = None,
        device: torch.device | None = None,
    ) -> RewardModelJudge:
        """Make a judge from a model in memory; it scores on the model's device, with its normalisation.

        A role on a shared body scores with its own adapters and head. Without a named arithmetic, products are computed
        in that of the caller. device: where the model computes, if its weights are not there.
        """
        judge = cls.__new__(cls)
        judge.head = model if isinstance(model, Role) else ScalarHead(model)
        judge._batch_size, judge._most_tokens, judge._arithmetic = batch_size, sys.maxsize, arithmetic
        judge._device = device
        return judge

    @torch.no_grad()
    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Normalised scores float64 [N]; sequences of similar length share a pass."""
        with nullcontext() if self._arithmetic is None else products_of(self._arithmetic):
            return self._score(prompts, responses)

    def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        device = self._device or self.head.model.device
        found = torch.empty(len(prompts), dtype=torch.float64, device=device)
        lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], np.int64)
        passes, start = bounded_passes(lengths, self._batch_size, self._most_tokens), 0
        for rows in passes:
            batch = Sequences.of([prompts[i] for i in rows], [responses[i] for i in rows], device)
            found[start : start + len(rows)] = scores(self.head, batch)
            start += len(rows)
        values = np.empty(len(prompts))
        # Once: every copy to the host waits for all that came before.
        values[np.concatenate(passes) if passes else []] = found.cpu().numpy()
        return values
