"""Several models on one frozen body: each role has its own adapters, or none, and a head.

PPO holds a policy, a reference, a critic and a reward model. Where adapters are trained, all four differ from the base
model by little, and one copy of it serves them all (Hydra-RLHF, arXiv 2309.00754): before a role computes, its adapters
are switched on and those of the other roles off. A role without adapters is the base model: the reference.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prefarena.modeling.logprobs import PackedModel
from prefarena.modeling.lora import adapter_parameters, use_adapter


class SharedBody(nn.Module):
    """Modules by role, whose transformers models have the same body. It is distributed as one module."""

    def __init__(self, roles: dict[str, PackedModel]) -> None:
        super().__init__()
        self.roles = nn.ModuleDict(roles)

    def forward(self, role: str, *arguments: Any) -> Any:
        """Return what the module of a role gives, with its own adapters."""
        module = self.roles[role]
        use_adapter(module, role)
        return module(*arguments)


class Role(nn.Module):
    """One of the models of a `SharedBody`, called as its own module would be."""

    def __init__(self, name: str, body: SharedBody) -> None:
        super().__init__()
        self.name, self.body = name, body

    def forward(self, *arguments: Any) -> Any:
        return self.body(self.name, *arguments)

    @property
    def module(self) -> PackedModel:
        module = self.body.roles[self.name]
        assert isinstance(module, PackedModel)
        return module

    @property
    def notes(self) -> list[str]:
        return self.module.notes

    @property
    def packed(self) -> bool:
        return self.module.packed

    @property
    def model(self) -> PreTrainedModel:
        return self.module.model

    def trained(self) -> dict[str, nn.Parameter]:
        """The role's adapters, and its head where it is not the body's."""
        score = getattr(self.model, "score", None)
        head = {} if score is None else {f"score.{name}": one for name, one in score.named_parameters()}
        return adapter_parameters(self.model, self.name) | head
