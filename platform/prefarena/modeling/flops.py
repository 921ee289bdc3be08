"""The FLOPs and bytes of a pass over a model, from the shapes of its weights only.

FLOPs are those of products of matrices, two for each multiplication that is added up; norms, activations and
embeddings are left out. They are linear in three numbers of a pass: its tokens, the pairs of a token and one that it
sees (attention), and the tokens that are scored (the head, which runs on those alone).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from prefarena.modeling.layers import decoder_layers, is_linear
from prefarena.modeling.lora import add_adapters
from prefarena.modeling.memory import on_shapes
from prefarena.modeling.passes import Pass, Worked, passed
from prefarena.settings.optimisation import LoRA

#: Of multiplying and adding, and of both products of attention (with keys, and with values).
_FLOPS, _ATTENTION = 2, 4


@dataclass(frozen=True)
class Counts:
    """Counts for a causal language model.

    parameters, trained: numbers, without and with adapters that are trained in their place. per_token, per_scored,
    per_visible: FLOPs of a forward pass. trained_per_token, trained_per_scored: those in products whose weights are
    trained. cached: numbers kept of each token for generation, keys and values of all layers.
    layers: how many there are.
    """

    parameters: int
    trained: int
    per_token: float
    per_scored: float
    per_visible: float
    trained_per_token: float
    trained_per_scored: float
    cached: int
    layers: int

    def forward(self, passed: Pass, *, head: bool = True) -> float:
        """FLOPs of a forward pass. head: whether it has the language model's head; a scalar head's are negligible."""
        scored = self.per_scored * passed.scored if head else 0.0
        return self.per_token * passed.tokens + self.per_visible * passed.visible + scored

    def training(self, passed: Pass, *, head: bool = True, recomputed: bool = False) -> float:
        """FLOPs of a forward and a backward pass: gradients of what goes through, and of the weights that are trained.

        recomputed: each layer runs forward once more in the backward pass.
        """
        forward = self.forward(passed, head=head)
        weights = self.trained_per_token * passed.tokens + self.per_visible * passed.visible
        weights += self.trained_per_scored * passed.scored if head else 0.0
        once_more = self.forward(passed, head=False) if recomputed else 0.0
        # Of a product that is not trained only one gradient is computed; attention has one of each side.
        return 2 * forward + weights + once_more


def flops_of(worked: Worked, counts: Counts, *, head: bool, recomputed: bool = False) -> float:
    """FLOPs of all passes over a model. head: whether it has the language model's head; see `Counts.training`."""
    trained = counts.training(worked.trained, head=head, recomputed=recomputed)
    return counts.forward(worked.scored, head=head) + trained


def generated(settings: PretrainedConfig, sizes: Iterable[tuple[int, int]]) -> float:
    """FLOPs of generating responses, each token once, since keys and values are kept. sizes: tokens of each prompt and
    of its response.
    """
    prompts, responses = np.array([*sizes], float).reshape(-1, 2).T
    return count_model(settings).forward(passed(prompts, responses[:, None]))


def count_model(settings: PretrainedConfig, lora: LoRA | None = None) -> Counts:
    """Count from the model's configuration; no weights are made. lora: adapters trained in place of the weights."""
    model: Any = on_shapes(lambda: AutoModelForCausalLM.from_config(settings))
    parameters = model.num_parameters()
    if lora is not None:
        on_shapes(lambda: add_adapters(model, lora, seed=0))
    head = model.get_output_embeddings()
    per_token = trained_per_token = 0.0
    for part in model.modules():
        if part is head:
            continue
        weights = [part.weight] if is_linear(part) else _experts(part)
        share = 1.0 if is_linear(part) else _share_of_experts(settings)
        per_token += _FLOPS * share * sum(one.numel() for one in weights)
        trained_per_token += _FLOPS * share * sum(one.numel() for one in weights if one.requires_grad)
    text = settings.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = len(decoder_layers(model)) or text.num_hidden_layers
    per_scored = float(_FLOPS * head.weight.numel())
    return Counts(
        parameters=parameters,
        trained=sum(one.numel() for one in model.parameters() if one.requires_grad),
        per_token=per_token,
        per_scored=per_scored,
        per_visible=float(_ATTENTION * heads * width * layers),
        trained_per_token=trained_per_token,
        trained_per_scored=per_scored if head.weight.requires_grad else 0.0,
        cached=2 * layers * width * (getattr(text, "num_key_value_heads", None) or heads),
        layers=layers,
    )


def _experts(part: nn.Module) -> list[nn.Parameter]:
    """Weights that hold all experts of a layer in one tensor, as transformers has them."""
    return [one for one in part.parameters(recurse=False) if one.dim() == 3]


def _share_of_experts(settings: PretrainedConfig) -> float:
    """The share of a layer's experts that a token goes through."""
    text = settings.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((getattr(text, name) for name in names if getattr(text, name, None)), 1)
    return (getattr(text, "num_experts_per_tok", None) or number) / number
