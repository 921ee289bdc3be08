"""The vLLM engine. The modules of this package alone import vllm, and change with its releases.

On one device the engine runs inside the process that makes it (no engine process, no HTTP). Over several devices this
process schedules, and each device has a process below it, a rank, with a part of every layer (vLLM's tensor
parallelism). New weights reach them through vLLM's own weight-transfer interface: a backend for host memory is added
in `rank.py` to those for NCCL and CUDA IPC, so the steps of an update (start, receive, finish) are the same on
every device. Import this module in a process of its own, whose environment the actor has set: vLLM reads it when it is
imported, and its CPU worker patches torch.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.inputs import TokensPrompt

from prefarena.config import Generation
from prefarena.generation.checksums import ColumnSample, whole_checksums
from prefarena.generation.engine import rank
from prefarena.generation.interface import UpdateInfo
from prefarena.generation.layout import Layout
from prefarena.generation.shared import shared

_logger = logging.getLogger(__name__)


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
            options["enable_sleep_mode"] = generation.sleep_mode != "none"
        self.num_ranks = generation.tensor_parallel
        if self.num_ranks > 1:
            options |= {"tensor_parallel_size": self.num_ranks, "distributed_executor_backend": "mp"}
        self._out_of_step = False
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
            weight_transfer_config=WeightTransferConfig(backend=rank.BACKENDS[generation.weight_sync]),
            worker_extension_cls=f"{rank.__name__}.{rank.RankTools.__name__}",
            **options,
        )
        if self.num_ranks > 1:
            self._end_with_ranks()

    def _end_with_ranks(self) -> None:
        """Make this process end when one of its ranks does, and the other ranks with it."""
        executor: Any = self._llm.llm_engine.model_executor
        processes = [worker.proc for worker in executor.workers]
        threading.Thread(target=_end_with, args=(processes,), daemon=True, name="end with ranks").start()
        self._llm.collective_rpc("end_with", args=(os.getpid(),))

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Call all ranks. If one of several raised in an earlier call, end this process instead.

        The others' answers to that call are still to come, and would be taken for answers to this one.
        """
        if self._out_of_step:
            _logger.error(
                "a rank of the engine raised an error in an earlier call, so the process ends and is restarted"
            )
            os._exit(1)
        self._out_of_step = self.num_ranks > 1
        yield
        self._out_of_step = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights as the engine holds them."""
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
        with self._in_step():
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        return [_sample(output.outputs[0], self.end_ids) for output in outputs]

    # ------------------------------------------------------------------------------------------- weights

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer, with the information that its side of vLLM's interface sent."""
        with self._in_step():
            self._llm.init_weight_transfer_engine({"init_info": init_info})

    def disconnect(self) -> None:
        """Leave the trainer's transfer."""
        with self._in_step():
            self._llm.shutdown_weight_transfer_engine()

    def start_update(self) -> None:
        """Start an update; until `finish_update` the engine cannot generate."""
        with self._in_step():
            self._llm.start_weight_update()

    def receive(self, update_info: UpdateInfo) -> None:
        """Take weights by their transformers names: {"tensors": ...} from host memory, else as vLLM's backend has it.

        Tensors in host memory are written once into memory that all ranks read.
        """
        with self._in_step():
            if self.num_ranks == 1 or "tensors" not in update_info:
                self._llm.update_weights({"update_info": update_info})
                return
            with shared(update_info["tensors"]) as told:  # type: ignore[call-overload]
                self._llm.update_weights({"update_info": {"tensors": told}})

    def finish_update(self) -> None:
        """Start using the received weights, and drop what was computed with the old ones."""
        with self._in_step():
            self._llm.finish_weight_update()
            if not self._llm.reset_prefix_cache():
                raise RuntimeError(
                    "vLLM could not reset its prefix cache after a weight update: requests were still running"
                )

    # -------------------------------------------------------------------------------------------- memory

    def sleep(self, level: int) -> None:
        """Free the memory of weights and cache: 1 keeps the weights on the host, 2 keeps nothing.

        vLLM's engines for CPUs go through the same states and keep all.
        """
        with self._in_step():
            self._llm.sleep(level=level)

    def wake(self, parts: Collection[str]) -> None:
        """Allocate the memory of these parts, "weights" or "kv_cache", again; the engine generates when it has both."""
        with self._in_step():
            self._llm.wake_up(sorted(parts))

    # ------------------------------------------------------------------------------------------- weights

    def held_checksums(self, tensors: Mapping[str, Layout], sample: ColumnSample | None = None) -> dict[str, int]:
        """Checksums of the weights as the engine computes with them, by their names in the state dict.

        Tensors that the engine does not show in a layout that is known are left out. sample: restricts them to some
        columns.
        """
        with self._in_step():
            ranks = self._llm.collective_rpc("held_pieces", args=(tensors, sample))
        return whole_checksums(ranks, {name: layout.held_shape for name, layout in tensors.items()}, sample)

    def layers(self, tensors: Mapping[str, Layout]) -> list[frozenset[str]]:
        """Groups of names in the state dict whose tensors can only be replaced together."""
        with self._in_step():
            [layers, *_] = self._llm.collective_rpc("layers", args=(tensors,))
        return layers

    def merged_heads(self, tied: Collection[str]) -> frozenset[str]:
        """The tied heads that the engine has no layer for (Gemma's), and refuses: its embedding takes their place.

        Where it has one, the head must be sent: it may hold a copy of its own.
        """
        with self._in_step():
            [missing, *_] = self._llm.collective_rpc("heads_without_layer", args=(tied,))
        return frozenset(missing)

    def model_building(self) -> AbstractContextManager[None]:
        """A context in which transformers can build a model in this process, where vLLM has replaced layers."""
        return set_current_vllm_config(self._llm.llm_engine.vllm_config)


def _sample(output: Any, end_ids: Sequence[int]) -> Sample:
    token_ids = list(output.token_ids)
    logps = [entry[token].logprob for entry, token in zip(output.logprobs, token_ids, strict=True)]
    return Sample(token_ids, logps, finished=token_ids[-1] in end_ids)


def _end_with(processes: Sequence[BaseProcess]) -> None:
    """End this process, and the others of these, as soon as one of them has ended.

    vLLM would end the others one after another, and its caller would wait for an answer that never comes: the actor is
    to be restarted, and comes back without weights.
    """
    connection.wait([process.sentinel for process in processes])
    for process in processes:
        process.kill()
    _logger.error("a rank of the engine ended, so the whole engine ends and is restarted")
    os._exit(1)
