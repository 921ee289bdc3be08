"""The memory that training will take, found out before it starts.

The forward and the backward pass of the largest micro-batch are run once with shapes in place of numbers (torch's fake
tensors): every tensor that the real pass will make is counted while it lives, whatever the model, the adapters and what
is recomputed. The weights, the gradients and the state of AdamW are counted beside them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from prefarena.modeling.arithmetic import halve
from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.layers import decoder_layers
from prefarena.modeling.logprobs import LogProbs, can_pack, sequence_logps
from prefarena.modeling.packing import pack

_Made = TypeVar("_Made")
#: The forward pass of a micro-batch, to its loss [].
Loss = Callable[[nn.Module], Tensor]
#: AdamW's two moments.
_MOMENTS = 2
#: Decoder layers that are whole at once while a sharded model runs: one at work, the next one on its way.
_WHOLE_LAYERS = 2


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes needed on one worker's device, and in its host's memory.

    activations: what the passes hold at their peak beyond the rest, gradients under way too. host: in the host's
    memory, what is offloaded there.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Spread:
    """The number of workers that a model is spread over, and whether their parts lie on the host."""

    num_parts: int = 1
    offloaded: bool = False

    def __bool__(self) -> bool:
        return self.num_parts > 1 or self.offloaded


_WHOLE = Spread()


def training_memory(
    module: nn.Module,
    losses: Iterable[Loss],
    *,
    bfloat16: bool = False,
    accumulates: bool = True,
    spread: Spread = _WHOLE,
) -> MemoryNeed | None:
    """Most memory that a training step takes, over `losses`; nothing is computed, and `module` stays as it is.

    bfloat16: whether that is what it computes in; copies of weights are counted while they live. accumulates: whether a
    step has several micro-batches, so that gradients exist while one is run. spread: of weights, gradients and
    optimizer state. None where shapes depend on numbers, as in a mixture of experts.
    """
    weights = size_of(module.parameters()) + size_of(module.buffers())
    trained = size_of(parameter for parameter in module.parameters() if parameter.requires_grad)
    try:
        # A sharded module's whole weights are counted apart; it holds halves while it computes.
        halved = None if not bfloat16 else halve if spread else compute_in_halves
        # Spread gradients are counted apart, too: those under way are a few layers'.
        passes = max(_peak_of_pass(module, loss, halved, accumulates or bool(spread)) for loss in losses)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        return None
    if not spread:
        gradients = trained if accumulates else 0
        step = trained  # gradients are all there when the optimizer moves, and activations are not
        return MemoryNeed(weights, step, _MOMENTS * trained, max(passes - (step - gradients), 0))
    gathered = _gathered(module, bfloat16)
    part, own = weights // spread.num_parts, trained // spread.num_parts
    if spread.offloaded:
        return MemoryNeed(gathered, 0, 0, passes + gathered, host=part + (1 + _MOMENTS) * own)
    return MemoryNeed(part + gathered, own, _MOMENTS * own, passes + gathered)


def with_models(need: MemoryNeed, module: nn.Module, number: int, spread: Spread = _WHOLE) -> MemoryNeed:
    """Add the memory of so many frozen models of the module's size, without adapters, spread as it is."""
    plain = size_of(one for name, one in module.named_parameters() if "lora_" not in name)
    more = number * (plain // spread.num_parts)
    if spread.offloaded:
        return replace(need, host=need.host + more)
    return replace(need, weights=need.weights + more)


def sum_of_pass(module: nn.Module, prompt: int, responses: Sequence[int], number: int) -> Tensor:
    """The sum of what a module gives, [], in one pass of `number` prompts of `prompt` tokens, each with its responses.

    responses: tokens of each. The module is a `LogProbs`, or one of the heads, which give a number for each response.
    """
    prompts = [np.zeros(prompt, dtype=np.int32)] * number
    answers = [[np.zeros(size, dtype=np.int32) for size in responses]] * number
    if isinstance(module, LogProbs):
        return sequence_logps(module, prompts, answers)[0].sum()
    return module(pack(prompts, answers, shared=can_pack(module))).sum()


def on_shapes(make: Callable[[], _Made]) -> _Made:
    """Call `make` with shapes in place of weights: its result takes no memory, and nothing can be computed with it."""
    with torch.device("meta"):
        return make()


def size_of(tensors: Iterable[Tensor]) -> int:
    """The number of bytes that these tensors take."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _gathered(module: nn.Module, bfloat16: bool) -> int:
    """Bytes of the weights that are whole at once in a sharded model: what belongs to no layer, and a few layers."""
    layers = [_computed_in(layer, bfloat16) for layer in decoder_layers(module)]
    return _computed_in(module, bfloat16) - sum(layers) + sum(sorted(layers)[-_WHOLE_LAYERS:])


def _computed_in(module: nn.Module, bfloat16: bool) -> int:
    """Bytes of the weights in the dtype in which products are computed."""
    return sum(one.numel() * (2 if bfloat16 else one.itemsize) for one in module.parameters())


def _peak_of_pass(module: nn.Module, loss: Loss, halved: Callable[[nn.Module], None] | None, accumulates: bool) -> int:
    """Most bytes that one forward and backward pass holds beyond weights, and gradients where they exist before it.

    halved: the wrapper that makes the module compute in half precision.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    if any(parameter.is_meta for parameter in module.parameters()):
        twin = copy.deepcopy(module)
        with fake:
            twin.to_empty(device="cpu")
    else:
        with FakeCopyMode(fake):
            twin = copy.deepcopy(module)
    _experts_one_by_one(twin)
    with fake:
        if halved is not None:
            halved(twin)
        if accumulates:
            for parameter in twin.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        held = [*twin.parameters(), *twin.buffers(), *(p.grad for p in twin.parameters() if p.grad is not None)]
        count = _Living(held)
        with count:
            loss(twin).backward()
    return count.peak


def _experts_one_by_one(module: nn.Module) -> None:
    """Make experts run in turn: torch's grouped product refuses float32 where there are shapes alone."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.config._experts_implementation == "grouped_mm":
            part.set_experts_implementation("eager")


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live. `held` were there before."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(tensor.untyped_storage()) for tensor in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:  # made in place, or another view
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        weakref.finalize(storage, self._forget, id(storage), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.now -= size
