"""Adapters on their way to an engine: merged into the layers that they change, or as they are, for vLLM's own LoRA.

    python -m benchmarks.adapter_sync [--model FOLDER] [--rank N] [--updates N] [--prompts N] [--tokens N]

SmolLM2-135M-Instruct in float32 by default, on this machine's CPUs; `--model tiny` is a model of a few thousand
parameters. Two engines take the same adapters of all linear layers in turn and answer the same prompts: one is sent
merged layers, as training does it (generation/host_transfer.py), the other was started with `enable_lora` and reads the
adapters from a folder. What counts is the sum, because adapters that arrive sooner are applied again for every token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import cloudpickle
from transformers import PreTrainedModel

from prefarena.config import Generation, LoRA
from prefarena.generation.client import _environment
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import Sampling
from prefarena.modeling.endings import load_ends
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.modeling.lora import adapted_weights, add_adapters, merged_weights, save_adapter
from tests.helpers.real_model import smollm2
from tests.helpers.tiny import save_tiny_policy

MAX_LENGTH = 256
#: The numbers that vLLM takes for the largest rank.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
STEPS = ("merged: send", "merged: generate", "adapter: send", "adapter: generate")


class AdapterEngine:
    """vLLM with LoRA, set up as `generation.engine` does it but for that."""

    def __init__(self, path: str, rank: int, ends: tuple[int, ...]) -> None:
        from vllm import LLM

        options: dict[str, Any] = {"enable_lora": True, "max_loras": 1}
        options |= {"max_lora_rank": next(limit for limit in RANKS if limit >= rank)}
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "max_model_len": MAX_LENGTH}
        options |= {"skip_tokenizer_init": True, "generation_config": "vllm", "dtype": "float32", "seed": 0}
        options |= {"logprobs_mode": "processed_logprobs", "enforce_eager": True, "disable_log_stats": True}
        self._llm: Any = LLM(model=path, **options)
        self._ends = list(ends)
        self._adapter: Any = None

    def take(self, folder: str, number: int) -> None:
        """Use the adapters in this folder from now on."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(f"update-{number}", number, folder)
        self._llm.llm_engine.add_lora(self._adapter)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[list[int], list[float]]]:
        """Tokens of each response, and their log-probs."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        same: dict[str, Any] = {"logprobs": 0, "detokenize": False, "ignore_eos": True, "stop_token_ids": self._ends}
        same |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        params = [SamplingParams(seed=seed, **same) for seed in sampling.request_seeds(len(prompts))]
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        found = []
        for output in self._llm.generate(requests, params, use_tqdm=False, lora_request=self._adapter):
            [answer] = output.outputs
            logps = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            found.append((list(answer.token_ids), logps))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    for name, default in (("rank", 16), ("updates", 7), ("prompts", 32), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_policy(Path(folder) / "tiny") if args.model == "tiny" else args.model or smollm2()
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            compare(path, Path(folder), args)
        finally:
            ray.shutdown()


def compare(path: str, folder: Path, args: argparse.Namespace) -> None:
    """Give both engines each update and the same prompts, in turn, and print medians and ratios."""
    policy = load_policy(path)
    add_adapters(policy, LoRA(rank=args.rank), seed=0)
    vocabulary = policy.config.vocab_size
    prompts = [[1 + (7 * i + j) % (vocabulary - 1) for j in range(8)] for i in range(args.prompts)]
    merged, adapted = engines(path, args.rank)
    merged.sync(merged_weights(policy), "run@0")
    seconds: dict[str, list[float]] = {}
    alike, gaps = 0, [0.0]
    for update in range(1, args.updates + 2):
        change(policy, update)
        before, version, sampling = f"run@{update - 1}", f"run@{update}", Sampling(args.tokens, 1.0, seed=update)
        adapter = folder / f"adapter-{update}"
        began = [time.perf_counter()]
        merged.sync(merged_weights(policy, names=merged.layers_of(adapted_weights(policy), before)), version, before)
        began.append(time.perf_counter())
        rollouts = merged.generate(prompts, sampling, version)
        began.append(time.perf_counter())
        save_adapter(policy, path, adapter)
        ray.get(adapted.take.remote(str(adapter), update))
        began.append(time.perf_counter())
        answers = ray.get(adapted.generate.remote(prompts, sampling))
        began.append(time.perf_counter())
        if update == 1:  # compared whole, and the first of each engine
            continue
        for what, one, other in zip(STEPS, began[:-1], began[1:], strict=True):
            seconds.setdefault(what, []).append(other - one)
        for rollout, (tokens, logps) in zip(rollouts, answers, strict=True):
            if rollout.response_ids == tokens:
                alike += 1
                gaps += [abs(a - b) for a, b in zip(rollout.token_logps, logps, strict=True)]
    report(seconds, f"{path}: {args.updates} updates of rank {args.rank}, {args.prompts} x {args.tokens} tokens")
    share = alike / args.updates / args.prompts
    print(f"{share:.0%} of the responses are the same, and their log-probs within {max(gaps):.1e} nats")
    merged.stop()


def engines(path: str, rank: int) -> tuple[Generators, Any]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    settings = Generation()
    remote: Any = ray.remote(AdapterEngine).options(num_cpus=1, runtime_env={"env_vars": _environment(settings)})
    adapted = remote.remote(path, rank, load_ends(path, load_tokenizer(path)))
    merged = Generators.start(path, settings, MAX_LENGTH, use_gpu=False, names=("merged",), seed=0)
    return merged, adapted


def change(policy: PreTrainedModel, seed: int) -> None:
    """Give the adapters other numbers."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=random))


def report(seconds: dict[str, list[float]], title: str) -> None:
    print(title)
    for kind in ("send", "generate"):
        own, other = seconds[f"merged: {kind}"], seconds[f"adapter: {kind}"]
        print(f"{kind}: merged {_median(own)} s, adapter {_median(other)} s, adapter to merged {_ratio(own, other)}")
    both = [[a + b for a, b in zip(seconds[f"{way}: send"], seconds[f"{way}: generate"], strict=True)]
            for way in ("merged", "adapter")]  # fmt: skip
    print(f"both: merged {_median(both[0])} s, adapter {_median(both[1])} s, adapter to merged {_ratio(*both)}")


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _ratio(own: list[float], other: list[float]) -> str:
    """The median of the ratios of neighbours in time."""
    return f"{statistics.median(b / a for a, b in zip(own, other, strict=True)):.2f}"


if __name__ == "__main__":
    main()
