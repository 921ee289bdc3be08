"""A policy's values of responses in an evaluation: log-probs, and the divergence from another policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from pipelines.kept_rollouts import Wanted, training_of
from prefarena.evaluation.divergence import Samples, along_samples
from prefarena.evaluation.sampled import response_logps
from prefarena.modeling.arithmetic import Arithmetic, in_weights, named, products_of
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.modeling.logprobs import LogProbs

#: Weights of no more bytes are held beside another policy's: to read them again for every part would take longer than
#: what is done with them.
_SMALL = 1 << 30


@dataclass(frozen=True)
class ScoredWith:
    """How policies are scored. device: where; arithmetic: see modeling/arithmetic.py."""

    batch_size: int
    device: str = "cpu"
    arithmetic: Arithmetic = "float32"

    def given_by(self) -> list[object]:
        """What a part's values depend on besides the policies and the responses."""
        return [self.batch_size, self.device, *named(self.arithmetic)]


class Scorer:
    """A policy's log-probs of responses; its weights are read for the first part that is missing.

    As a context it lets go of them in the end.
    """

    def __init__(self, policy: str, settings: ScoredWith) -> None:
        self.policy, self.settings = policy, settings
        self._model: PreTrainedModel | None = None
        self._module: LogProbs | None = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._model = self._module = None

    def release(self) -> None:
        """Release the weights unless they are small; they are read again when they are needed again."""
        if self._model is not None and self._model.get_memory_footprint(return_buffers=False) > _SMALL:
            self._model = self._module = None

    def logps(self, prompts: list[list[int]], responses: list[list[int]], temperature: float) -> Wanted:
        """Compute log pi(y|x) [N], nats."""
        given_by = ["logps", training_of(self.policy), temperature, *self.settings.given_by()]
        return Wanted(given_by, prompts, responses, partial(self._logps, temperature))

    def module(self) -> LogProbs:
        """The policy as a module."""
        if self._module is None:
            self._module = LogProbs(self._loaded())
        return self._module

    @property
    def pad_id(self) -> int:
        return int(load_tokenizer(self.policy).pad_token_id)

    def _logps(self, temperature: float, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        batch_size = self.settings.batch_size
        with products_of(self.settings.arithmetic):
            return response_logps(self._loaded(), prompts, responses, self.pad_id, batch_size, temperature)

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            self._model = in_weights(load_policy(self.policy), self.settings.arithmetic)
            torch.nn.Module.to(self._model, self.settings.device)
        return self._model


def along(
    own: Scorer, other: Scorer, prompts: list[list[int]], responses: list[list[int]], temperature: float
) -> Wanted:
    """Compute [N, 4], nats, as `along_samples` does. Computing a part lets go of the weights of `own`; those of `other`
    stay for later.
    """
    policies = [training_of(one.policy) for one in (own, other)]
    given_by = ["along", *policies, temperature, *own.settings.given_by()]

    def compute(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        samples = Samples(prompts, responses, own.pad_id, own.settings.batch_size, temperature)
        other.release()
        with products_of(own.settings.arithmetic):
            return along_samples(own, other, samples)

    return Wanted(given_by, prompts, responses, compute)
