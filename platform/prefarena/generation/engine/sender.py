"""The trainer's side of vLLM's weight transfer between GPU memories."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from prefarena.generation.shared import DEVICE_BUCKET_BYTES


@dataclass
class StateDictSource(WeightSource):
    """The tensors of the current update, in one dtype, as vLLM's trainer side reads them.

    They are asked for one by one while they are sent, so no more of them exist than are packed together.
    """

    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self.dtype, shape) for name, shape in self.shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            yield name, tensor.detach().to(self.dtype)
            del tensor


class DeviceSender:
    """Sends state dicts from this process's GPU to the engines behind `client`.

    Over NCCL (`nccl`: engines on other GPUs, of any node) or CUDA IPC (`ipc`: one engine on the same GPU). Runs in one
    process of the trainer, to which tensors come whole.
    """

    def __init__(
        self,
        backend: str,
        client: VLLMWeightSyncClient,
        num_ranks: int,
        dtype: torch.dtype,
        address: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """num_ranks: those of all engines together. shapes: of the tensors that every update holds, in their order."""
        self._source = StateDictSource(dtype, shapes)
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes.values()]
        info = _trainer_init_info(backend, num_ranks, address, sizes)
        self._transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send one whole update: start, the tensors, finish. Each tensor is asked for when it is packed."""
        self._source.tensors = named_tensors
        self._transfer.send_weights()
        self._source.tensors = ()

    def close(self) -> None:
        self._transfer.shutdown()


def _trainer_init_info(
    backend: str, num_ranks: int, address: str, sizes: list[int]
) -> NCCLTrainerInitInfo | IPCTrainerInitInfo:
    """The information with which vLLM's trainer side is set up. sizes: of the tensors, in bytes."""
    if backend == "ipc":
        # vLLM refuses a tensor that is larger than the buffer, as embeddings of 7B models are than its default; NCCL's
        # buffers grow. A small model needs no more than its own size.
        buffer = max(*sizes, min(sum(sizes), DEVICE_BUCKET_BYTES))
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=buffer)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(
        rank=0,
        master_address=address,
        master_port=port,
        world_size=1 + num_ranks,
        packed_buffer_size_bytes=DEVICE_BUCKET_BYTES,
    )
