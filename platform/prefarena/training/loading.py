"""How a worker gets its models: whole, or, where they are spread over workers, as shapes whose rows are read later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prefarena.config import ClassifierJudge, FunctionJudge, RewardModel
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.silence import CountedJudge
from prefarena.judges.spec import Judge, JudgeSpec, load_judge, usage_of
from prefarena.judges.usage import total_costs
from prefarena.modeling.arithmetic import Arithmetic, halve_products
from prefarena.modeling.load import load_policy, load_reward_model, new_reward_model
from prefarena.modeling.shapes_first import (
    WholeOnlyError,
    new_reward_model_shapes,
    policy_shapes,
    reward_model_shapes,
)
from prefarena.training.worker import Worker


@dataclass(frozen=True)
class Loader:
    """The models of one worker's job. Raises UserError where one cannot be loaded."""

    worker: Worker

    def policy(self, path: str | Path) -> PreTrainedModel:
        return self._load(path, lambda: policy_shapes(path), lambda: load_policy(path))

    def reward_model(self, path: str | Path) -> PreTrainedModel:
        return self._load(path, lambda: reward_model_shapes(path), lambda: load_reward_model(path))

    def new_reward_model(self, policy: str | Path, seed: int) -> PreTrainedModel:
        return self._load(policy, lambda: new_reward_model_shapes(policy, seed), lambda: new_reward_model(policy, seed))

    def _load(
        self, path: str | Path, shapes: Callable[[], PreTrainedModel], whole: Callable[[], PreTrainedModel]
    ) -> PreTrainedModel:
        if not self.worker.shards:
            return whole()
        try:
            return shapes()
        except WholeOnlyError as error:
            self.worker.stage_log.fault("loaded_whole", f"every worker loads all of {path} at first: {error}")
            return whole()

    def judge(self, spec: JudgeSpec, batch_size: int, *, limited: bool = True) -> Judge:
        """A judge on this worker; a reward model is spread where models are, and every worker then scores with it.

        limited: more silent rows than the settings of a function or a classifier allow are an error.
        """
        if not (self.worker.shards and isinstance(spec.settings, RewardModel) and spec.path is not None):
            judge = load_judge(spec, batch_size, self.worker.device)
            if spec.may_be_silent and isinstance(spec.settings, FunctionJudge | ClassifierJudge):
                return CountedJudge(judge, spec.settings, limited=limited)
            return judge
        return self.spread_reward_model(spec.path, spec.arithmetic, batch_size)

    def calls_of(self, judge: Judge) -> dict[str, int]:
        """Calls that all workers of this attempt made to an endpoint; empty for other judges."""
        own = total_costs([usage_of(judge)])
        if not own:
            return {}
        sums = self.worker.sum(torch.tensor(list(own.values()), dtype=torch.float64, device=self.worker.device))
        return {name: int(number) for name, number in zip(own, sums, strict=True)}

    def spread_reward_model(self, path: str, arithmetic: Arithmetic, batch_size: int = 64) -> RewardModelJudge:
        judge = RewardModelJudge.of(self.reward_model(path), batch_size, arithmetic, self.worker.device)
        if arithmetic == "bfloat16":  # sharded layers halve themselves; what is frozen may be held so
            halve_products(judge.head.requires_grad_(False))
        self.worker.place(judge.head, arithmetic, head="float32")
        return judge
