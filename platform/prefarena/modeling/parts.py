"""Helpers for tensors that may be spread over several workers (DTensors) or not."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is spread over the workers, whole on each of them; return any other as it is.

    A part that lies on the host is gathered on the device, by what connects devices.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    own, device = tensor.to_local(), tensor.device_mesh.device_type
    return (tensor if own.device.type == device else _spread_as(own.to(device), tensor)).full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this worker holds; it shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of `own_part`: this worker's part of something that is spread as `tensor` is."""
    if not isinstance(tensor, DTensor) or part.ndim != tensor.ndim:
        return part
    return _spread_as(part, tensor)


def _spread_as(part: Tensor, tensor: DTensor) -> DTensor:
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
