"""A model's decoder layers: the units in which it is compiled, halved, recomputed and sharded."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefarena.errors import UserError

#: What a module's forward is called through: the forward within comes first, before its own arguments.
Wrapper = Callable[..., Any]


class Place(IntEnum):
    """The place of a wrapper, innermost first: the compiled layer takes halved weights, and both are recomputed."""

    COMPILED = 0
    HALVED = 1
    RECOMPUTED = 2


class Around:
    """A module's own forward with wrappers around it.

    The module is known by its own bound method alone, so that a copy of a model is a model of its own.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.wrappers: dict[Place, Wrapper] = {}

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        forward = self.own
        for place in sorted(self.wrappers):
            forward = partial(self.wrappers[place], forward)
        return forward(*arguments, **keywords)


def put_around(module: nn.Module, place: Place, wrapper: Wrapper) -> None:
    """Call the module's forward through `wrapper` from now on, replacing a wrapper that is already in this place."""
    if not isinstance(module.forward, Around):
        module.forward = Around(module.forward)  # type: ignore[method-assign]
    module.forward.wrappers[place] = wrapper


def take_off_wrappers(module: nn.Module) -> None:
    """Remove all wrappers, so that the module and all within it run as originally."""
    for part in module.modules():
        if isinstance(part.forward, Around):
            del part.forward


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of every transformers model within `module`, in order; none where they cannot be told apart."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one product with a weight, GPT-2's kind included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def recompute_layers(module: nn.Module) -> None:
    """Keep only each decoder layer's input for the backward pass, which runs the layer again.

    transformers' own switch acts only on layers that are in training mode, and some layers then drop activations out;
    models are trained in evaluation mode here, so each layer's forward is wrapped instead. Raises UserError where there
    are no layers.
    """
    layers = decoder_layers(module)
    if not layers:
        raise UserError(
            "training.activation_checkpointing: transformers cannot recompute the layers of this kind of model; set "
            "it to false"
        )
    for layer in layers:
        put_around(layer, Place.RECOMPUTED, _recomputed)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    # No layer draws random numbers, so their state need not be kept.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
