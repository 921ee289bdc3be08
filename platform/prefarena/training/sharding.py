"""A module whose parameters, gradients and optimizer state are spread over the workers (FSDP2).

Each worker keeps a part of every parameter; a decoder layer is whole only while it runs. The output embedding and the
head belong to the root, whose forward reads their weights. Gradients are spread in every backward pass, as they come:
what adds up over a step's passes is each worker's part.

With `resources.cpu_offload` the parts lie in the host's memory, gradients and the optimizer's moments with them: a
layer's weights are sent to the device when it runs, its gradients come back, and the optimizer moves on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.layers import decoder_layers
from prefarena.modeling.parts import own_part


def shard(
    module: nn.Module,
    world_size: int,
    device: torch.device,
    precision: Arithmetic,
    head: Arithmetic | None = None,
    *,
    offload: bool = False,
) -> nn.Module:
    """Return the module itself, its parameters now DTensors on `device`, in float32 whatever it computes in.

    head: what embedding, last norm and head compute in, where that is not `precision`. Gradients are summed in float32
    and averaged over the workers, as DDP does. offload: parameters and gradients are on the host.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    where = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=_policy(precision), offload_policy=where)
    fully_shard(module, mesh=mesh, mp_policy=_policy(head or precision), offload_policy=where)
    _compile_as_plain(module)
    return module


def _compile_as_plain(module: nn.Module) -> None:
    """Have the decoder layers compiled as if they were not sharded.

    Where torch.compile sees this mark of fully_shard, it takes integers of the modules, such as the size of a head, as
    unknown sizes like those of rows, and FlexAttention's kernel cannot be built for a head of unknown size
    (torch._dynamo.utils.is_int_specialization_case knows no sharded modules). Nothing else reads the mark, and a layer
    is whole while its compiled forward runs: FSDP's hooks are around it.
    """
    for layer in decoder_layers(module):
        for part in layer.modules():
            if hasattr(part, "_is_fsdp_managed_module"):
                part._is_fsdp_managed_module = False  # type: ignore[assignment]


def _policy(precision: Arithmetic) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bfloat16" else MixedPrecisionPolicy()


@torch.no_grad()
def clip_parts(parameters: Iterable[nn.Parameter], max_norm: float, add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip gradients whose parts lie on the host as `clip_grad_norm_` does. Returns their norm [] before, on the host.

    add_up: gives the sum over the workers of a tensor; what connects devices does not add up what is on the host.
    """
    parts = [own_part(one.grad) for one in parameters if one.grad is not None]
    norm = add_up(nn.utils.get_total_norm(parts).square()).sqrt().cpu()
    if parts:
        torch._foreach_mul_(parts, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def kept_on_rank_0(named_tensors: Iterable[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """Gather tensors one by one to rank 0's CPU; the other ranks take part in gathering and keep none."""
    return {name: tensor.detach().cpu() for name, tensor in named_tensors if rank == 0}
