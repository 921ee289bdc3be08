"""A model's decoder layers: the units in which it is recomputed and sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefarena.errors import UserError


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of every transformers model within `module`, in order; none where they cannot be told apart."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def recompute_layers(module: nn.Module) -> None:
    """Keep each decoder layer's input alone for the backward pass, which runs the layer once more.

    transformers' own switch acts only on layers that are in training mode, and some layers then drop activations out;
    models are trained in evaluation mode here, so each layer's forward is wrapped instead. Raises UserError where there
    are no layers.
    """
    layers = decoder_layers(module)
    if not layers:
        raise UserError(
            "training.activation_checkpointing: this kind of model has no layers that transformers can recompute; set "
            "it to false"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    # No layer draws random numbers, so their state need not be kept.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
