"""Decoder layers on a GPU, each compiled whole: norms, rotary embeddings, gates and residuals in a few kernels.

One operation at a time they cost a step more than its matrix products. A layer's graph holds its attention too
(`flex_trees.py`). All layers of a class share their graphs, and these serve rows of every length. On a CPU layers run
as they are: measured there, nothing was won.

A pass without gradients runs the graph of one with them: what a fused kernel keeps in float32 depends on what it has to
leave for the backward pass, and two graphs of the same layer would differ in their last bits. So the reference's
log-probs are exactly those of a policy that has its weights, and there is half as much to compile. What the graph
leaves for a backward pass lives until the layer ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from prefarena.modeling.flex_trees import compiled_whole
from prefarena.modeling.layers import Place, decoder_layers, put_around, take_off_wrappers
from prefarena.modeling.packing import pack
from prefarena.modeling.support import body_keywords

#: Tokens of a prompt and of each response that layers are tried on: their row has several blocks, as most have.
_TRIED = 50
#: A layer's inputs: what its forward takes by place, and by name.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def compile_layers(model: nn.Module) -> None:
    """Have each decoder layer run compiled on a GPU, from its next call on."""
    for layer in decoder_layers(model):
        put_around(layer, Place.COMPILED, _fused)


def why_not_compiled(model: PreTrainedModel, device: torch.device, kind: torch.dtype, packed: bool) -> str | None:
    """Say why its layers cannot be compiled for this GPU; None where they can, and where it has no layers.

    They are tried, forward and backward: one of each kind, moved to the device in numbers of `kind`, on a short batch.
    The inputs of a layer are found by running the model, wherever it is, up to that layer.
    """
    layers = decoder_layers(model)
    if not layers:
        return None
    keywords = body_keywords(pack([[1] * _TRIED] * 2, [[[1] * _TRIED] * 2] * 2, shared=packed, device=device))
    inputs = _layer_inputs(model, layers[0], keywords)
    own = model.config.get_text_config()
    kinds = getattr(own, "layer_types", None) or [""] * len(layers)
    one_of_each = {(type(layer), name): layer for layer, name in zip(layers, kinds, strict=False)}
    for layer in one_of_each.values():
        try:
            twin = copy.deepcopy(layer).to(device, kind)
            take_off_wrappers(twin)
            _try(twin, _moved(inputs, device, kind, keywords))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # whatever goes wrong in compiling arrives as one
            return str(error).strip().splitlines()[0]
    return None


def _try(layer: nn.Module, inputs: Inputs) -> None:
    (hidden, *others), keywords = inputs
    out = _fused(layer.forward, hidden.requires_grad_(), *others, **keywords)
    (out if isinstance(out, Tensor) else out[0]).sum().backward()


class _ReachedError(Exception):
    """Signals that the model has reached the layer, whose inputs are now known."""


@torch.no_grad()
def _layer_inputs(model: PreTrainedModel, layer: nn.Module, keywords: dict[str, Any]) -> Inputs:
    found: list[Inputs] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((arguments, named))
        raise _ReachedError

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    there = tree_map_only(Tensor, lambda tensor: tensor.to(model.device), keywords)
    try:
        model.base_model(**there)
    except _ReachedError:
        return found[0]
    finally:
        hook.remove()
    raise AssertionError("a model's layers are part of its forward pass")


def _moved(inputs: Inputs, device: torch.device, kind: torch.dtype, keywords: dict[str, Any]) -> Inputs:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, kind if tensor.is_floating_point() else None)

    arguments, named = tree_map_only(Tensor, moved, inputs)
    return arguments, named | ({"trees": keywords["trees"]} if "trees" in keywords else {})


def _fused(forward: Any, hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """Run `forward`, a layer's own method, on its inputs."""
    if not _on_gpu(hidden):
        return forward(hidden, *arguments, **keywords)
    layer, call = forward.__self__, _compiled(forward.__func__)
    if torch.is_grad_enabled():
        return call(layer, hidden, *arguments, **keywords)
    with torch.enable_grad():
        out = call(layer, hidden.detach().requires_grad_(), *arguments, **keywords)
    return tree_map_only(Tensor, Tensor.detach, out)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled method of a class, whose graphs all layers of the class share."""
    return compiled_whole(function)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
