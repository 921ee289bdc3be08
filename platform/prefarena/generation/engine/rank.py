"""Code that runs with the model in each of an engine's processes ("ranks"): receiving and reading back weights.

vLLM imports this module by its name in every rank, and mixes `RankTools` into its worker, so that the engine can call
these methods on all ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.models.utils import WeightsMapper

from prefarena.generation.checksums import ColumnSample, Piece, as_matrix, columns_of, piece_of, taken, within
from prefarena.generation.layout import Layout
from prefarena.generation.shared import SharedTensors

_PR_SET_PDEATHSIG = 1


class RankTools:
    """Methods that the engine calls on the worker of every rank."""

    def held_pieces(self, tensors: Mapping[str, Layout], sample: ColumnSample | None) -> dict[str, list[Piece]]:
        """The parts of the weights that this rank computes with, by their names in the state dict.

        Tensors that it does not show in a layout that is known are left out. sample: restricts them to some columns.
        """
        return _held_pieces(self.get_model(), tensors, sample)  # type: ignore[attr-defined]

    def layers(self, tensors: Mapping[str, Layout]) -> list[frozenset[str]]:
        """Names in the state dict of the tensors that go together, as one layer of the engine is made of them."""
        return _layers(self.get_model(), tensors)  # type: ignore[attr-defined]

    def heads_without_layer(self, tied: Collection[str]) -> set[str]:
        """The tied heads that the model has no layer for."""
        return _heads_without_layer(self.get_model(), tied)  # type: ignore[attr-defined]

    def end_with(self, parent: int) -> int:
        """Make the kernel end this process when `parent`, which started it, ends; returns this process's id.

        vLLM's workers notice a parent's end between two calls, and never while they wait for each other, or for
        weights, on a GPU: they would keep its memory.
        """
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return os.getpid()


# --------------------------------------------------------------------------------- reading weights back


class Held(NamedTuple):
    """A part of a tensor that a rank holds, by its name in the engine: rows from `first_row` on, of these columns.

    columns: None where it must be the whole tensor, as it is.
    """

    name: str
    part: Tensor
    first_row: int = 0
    columns: range | None = None

    def piece(self, whole: tuple[int, ...], sample: ColumnSample | None) -> Piece | None:
        """Return it as a piece of a tensor of this shape; None where it does not fit."""
        if self.columns is not None:
            return piece_of(self.part, whole, self.first_row, self.columns)
        if tuple(self.part.shape) != whole:
            return None
        matrix = as_matrix(self.part)
        columns = columns_of(sample, matrix.shape[1])
        return piece_of(taken(matrix, columns), whole, 0, columns)


@torch.no_grad()
def _held_pieces(
    model: nn.Module, tensors: Mapping[str, Layout], sample: ColumnSample | None
) -> dict[str, list[Piece]]:
    names = _state_names(model, tensors)
    packed = getattr(model, "packed_modules_mapping", {})
    pieces: dict[str, list[Piece]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if names.keys().isdisjoint(_held_names(path, module, packed)):
            continue  # reading a layer back costs a product
        for held in _held(path, module, packed, sample):
            for name in names.get(held.name, ()):
                piece = held.piece(tensors[name].held_shape, sample)
                if piece is not None:
                    pieces.setdefault(name, []).append(piece)
    return pieces


def _layers(model: nn.Module, tensors: Mapping[str, Layout]) -> list[frozenset[str]]:
    names = _state_names(model, tensors)
    packed = getattr(model, "packed_modules_mapping", {})
    found: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held_name in _held_names(path, module, packed):
            found.setdefault(id(module), set()).update(names.get(held_name, ()))
    return [frozenset(group) for group in found.values() if group]


def _held_names(path: str, module: nn.Module, packed: Mapping[str, list[str]]) -> list[str]:
    """Names in the engine of a module's own tensors, fused ones taken apart."""
    parent, _, leaf = path.rpartition(".")
    parts = packed.get(leaf, [leaf]) if isinstance(module, LinearBase) else [leaf]
    kinds = [kind for kind, _ in module.named_parameters(recurse=False)]
    return [".".join(filter(None, (parent, part, kind))) for kind in kinds for part in parts]


def _state_names(model: nn.Module, tensors: Mapping[str, Layout]) -> dict[str, list[str]]:
    """Names in the engine, layers that it fuses taken apart, to those in the state dict."""
    mapper = _mapper(model)
    merged = _heads_without_layer(model, [each.name for each in tensors.values() if each.tied_to and each.name])
    names: dict[str, list[str]] = {}
    for name, layout in tensors.items():
        stored = layout.tied_to if layout.name in merged else layout.name
        held_name = None if stored is None else mapper.map_name(stored)
        if held_name is not None:
            names.setdefault(held_name, []).append(name)
    return names


def _heads_without_layer(model: nn.Module, tied: Collection[str]) -> set[str]:
    modules, mapper = dict(model.named_modules(remove_duplicate=False)), _mapper(model)
    return {name for name in tied if (mapper.map_name(name) or "").rpartition(".")[0] not in modules}


def _mapper(model: nn.Module) -> WeightsMapper:
    """The mapper from names in a checkpoint to those in the engine, without the fusing of layers."""
    return replace(getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper(), orig_to_new_stacked={})


def _held(path: str, module: nn.Module, packed: Mapping[str, list[str]], sample: ColumnSample | None) -> Iterator[Held]:
    """A module's own tensors, fused ones taken apart into those that they were made of."""
    if isinstance(module, RoutedExperts):
        return  # in a layout of the kernel's own
    own = module.named_parameters(recurse=False)
    tensors: dict[str, Tensor] = {name: parameter for name, parameter in own if parameter.numel()}
    if isinstance(module, VocabParallelEmbedding):
        rows, columns = module.shard_indices, columns_of(sample, module.embedding_dim)
        weight = _read_back(module, columns) if isinstance(module, ParallelLMHead) else tensors["weight"]
        part = weight if isinstance(module, ParallelLMHead) else taken(weight, columns)
        yield Held(f"{path}.weight", part[: rows.num_org_elements], rows.org_vocab_start_index, columns)
    elif isinstance(module, LinearBase):
        yield from _held_by_linear(path, module, packed, tensors, sample)
    else:
        for name, parameter in tensors.items():
            yield Held(f"{path}.{name}", parameter)


def _held_by_linear(
    path: str, module: Any, packed: Mapping[str, list[str]], tensors: dict[str, Tensor], sample: ColumnSample | None
) -> Iterator[Held]:
    """The held parts of a linear layer, of which vLLM divides the inputs or the outputs among ranks."""
    cut_by_outputs = type(module) in (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
    cut_by_inputs = type(module) is RowParallelLinear
    if module.tp_size > 1 and not (cut_by_outputs or cut_by_inputs or type(module) is ReplicatedLinear):
        return  # in a way of its own
    first = module.tp_rank * module.input_size_per_partition if cut_by_inputs else 0
    inputs = getattr(module, "input_size_per_partition", module.input_size)
    columns = within(columns_of(sample, module.input_size), first, first + inputs)
    tensors["weight"] = _read_back(module, range(columns.start - first, columns.stop - first, columns.step))
    parent, _, leaf = path.rpartition(".")
    names = packed.get(leaf, [leaf])
    for kind, tensor in tensors.items():
        of_kind = columns if kind == "weight" else range(1)
        for name, part, first_row in _outputs(module, names, as_matrix(tensor), cut_by_outputs):
            yield Held(f"{parent}.{name}.{kind}", part, first_row, of_kind)


def _outputs(module: Any, names: list[str], tensor: Tensor, cut: bool) -> Iterator[tuple[str, Tensor, int]]:
    """A linear layer's weight or bias, of one rank, as rows of the tensors with these names that were fused in it.

    With each the row at which it begins. Key and value heads that are fewer than ranks are held by several. Of a
    checkpoint's tensor that is fused as it is (GPT-2's c_attn) a rank holds a stretch of each part.
    """
    if module.tp_size == 1 or not cut:
        sizes = module.output_partition_sizes if len(names) > 1 else [len(tensor)]
        yield from ((name, part, 0) for name, part in zip(names, tensor.split(sizes), strict=True))
        return
    begins = 0  # where a part begins in the tensor that it is of
    for place, part in enumerate(tensor.split(module.output_partition_sizes)):
        copies = module.num_kv_head_replicas if type(module) is QKVParallelLinear and place else 1
        yield names[place if len(names) > 1 else 0], part, begins + module.tp_rank // copies * len(part)
        if len(names) == 1:
            begins += len(part) * module.tp_size // copies


def _read_back(module: Any, columns: range) -> Tensor:
    """Read back these columns (inputs) of the weight [out, in] that a layer computes with.

    On CPU vLLM keeps it in a kernel's packed form, which nothing reads; the layer's outputs for the unit vectors are
    its columns, exactly (each is one product with 1 and sums of zeros).
    """
    if not hasattr(module, "cpu_linear"):
        return taken(module.weight, columns)
    if not columns:
        return torch.empty(sum(module.output_partition_sizes), 0, dtype=module.params_dtype)
    inputs = getattr(module, "input_size_per_partition", module.input_size)
    unit_vectors = torch.zeros(len(columns), inputs, dtype=module.params_dtype)
    unit_vectors[range(len(columns)), columns] = 1
    return module.quant_method.apply(module, unit_vectors, None).T


# ----------------------------------------------------------------------------- weights from host memory


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """The setup information of host transfers, which need none."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """An update's tensors: a state dict or a part of one, in this process's memory or in shared memory. Read only."""

    tensors: Mapping[str, Tensor] | SharedTensors


class TakesHostTensors(WeightTransferEngine[Any, Any]):
    """Lets a vLLM backend also take tensors from this machine's memory, within the same steps of an update.

    So a checkpoint can be loaded whichever way a trainer's weights come.
    """

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "tensors" not in update_info:
            return super().update_weights(update_info)
        given = HostUpdateInfo(**update_info).tensors
        tensors = given.open() if isinstance(given, SharedTensors) else given
        self.model.load_weights(iter(tensors.items()))  # type: ignore[operator]
        if self.device.type != "cpu":  # as the base class does, which does not know CPU
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[safe-super]
        if self.device.type == "cpu":
            _pack_experts(self.model)


class _LayerByLayer(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """The steps of an update that brings what a checkpoint holds, as vLLM's own backends have them."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        raise NotImplementedError("host tensors alone")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class HostTransferEngine(TakesHostTensors, _LayerByLayer):
    """The receiving side of `weight_sync: host`; for any device."""


class NCCLTransferEngine(TakesHostTensors, NCCLWeightTransferEngine):
    """The receiving side of `weight_sync: nccl`."""


class IPCTransferEngine(TakesHostTensors, IPCWeightTransferEngine):
    """The receiving side of `weight_sync: ipc`."""


#: vLLM's name of the backend for each `generation.weight_sync`.
BACKENDS = {"host": "prefarena-host", "nccl": "prefarena-nccl", "ipc": "prefarena-ipc"}
_ENGINES: dict[str, type[WeightTransferEngine]] = {
    "host": HostTransferEngine,
    "nccl": NCCLTransferEngine,
    "ipc": IPCTransferEngine,
}
for _kind, _backend in BACKENDS.items():
    WeightTransferEngineFactory.register_engine(_backend, _ENGINES[_kind])


def _pack_experts(model: nn.Module) -> None:
    """Bring the experts of a model into the layout of vLLM's CPU kernel, which vLLM does only when an engine starts.

    After an update it leaves the rows as they were sent, where the kernel reads packed ones
    (`UnquantizedFusedMoEMethod._setup_kernel`, vLLM 0.32).
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            kernel: Any = module.quant_method
            kernel.moe_kernel.fused_experts.process_weights_after_loading(module)
