"""The trainer's side of vLLM's weight transfer between GPU memories."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES


@dataclass
class StateDictSource(WeightSource):
    """The tensors of the current update, in one dtype, as vLLM's trainer side reads them."""

    dtype: torch.dtype
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.detach().to(self.dtype)


class DeviceSender:
    """Sends state dicts from this process's GPU to the engines behind `client`.

    Over NCCL (`nccl`: engines on other GPUs, of any node) or CUDA IPC (`ipc`: one engine on the same GPU). Runs in one
    process of the trainer, which holds whole tensors.
    """

    def __init__(
        self,
        backend: str,
        client: VLLMWeightSyncClient,
        num_ranks: int,
        dtype: torch.dtype,
        address: str,
        sizes: Sequence[int],
    ) -> None:
        """num_ranks: those of all engines together. sizes: elements of each tensor that an update holds."""
        self._source = StateDictSource(dtype)
        info = _trainer_init_info(backend, num_ranks, address, [size * dtype.itemsize for size in sizes])
        self._transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send one whole update: start, the tensors, finish."""
        self._source.tensors = dict(named_tensors)
        self._transfer.send_weights()
        self._source.tensors = {}

    def close(self) -> None:
        self._transfer.shutdown()


def _trainer_init_info(
    backend: str, num_ranks: int, address: str, sizes: Sequence[int]
) -> NCCLTrainerInitInfo | IPCTrainerInitInfo:
    """The information with which vLLM's trainer side is set up. sizes: of the tensors, in bytes."""
    if backend == "ipc":
        # vLLM refuses a tensor that is larger than the buffer, as embeddings of 7B models are than its default; NCCL's
        # buffers grow. A small model needs no more than its own size.
        buffer = max(*sizes, min(sum(sizes), DEFAULT_PACKED_BUFFER_SIZE_BYTES))
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=buffer)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + num_ranks)
