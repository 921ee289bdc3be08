"""Part "platform" of benchmarks/gpu_acceptance.py: engines, new weights for them, a comparison. Needs Ray and vLLM."""

from __future__ import annotations

import gc
import importlib
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from acceptance import Check, Outcome, Setting

from prefarena.cluster.session import ray_session
from prefarena.config import Generation, load_config
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import Sampling
from prefarena.generation.trial import check_served
from prefarena.generation.weights import Verified
from prefarena.modeling.load import load_policy
from prefarena.records import Rollout
from prefarena.report.results import load_results
from prefarena.stages import read_manifest
from tests.helpers.chaos import Disturbed, Kill, differences, generating_span, run_folder, steps_lost, training_folders
from tests.helpers.chaos import write_config as write_comparison
from tests.helpers.families import (
    LARGEST_GAP,
    MAX_LENGTH,
    PROMPTS,
    expected_logps,
    given_logps,
    make,
    perturbed,
    process_for_engine,
    serve,
)

Kind = Literal["float32", "bfloat16"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16")
#: Of a GPU: the engine's memory, and what workers and actors are given where they share one.
_MEMORY, _SHARE = 0.3, 0.4
#: Heads of 64, as vLLM's kernels for GPUs have them.
_SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
#: Of the engines whose speed is measured, and what they are asked for; so many of the responses also alone.
_LARGER = {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2816,
    "num_hidden_layers": 12, "max_position_embeddings": 512,
}  # fmt: skip
_REQUESTS, _RESPONSE, _ALONE = 256, 128, 16
#: One PPO run on a language whose responses can all be listed.
_COMPARISON: dict[str, Any] = {
    "name": "acceptance",
    "task": {
        "kind": "language", "num_letters": 4, "num_prompts": 6, "prompt_letters": 2, "response_limit": 3,
        "num_demonstrations": 512, "num_pairs": 128, "num_test_pairs": 64,
    },
    "reference": {"training": {"num_steps": 60, "batch_size": 16, "learning_rate": 3e-3}},
    "entries": [
        {
            "name": "rlhf",
            "method": {
                "kind": "rlhf",
                "reward": {"kind": "gold"},
                "training": {
                    "num_iterations": 12, "rollouts_per_iteration": 64, "num_minibatches": 2, "checkpoint_every": 3,
                },
            },
        }
    ],
}  # fmt: skip
_ON_GPU = {
    "resources": {"use_gpu": True, "gpus_per_worker": _SHARE},
    "generation": {"gpus": _SHARE, "gpu_memory_utilization": _MEMORY, "weight_sync": "ipc"},
}


def here(_: Setting) -> dict[str, Any]:
    """Versions. vLLM's own version says whether it is built for CPUs."""
    return {"ray": ray.__version__, "vllm": importlib.import_module("vllm.version").__version__}


def tidy() -> None:
    gc.collect()


def new_folder(setting: Setting) -> Path:
    return Path(setting.scratch) / f"model-{uuid.uuid4().hex}"


# --------------------------------------------------------------------------------------------------------- engines


def engine(kind: Kind, setting: Setting, outcome: Outcome) -> None:
    """An engine starts, takes other weights from host memory and computes with them; wrong ones are noticed."""
    folder = new_folder(setting)
    old, new = make(folder, "llama", **({} if setting.tiny else _SIZES))
    generation = Generation(dtype=kind, gpu_memory_utilization=_MEMORY)
    with ray_session(), process_for_engine(generation, 0 if setting.tiny else 1) as call:
        served = call(serve, str(folder), new.state_dict(), generation, not setting.tiny)
    outcome.note("seconds to start", served.start_seconds)
    note_verified(served.verified, outcome)
    outcome.must(not served.unnoticed, f"wrong numbers went unnoticed in {', '.join(served.unnoticed)}")
    judge_gap(served.rollouts, new, old, kind, outcome)


def note_verified(verified: Verified | None, outcome: Outcome) -> None:
    assert verified is not None
    outcome.note("share of the weights that was read back and is what was sent", verified.share)
    outcome.must(verified.share == 1, str(verified))


def judge_gap(rollouts: list[Rollout], new: Any, old: Any, kind: Kind, outcome: Outcome) -> None:
    """An engine's log-probs beside those of transformers, in float32 and in the engine's own numbers."""
    given, expected = given_logps(rollouts), expected_logps(new, rollouts)
    gaps = (given - expected).abs()
    outcome.note("num_tokens", len(gaps))
    outcome.note("gap to transformers in float32, nats: mean, largest", [float(gaps.mean()), float(gaps.max())])
    if kind == "float32":
        outcome.at_most("largest gap, nats", float(gaps.max()), LARGEST_GAP)
    check_served(given, expected, expected_logps(old, rollouts), getattr(torch, kind))
    if kind == "bfloat16":
        own = (given - expected_logps(new.bfloat16(), rollouts)).abs()
        outcome.note("gap to transformers in bfloat16, nats: mean, largest", [float(own.mean()), float(own.max())])


def device_sync(backend: Literal["ipc", "nccl"], setting: Setting, outcome: Outcome) -> None:
    """A trainer's process sends weights from its GPU to an engine's, twice, and they are read back."""
    folder, kind = new_folder(setting), KINDS[1]
    old, new = make(folder, "llama", **_SIZES)
    share = _SHARE if backend == "ipc" else 1.0
    generation = Generation(dtype=kind, weight_sync=backend, gpus=share, gpu_memory_utilization=_MEMORY)
    with ray_session():
        fleet = Generators.start(str(folder), generation, MAX_LENGTH, True, ("acceptance",), seed=0)
        try:
            remote: Any = ray.remote(send_from_gpu)
            trainer = remote.options(num_gpus=share, num_cpus=0, max_retries=0)
            verified, rollouts = ray.get(trainer.remote(str(folder), fleet.names, generation), timeout=180)
        finally:
            fleet.stop()
    note_verified(verified, outcome)
    judge_gap(rollouts, perturbed(new, seed=2), old, kind, outcome)


def send_from_gpu(folder: str, names: tuple[str, ...], generation: Generation) -> tuple[Verified | None, list[Rollout]]:
    """In a trainer's process: two updates, and what the engine samples after the second."""
    policy, fleet = load_policy(folder), Generators.connect(names, generation)
    rollouts: list[Rollout] = []
    for update in (1, 2):
        policy = perturbed(torch.nn.Module.to(policy, "cpu"), seed=update)
        torch.nn.Module.to(policy, "cuda")
        fleet.sync(policy.state_dict().items(), f"acceptance@{update}")
        rollouts = fleet.generate(PROMPTS, Sampling(8, 1.0, seed=0), f"acceptance@{update}")
    return fleet.verified, rollouts


def sleep(setting: Setting, outcome: Outcome) -> None:
    """An engine that sleeps gives its memory back, and says the same when it wakes."""
    folder = new_folder(setting)
    make(folder, "llama", **_SIZES)
    with ray_session(), process_for_engine(Generation(), 1) as call:
        freed, before, after = call(sleep_and_wake, str(folder))
    outcome.note("given back while asleep, share of the card", freed)
    outcome.must(freed > _MEMORY / 2, f"asleep it gave back {freed:.2f} of the card, and it had taken {_MEMORY}")
    outcome.must(before == after, "awake again it says other tokens than before")


def sleep_and_wake(folder: str) -> tuple[float, list[list[int]], list[list[int]]]:
    """In an engine's process: the share of the card that a sleep frees, and greedy tokens before and after it."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=folder, skip_tokenizer_init=True, generation_config="vllm", dtype="bfloat16", max_model_len=MAX_LENGTH,
        gpu_memory_utilization=_MEMORY, enable_sleep_mode=True, seed=0,
    )  # fmt: skip
    params = SamplingParams(max_tokens=8, temperature=0.0, detokenize=False, ignore_eos=True)
    requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in PROMPTS]

    def tokens() -> list[list[int]]:
        return [list(each.outputs[0].token_ids) for each in llm.generate(requests, params, use_tqdm=False)]

    before, (free, total) = tokens(), torch.cuda.mem_get_info()
    llm.sleep(level=1)
    freed = torch.cuda.mem_get_info()[0] - free
    llm.wake_up()
    return freed / total, before, tokens()


def batch_invariant(setting: Setting, outcome: Outcome) -> None:
    """Whether what shares a batch changes a response, with `generation.batch_invariant` and without; and its price."""
    folder, seconds = new_folder(setting), {}
    make(folder, "llama", **_LARGER)
    with ray_session():
        for invariant in (False, True):
            generation = Generation(batch_invariant=invariant, gpu_memory_utilization=_MEMORY)
            with process_for_engine(generation, 1) as call:
                times, others = call(alone_and_together, str(folder), generation)
            title = "batch-invariant" if invariant else "as ever"
            seconds[invariant] = min(times)
            outcome.note(f"seconds for {_REQUESTS} responses of {_RESPONSE} tokens, {title}", times)
            outcome.note(f"of {_ALONE} responses alone, those that are others among {_REQUESTS}, {title}", others)
            outcome.must(not invariant or others == 0, f"{others} responses depend on what shares their batch")
    outcome.note("seconds batch-invariant, over those as ever", seconds[True] / seconds[False])


def alone_and_together(folder: str, generation: Generation, use_gpu: bool = True) -> tuple[list[float], int]:
    """In an engine's process: seconds of generating all responses together, and how many are others alone.

    A response is another one where a token or the last bit of a log-prob is.
    """
    from prefarena.generation.engine.engine import Engine, Sample

    limit = _LARGER["max_position_embeddings"]
    engine = Engine(folder, generation, max_model_len=limit, end_ids=(), use_gpu=use_gpu, seed=0)

    def sampled(requests: range) -> list[Sample]:
        prompts = [PROMPTS[request % len(PROMPTS)] * (1 + request % 16) for request in requests]
        return engine.generate(prompts, max_tokens=_RESPONSE, temperature=1.0, seeds=list(requests))

    sampled(range(_REQUESTS))  # kernels are compiled, graphs captured
    seconds, together = [], list[Sample]()
    for _ in range(3):
        began = time.perf_counter()
        together = sampled(range(_REQUESTS))
        seconds.append(time.perf_counter() - began)
    alone = [sampled(range(request, request + 1))[0] for request in range(_ALONE)]
    return seconds, sum(one != other for one, other in zip(alone, together, strict=False))


# ------------------------------------------------------------------------------------------------------ a comparison


def comparison(kills: bool, setting: Setting, outcome: Outcome) -> None:
    """PPO by the command `prefarena compare`, to the report; with `kills` its generation actor is killed in the middle.

    On a CPU both end in the same weights, rows and table, bit for bit; a GPU does not promise that.
    """
    folders = [Path(setting.scratch) / name for name in ("undisturbed", "disturbed")]
    config = write_comparison(_COMPARISON | ({} if setting.tiny else _ON_GPU), folders[kills])
    loaded = load_config(str(config), [])
    middle = sum(generating_span(loaded)) / 2
    run = Disturbed(config, [Kill("generation actor", middle)] if kills else [])
    try:
        run.run()
    finally:
        run.stop()
    results = load_results(run_folder(config))
    entry = results.entry("rlhf")
    outcome.note("seconds", run.seconds)
    outcome.must(not entry.failures, f"it failed: {entry.failures}")
    outcome.must((run_folder(config) / "report.md").exists(), "there is no report")
    outcome.note("row", {key: value for key, value in entry.seeds["0"].items() if isinstance(value, float)})
    outcome.note("weights_verified", read_manifest(training_folders(loaded)[-1]).get("weights_verified"))
    if not kills:
        return
    outcome.note("seconds from the kill until the run was further", run.kills[0].seconds)
    outcome.note("steps done again", steps_lost(training_folders(loaded)))
    undisturbed = folders[0] / config.name
    if (folders[0] / "runs").exists():
        found = differences(undisturbed, config)
        outcome.note("differences from the undisturbed run", found)
        outcome.must(not setting.tiny or not found, f"the disturbed run differs: {found}")


# ---------------------------------------------------------------------------------------------------- what needs what


def on_gpus(why: str) -> Callable[[Setting], str | None]:
    return lambda setting: why if setting.tiny else None


def no_second_gpu(setting: Setting) -> str | None:
    if setting.gpus < 2:
        return "--multi-gpu was not given"
    num_gpus = 0 if setting.tiny else torch.cuda.device_count()
    return None if num_gpus > 1 else f"NCCL joins two GPUs, and there are {num_gpus} here"


def unbuilt(_: Setting) -> str:
    return "no check of it takes GPUs yet; tests/integration/test_tensor_parallel.py runs it on a CPU"


_NO_KERNELS = "vLLM's batch-invariant kernels are Triton's: its engines for CPUs end in an error with them"
_QUEUED = "CUDA IPC needs a GPU; tests/integration/test_weight_transfer.py runs both sides with a queue in its place"
CHECKS = [
    *(Check(f"engine, host sync, log-probs, {kind}", partial(engine, kind), limit_s=420) for kind in KINDS),
    Check("IPC sync", partial(device_sync, "ipc"), on_gpus(_QUEUED), limit_s=420),
    Check("sleep and wake", sleep, on_gpus("vLLM's engines for CPUs have no memory of a GPU to give back"), 420),
    Check("batch-invariant engine, and its price", batch_invariant, on_gpus(_NO_KERNELS), 420),
    Check("a PPO comparison", partial(comparison, False), limit_s=900),
    Check("a PPO comparison whose generation actor is killed", partial(comparison, True), limit_s=900),
    Check("NCCL sync", partial(device_sync, "nccl"), no_second_gpu, limit_s=420),
    Check("tensor parallel generation", None, unbuilt),
]
