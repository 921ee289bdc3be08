"""The vLLM engine: the only module that imports vllm, and so the only one to change with its releases.

The engine runs inside the process that makes it (no engine process, no HTTP). New weights reach it through vLLM's own
weight-transfer interface: a backend for host memory is added here to those for NCCL and CUDA IPC, so the steps of an
update (start, receive, finish) are the same on every device. Import this module in a process of its own, whose
environment the actor has set: vLLM reads it when it is imported, and its CPU worker patches torch.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES
from vllm.inputs import TokensPrompt
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.models.utils import WeightsMapper

from prefarena.config import Generation
from prefarena.generation.interface import UpdateInfo
from prefarena.generation.layout import Layout
from prefarena.generation.weights import checksum


@dataclass(frozen=True)
class Sample:
    """One sampled response: ids with the one that ended it, and their log-probs (nats, at the sampling temperature)."""

    token_ids: list[int]
    token_logps: list[float]
    finished: bool


class Engine:
    """One model in vLLM, sampling token ids to token ids.

    top-p and top-k are off and log-probs are those of the distribution sampled from (`processed_logprobs`), so the
    trainer's log-probs at the same temperature are directly comparable. Each of `end_ids` ends a response, and is kept
    in it.
    """

    def __init__(
        self,
        model_path: str,
        generation: Generation,
        *,
        max_model_len: int,
        end_ids: Sequence[int],
        use_gpu: bool,
        seed: int,
    ) -> None:
        self.end_ids = tuple(end_ids)
        # Prefills are never cut (chunked prefill off, room for the longest): a cut one with a seeded request ends
        # vLLM's CPU engine.
        options: dict[str, Any] = {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, max_model_len),
        }
        if use_gpu:
            options["gpu_memory_utilization"] = generation.gpu_memory_utilization
        self._llm = LLM(
            model=model_path,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=generation.dtype_on(use_gpu),
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=generation.max_num_seqs,
            logprobs_mode="processed_logprobs",
            enforce_eager=not use_gpu,
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=generation.weight_sync),
            **options,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as the engine holds them."""
        return getattr(torch, str(self._llm.model_config.dtype).removeprefix("torch."))

    def generate(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Sample]:
        """One response of at most `max_tokens` per prompt, in order.

        `seeds`: one per prompt, so that what is sampled depends neither on the order nor on what shares its batch.
        """
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                seed=seed,
                logprobs=0,
                detokenize=False,
                ignore_eos=True,
                stop_token_ids=list(self.end_ids),
            )
            for seed in seeds
        ]
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return [
            _sample(output.outputs[0], self.end_ids) for output in self._llm.generate(requests, params, use_tqdm=False)
        ]

    # ------------------------------------------------------------------------------------------- weights

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer, as its side of vLLM's interface tells."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def disconnect(self) -> None:
        """Leave the trainer's transfer."""
        self._llm.shutdown_weight_transfer_engine()

    def start_update(self) -> None:
        """From here until `finish_update` the engine cannot generate."""
        self._llm.start_weight_update()

    def receive(self, update_info: UpdateInfo) -> None:
        """Weights by their transformers names: {"tensors": ...} from host memory, else as vLLM's backend has it."""
        self._llm.update_weights({"update_info": update_info})

    def finish_update(self) -> None:
        """Put the received weights to use, and forget what was computed with the old ones."""
        self._llm.finish_weight_update()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM could not reset its prefix cache after a weight update: requests were still running"
            )

    def held_checksums(self, tensors: Mapping[str, Layout]) -> dict[str, int]:
        """Checksums of the weights as the engine computes with them, by their names in the state dict.

        Tensors that the engine does not show in a layout that is known are left out.
        """
        [sums] = self._llm.apply_model(lambda model: _held_checksums(model, tensors))
        return sums

    def merged_heads(self, tied: Collection[str]) -> frozenset[str]:
        """The tied heads that the engine has no layer for (Gemma's), and refuses: its embedding takes their place.

        Where it has one, the head must be sent: it may hold a copy of its own.
        """
        [missing] = self._llm.apply_model(lambda model: _heads_without_layer(model, tied))
        return frozenset(missing)

    def model_building(self) -> AbstractContextManager[None]:
        """In it transformers can build a model in this process, where vLLM has put layers of its own in its place."""
        return set_current_vllm_config(self._llm.llm_engine.vllm_config)


def _sample(output: Any, end_ids: Sequence[int]) -> Sample:
    token_ids = list(output.token_ids)
    logps = [entry[token].logprob for entry, token in zip(output.logprobs, token_ids, strict=True)]
    return Sample(token_ids, logps, finished=token_ids[-1] in end_ids)


# --------------------------------------------------------------------------------- reading weights back


@torch.no_grad()
def _held_checksums(model: nn.Module, tensors: Mapping[str, Layout]) -> dict[str, int]:
    names = _state_names(model, tensors)
    packed = getattr(model, "packed_modules_mapping", {})
    sums: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held_name, held in _held(path, module, packed):
            for name in names.get(held_name, ()):
                layout = tensors[name]
                if tuple(held.shape) == layout.held_shape:
                    sums[name] = checksum(held.T if layout.transposed else held)
    return sums


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
    """From names in a checkpoint to those in the engine, without what fuses layers."""
    return replace(getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper(), orig_to_new_stacked={})


def _held(path: str, module: nn.Module, packed: Mapping[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors, fused ones taken apart into those that they were made of."""
    parent, _, leaf = path.rpartition(".")
    own = module.named_parameters(recurse=False)
    tensors: dict[str, Tensor] = {name: parameter for name, parameter in own if parameter.numel()}
    if isinstance(module, RoutedExperts):
        return  # in a layout of the kernel's own
    if isinstance(module, VocabParallelEmbedding):
        weight = _read_back(module, module.embedding_dim) if isinstance(module, ParallelLMHead) else tensors["weight"]
        yield f"{path}.weight", weight[: module.org_vocab_size]
    elif isinstance(module, LinearBase):
        tensors["weight"] = _read_back(module, module.input_size)
        names = packed.get(leaf, [leaf])
        sizes = module.output_partition_sizes if len(names) > 1 else [len(tensors["weight"])]
        for kind, tensor in tensors.items():
            for name, part in zip(names, tensor.split(sizes), strict=True):
                yield f"{parent}.{name}.{kind}", part
    else:
        for name, parameter in tensors.items():
            yield f"{path}.{name}", parameter


def _read_back(module: Any, num_inputs: int) -> Tensor:
    """The weight [out, in] that a layer computes with.

    On CPU vLLM keeps it in a kernel's packed form, which nothing reads; the layer's outputs for the unit vectors are
    its columns, exactly (each is one product with 1 and sums of zeros).
    """
    if not hasattr(module, "cpu_linear"):
        return module.weight
    unit_vectors = torch.eye(num_inputs, dtype=module.params_dtype)
    return module.quant_method.apply(module, unit_vectors, None).T


# ----------------------------------------------------------------------------- weights from host memory


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing has to be set up."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """tensors: a state dict, or a part of one, in host memory. It is not kept, nor written to."""

    tensors: Mapping[str, Tensor]


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """vLLM's receiving side for tensors that are handed over in this process's memory; for any device."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # as the base class does, which does not know CPU
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        self.model.load_weights(iter(update_info.tensors.items()))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_experts(self.model)

    def shutdown(self) -> None:
        pass


def _pack_experts(model: nn.Module) -> None:
    """Bring the experts of a model into the layout of vLLM's CPU kernel, which vLLM does only when an engine starts.

    After an update it leaves the rows as they were sent, where the kernel reads packed ones
    (`UnquantizedFusedMoEMethod._setup_kernel`, vLLM 0.32).
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            kernel: Any = module.quant_method
            kernel.moe_kernel.fused_experts.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine("host", HostWeightTransferEngine)


# ----------------------------------------------------------------- the trainer's side, between GPU memories


@dataclass
class StateDictSource(WeightSource):
    """The tensors of the update at hand, in one dtype, as vLLM's trainer side reads them."""

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
        num_engines: int,
        dtype: torch.dtype,
        address: str,
        sizes: Sequence[int],
    ) -> None:
        """sizes: elements of each tensor that an update holds."""
        self._source = StateDictSource(dtype)
        info = _trainer_init_info(backend, num_engines, address, [size * dtype.itemsize for size in sizes])
        self._transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """One whole update: start, the tensors, finish."""
        self._source.tensors = dict(named_tensors)
        self._transfer.send_weights()
        self._source.tensors = {}

    def close(self) -> None:
        self._transfer.shutdown()


def _trainer_init_info(
    backend: str, num_engines: int, address: str, sizes: Sequence[int]
) -> NCCLTrainerInitInfo | IPCTrainerInitInfo:
    """sizes: of the tensors, in bytes."""
    if backend == "ipc":
        # vLLM refuses a tensor that is larger than the buffer, as embeddings of 7B models are than its default; NCCL's
        # buffers grow. A small model needs no more than its own size.
        buffer = max(*sizes, min(sum(sizes), DEFAULT_PACKED_BUFFER_SIZE_BYTES))
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=buffer)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + num_engines)
