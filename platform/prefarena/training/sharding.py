"""A module whose parameters, gradients and optimizer state are spread over the workers (FSDP2).

Each worker keeps a part of every parameter; a decoder layer is whole only while it runs. The output embedding and the
head belong to the root, whose forward reads their weights. Gradients are spread in every backward pass, as they come:
what adds up over a step's passes is each worker's part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.layers import decoder_layers


def shard(
    module: nn.Module,
    world_size: int,
    device: torch.device,
    precision: Arithmetic,
    head: Arithmetic | None = None,
) -> nn.Module:
    """The module itself, its parameters now DTensors on `device`; in float32, whatever it computes in.

    head: what embedding, last norm and head compute in, where that is not `precision`. Gradients are summed in float32
    and averaged over the workers, as DDP does.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=_policy(precision))
    fully_shard(module, mesh=mesh, mp_policy=_policy(head or precision))
    return module


def _policy(precision: Arithmetic) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bfloat16" else MixedPrecisionPolicy()


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def kept_on_rank_0(named_tensors: Iterable[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """Tensors that are made whole one by one, on rank 0's CPU; the others take part in making them and keep none."""
    return {name: tensor.detach().cpu() for name, tensor in named_tensors if rank == 0}
