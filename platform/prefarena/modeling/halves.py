"""A module that computes in bfloat16 copies of its float32 weights, as FSDP has each worker do.

A decoder layer's copies are made when it runs, again where it is recomputed, and all others when the module runs; they
live until the backward pass is done with them. Gradients reach the float32 weights in float32 and one by one, so DDP
reduces them while others are still computed, and passes add up in float32. Unlike under autocast, what goes from layer
to layer is in bfloat16 too, and what is halved does not depend on the operation: a model with bfloat16 weights computes
the very same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefarena.modeling.layers import Place, decoder_layers, put_around

#: A module, and the name of one of its parameters.
_Parameter = tuple[nn.Module, str]


def compute_in_halves(module: nn.Module) -> None:
    """Have the module compute in bfloat16 from its next call on; its parameters stay as they are."""
    layers = decoder_layers(module)
    within = {part for layer in layers for part in layer.modules()}
    for owner, parts in [(layer, [*layer.modules()]) for layer in layers] + [
        (module, [part for part in module.modules() if part not in within])
    ]:
        own = [(part, name) for part in parts for name, _ in part.named_parameters(recurse=False)]
        put_around(owner, Place.HALVED, partial(_halved, own))


def _halved(own: list[_Parameter], forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    with _copies_of(own):
        return forward(*arguments, **keywords)


@contextmanager
def _copies_of(own: list[_Parameter]) -> Iterator[None]:
    """Replace the modules' parameters by copies: one for each tensor, even if it has several names."""
    places: Any = [(part._parameters, name) for part, name in own]
    weights: list[Tensor] = [parameters[name] for parameters, name in places]
    copies = {weight: _copy(weight) for weight in weights if weight.dtype == torch.float32}
    try:
        for (parameters, name), weight in zip(places, weights, strict=True):
            parameters[name] = copies.get(weight, weight)
        yield
    finally:
        for (parameters, name), weight in zip(places, weights, strict=True):
            parameters[name] = weight


def _copy(weight: Tensor) -> Tensor:
    copy = weight.to(torch.bfloat16)
    # A compiled layer runs one graph, with gradients and without, which asks what has one.
    return copy if torch.is_grad_enabled() else copy.requires_grad_(weight.requires_grad)
