"""A module whose parameters, gradients and optimizer state are spread over the workers (FSDP2).

Each worker keeps a part of every parameter; a decoder layer is whole only while it runs. The output embedding and the
head belong to the root, whose forward reads their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from prefarena.modeling.layers import decoder_layers

Model = TypeVar("Model", bound=nn.Module)


def shard(
    module: nn.Module, world_size: int, device: torch.device, precision: Literal["float32", "bfloat16"]
) -> nn.Module:
    """The module itself, its parameters now DTensors on `device`; in float32, whatever it computes in.

    Gradients are summed in float32 and averaged over the workers, as DDP does.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    halved = precision == "bfloat16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if halved else MixedPrecisionPolicy()
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def reduce_after_backward(module: nn.Module, reduce: bool) -> None:
    """Whether the next backward pass of a sharded module ends a step; before that gradients add up in each worker."""
    assert isinstance(module, FSDPModule)
    module.set_is_last_backward(reduce)
    module.set_requires_gradient_sync(reduce)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over the workers, as one on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this worker holds of a tensor; it shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of `own_part`: this worker's part of something that is spread as `tensor` is."""
    if not isinstance(tensor, DTensor) or part.ndim != tensor.ndim:
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@torch.no_grad()
def on_rank_0(model: Model, fresh: Callable[[], Model], rank: int) -> Model | None:
    """The trained model as a plain one on rank 0, None on the others; every worker calls it.

    `fresh` makes another of the same shape, which takes the weights where they are spread. One whole tensor at a time
    is on a device.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model if rank == 0 else None
    gathered: dict[str, Tensor] = {}
    for name, tensor in state.items():
        everything = whole(tensor)
        if rank == 0:
            gathered[name] = everything.cpu()
    if rank != 0:
        return None
    plain = fresh()
    plain.load_state_dict(gathered)
    return plain
