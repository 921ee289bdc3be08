"""The vLLM engine: the only module that imports vllm, and so the only one to change with its releases.

The engine runs inside the process that makes it (no engine process, no HTTP), so weights are handed over in memory on
any device. Import this module in a process of its own, whose environment the actor has set: vLLM reads it when it is
imported, and its CPU worker patches torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from prefarena.config import Generation


@dataclass(frozen=True)
class Sample:
    """One sampled response: ids with the eos that ended it, and their log-probs (nats, at the sampling temperature)."""

    token_ids: list[int]
    token_logps: list[float]
    finished: bool


class Engine:
    """One model in vLLM, sampling token ids to token ids.

    top-p and top-k are off and log-probs are those of the distribution sampled from (`processed_logprobs`), so the
    trainer's log-probs at the same temperature are directly comparable. `eos_id` ends a response and is kept in it.
    """

    def __init__(
        self, model_path: str, generation: Generation, *, max_model_len: int, eos_id: int, use_gpu: bool, seed: int
    ) -> None:
        self.eos_id = eos_id
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
            dtype=generation.dtype,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=generation.max_num_seqs,
            logprobs_mode="processed_logprobs",
            enforce_eager=not use_gpu,
            disable_log_stats=True,
            **options,
        )

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
                stop_token_ids=[self.eos_id],
            )
            for seed in seeds
        ]
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return [
            _sample(output.outputs[0], self.eos_id) for output in self._llm.generate(requests, params, use_tqdm=False)
        ]

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, in memory: a whole transformers state dict, a tied `lm_head.weight` included."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(tensors))})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM could not reset its prefix cache after a weight update: requests were still running"
            )


def _sample(output: Any, eos_id: int) -> Sample:
    token_ids = list(output.token_ids)
    logps = [entry[token].logprob for entry, token in zip(output.logprobs, token_ids, strict=True)]
    return Sample(token_ids, logps, finished=token_ids[-1] == eos_id)
