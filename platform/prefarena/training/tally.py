"""FLOPs of a job, computed from its models' shapes and the tokens that passed through them, on all workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from prefarena.modeling.flops import Counts, count_model, flops_of
from prefarena.modeling.logprobs import LogProbs, PackedModel
from prefarena.modeling.roles import Role
from prefarena.settings.optimisation import LearnerSettings
from prefarena.training.worker import Worker


class Tally:
    """Counts what these modules compute from now on.

    modules: each a `PackedModel`, or a role whose module is one; what is anything else, such as the head of a judge
    that has no model, is left out, and so are modules that come up twice.
    """

    def __init__(self, modules: Iterable[object], settings: LearnerSettings, worker: Worker) -> None:
        found = (one.module if isinstance(one, Role) else one for one in modules)
        self._models = list({id(one): one for one in found if isinstance(one, PackedModel)}.values())
        self._settings, self._worker = settings, worker
        self._counts: dict[int, Counts] = {}
        for model in self._models:
            model.worked.forget()

    def take(self) -> float:
        """FLOPs of all workers since this was last asked; every worker calls it."""
        own = 0.0
        for model in self._models:
            counts, recomputed = self._counted(model), self._settings.activation_checkpointing
            own += flops_of(model.worked, counts, head=isinstance(model, LogProbs), recomputed=recomputed)
            model.worked.forget()
        total = torch.tensor([own], dtype=torch.float64, device=self._worker.device)
        return float(self._worker.sum(total))

    def _counted(self, model: PackedModel) -> Counts:
        if id(model) not in self._counts:
            lora = self._settings.lora if _has_adapters(model) else None
            self._counts[id(model)] = count_model(model.model.config, lora)
        return self._counts[id(model)]


def _has_adapters(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())
