"""Weights that are still in their files: shapes stand in for them until each worker reads the rows that are its own.

Which tensor of which file a parameter comes from is written at the module that holds it. So it stays known when
adapters are put around that module, when the model becomes a role of a shared body, when it is copied, and when it is
spread over the workers. `fill` then reads, and no worker ever has a whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from prefarena.modeling.layers import decoder_layers
from prefarena.modeling.parts import like

Model = TypeVar("Model", bound=nn.Module)
#: In a module's own attributes: where each awaited parameter comes from, by the parameter's name.
_AWAITED = "_awaited_from"


@dataclass(frozen=True)
class Source:
    """A tensor in a safetensors file. where, name: of the model and of the tensor in it, as messages call them."""

    where: str
    name: str
    file: Path
    key: str

    def rows(self, first: int, stop: int) -> Tensor:
        # Each tensor opens the file anew: the pages of a mapped file count as the process's until it is closed.
        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_slice(self.key)[first:stop]
            return found

    def whole(self) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(self.key)
            return found


@dataclass
class Findings:
    """Errors in a worker's rows: how many numbers of each tensor are not finite, and which tied tensors differ."""

    not_finite: dict[tuple[str, str], int] = field(default_factory=dict)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    not_tied: set[str] = field(default_factory=set)


def await_from(module: nn.Module, name: str, sources: tuple[Source, ...]) -> None:
    """The module's parameter of this name, which has a shape alone, is in each of these places."""
    module.__dict__.setdefault(_AWAITED, {})[name] = sources


def is_awaited(module: nn.Module) -> bool:
    """Whether any parameter within the module has not been read yet."""
    return any(_AWAITED in part.__dict__ for part in module.modules())


def fill(module: nn.Module, part: int, num_parts: int, device: torch.device | str) -> Findings:
    """Read every awaited parameter of the module: the rows of each tensor that this part of `num_parts` holds.

    Rows are cut as FSDP2 cuts them. The parameters are new ones on `device`, of the kind that the shapes had; two names
    of one parameter stay that.
    """
    findings = Findings()
    fresh: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        awaited: dict[str, tuple[Source, ...]] = owner.__dict__.pop(_AWAITED, {})
        for name, sources in awaited.items():
            old = owner._parameters[name]
            assert old is not None
            fresh[id(old)] = _read(old, sources, part, num_parts, device, findings)
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if id(parameter) in fresh:
                owner._parameters[name] = fresh[id(parameter)]
    return findings


@torch.no_grad()
def _read(
    old: nn.Parameter, sources: tuple[Source, ...], part: int, num_parts: int, device: Any, findings: Findings
) -> nn.Parameter:
    num_rows = old.shape[0]
    size = -(-num_rows // num_parts)
    first, stop = min(part * size, num_rows), min((part + 1) * size, num_rows)
    local = torch.empty(stop - first, *old.shape[1:], dtype=old.dtype, device=device)
    for place, source in enumerate(sources):
        rows = source.rows(first, stop)
        wrong = 0 if _finite(rows) else int((~torch.isfinite(rows)).sum())
        if wrong:
            findings.not_finite[source.where, source.name] = wrong
            findings.sizes[source.where, source.name] = old.numel()
        if place == 0:
            local.copy_(rows.float())  # as it is when all of it is loaded: float32, whatever the model holds then
        elif not torch.equal(local.float().cpu(), rows.to(old.dtype).float()):
            findings.not_tied.add(source.where)
    return nn.Parameter(like(local, old), requires_grad=old.requires_grad)


def _finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN where any is; takes no memory
    return bool(torch.isfinite(low) and torch.isfinite(high))


def standing_in(model: Model) -> Model:
    """A model on which to test what the model computes: itself, or its first layers while its weights are awaited.

    Those are a copy, whole, up to the layer by which there is one of each kind.
    """
    if not is_awaited(model):
        return model
    twin = copy.deepcopy(model)
    cut = first_layers(twin)
    if cut is None:
        raise ValueError("a model whose layers cannot be told apart is loaded whole")
    layers, number = cut
    del layers[number:]
    fill(twin, 0, 1, "cpu")
    return twin


def first_layers(model: nn.Module) -> tuple[nn.ModuleList, int] | None:
    """The list of a model's decoder layers, and how many from the first on have one of each kind among them.

    None where they are not one list.
    """
    layers = decoder_layers(model)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and layers and [*part] == layers]
    if len(lists) != 1:
        return None
    named = list(getattr(getattr(model, "config", None), "layer_types", None) or [])
    kinds = [
        (tuple(type(part) for part in layer.modules()), *named[place : place + 1]) for place, layer in enumerate(layers)
    ]
    return lists[0], 1 + max(kinds.index(kind) for kind in set(kinds))


@contextmanager
def on_cpu_in_name(model: nn.Module) -> Iterator[None]:
    """Make awaited weights appear to be on the CPU, without memory, so that what is added to them is made there."""
    places = [
        (owner._parameters, name, parameter)
        for owner in model.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    stands: dict[int, nn.Parameter] = {}
    for parameters, name, parameter in places:
        empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        stands.setdefault(id(parameter), nn.Parameter(empty, requires_grad=parameter.requires_grad))
        parameters[name] = stands[id(parameter)]
    try:
        yield
    finally:
        for parameters, name, parameter in places:
            parameter.requires_grad_(stands[id(parameter)].requires_grad)
            parameters[name] = parameter


class AwaitedTensors(Mapping[str, Tensor]):
    """The tensors of an awaited model by their names, each read in float32 when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict(keep_vars=True)
        self._sources = {
            id(owner._parameters[name]): sources[0]
            for owner in model.modules()
            for name, sources in owner.__dict__.get(_AWAITED, {}).items()
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        source = self._sources.get(id(tensor))
        return tensor.detach() if source is None else source.whole().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
