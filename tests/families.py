"""Which model families an engine takes new weights of: `python tests/families.py [FAMILY...]` prints a table.

Each family gets a tiny random model and an engine, one after another. The engine is sent other weights than it was
started with, samples, and its log-probs are held against those of transformers.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from transformers import PreTrainedModel

from prefarena.config import Generation
from prefarena.generation.actor import GenerationActor, _environment
from prefarena.generation.interface import Sampling, WeightMismatchError
from prefarena.generation.weights import Verified, as_arrays, checksums
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, collate, token_logps
from prefarena.modeling.support import why_not_packed
from prefarena.records import Rollout
from tests.models import random_model, save_model
from tests.tiny import BOS, FIRST_LETTER

#: As the table calls them, and as tests.models does.
TABLE = {
    "Llama": "llama", "GPT-2": "gpt2", "GPT-NeoX (Pythia)": "gpt-neox", "Gemma-2": "gemma2", "Gemma-3 (text)": "gemma3",
    "OLMo-2": "olmo2", "Qwen-2": "qwen2", "Qwen-3": "qwen3", "Phi-3": "phi3", "Mistral": "mistral", "OPT": "opt",
    "Granite": "granite", "Mixtral": "mixtral",
}  # fmt: skip
#: vLLM sets up a process for experts when its first engine starts, or not at all.
NEEDS_ITS_OWN_PROCESS = {"mixtral"}
LARGEST_GAP = 1e-3
_MAX_LENGTH = 48
_PROMPTS = [[BOS, FIRST_LETTER + i % 11, FIRST_LETTER + 3 * i % 11] for i in range(16)]


@dataclass(frozen=True)
class Served:
    """What an engine did with new weights.

    unnoticed: tensors that were read back, of which other numbers than those announced raised no error.
    """

    rollouts: list[Rollout]
    verified: Verified
    unnoticed: list[str]


def serve(folder: str, arrays: dict[str, np.ndarray]) -> Served:
    """Start an engine in this process and give it these weights, right ones and wrong ones."""
    actor = GenerationActor(folder, Generation(), _MAX_LENGTH, use_gpu=False, seed=0)
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    sums = checksums(state, torch.float32)
    unnoticed = []
    for name in state:
        if ".1." in name:  # layers are alike
            continue
        # A tied head goes with its embedding: engines take one of the two.
        changed = state[name].roll(1) + 0.25
        wrong = {other: changed if torch.equal(tensor, state[name]) else tensor for other, tensor in state.items()}
        try:
            actor.load(as_arrays(wrong), sums, "wrong")
        except WeightMismatchError:
            continue
        unnoticed.append(name)
    actor.load_checkpoint(folder, verify=True, version="stored")
    verified = actor.load(arrays, sums, "new")
    rollouts = actor.generate(_PROMPTS, list(range(len(_PROMPTS))), Sampling(8, 1.0, seed=0), "new")
    assert verified is not None
    return Served(rollouts, verified, [name for name in unnoticed if name not in verified.skipped])


@dataclass(frozen=True)
class Outcome:
    """gap: largest difference (nats) of token log-probs to transformers with the new weights; old_gap: with the old."""

    why_not_packed: str | None
    gap: float
    old_gap: float
    verified: Verified
    unnoticed: list[str]


def make(folder: Path, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model at `folder`, and the same with other weights."""
    save_model(folder, random_model(family))
    old, new = load_policy(folder), load_policy(folder)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return old, new


def compare(old: PreTrainedModel, new: PreTrainedModel, served: Served) -> Outcome:
    gaps = [_gap(model, served.rollouts) for model in (new, old)]
    return Outcome(why_not_packed(new, _MAX_LENGTH), gaps[0], gaps[1], served.verified, served.unnoticed)


def _gap(policy: PreTrainedModel, rollouts: list[Rollout]) -> float:
    sequences = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], pad_id=0)
    with torch.no_grad():
        expected = token_logps(LogProbs(policy), sequences, 1.0)[sequences.response_mask]
    return (expected - torch.tensor([logp for r in rollouts for logp in r.token_logps])).abs().max().item()


@contextmanager
def engine_process() -> Iterator[Any]:
    """A function that runs `serve` in one process with an engine's environment, which ends with this."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not importable there

    class Process:
        def run(self, function: Any, *arguments: Any) -> Any:
            return function(*arguments)

    environment = {"env_vars": _environment(Generation())}
    remote: Any = ray.remote(Process)
    process = remote.options(runtime_env=environment, num_cpus=1).remote()
    try:
        yield lambda *arguments: ray.get(process.run.remote(serve, *arguments), timeout=300)
    finally:
        ray.kill(process)


def line(title: str, outcome: Outcome) -> str:
    verified = outcome.verified
    packed = "packed" if outcome.why_not_packed is None else f"padded: {outcome.why_not_packed}"
    share = f"{100 * verified.share:.1f} %" if verified.skipped else "100 %"
    told = f"{verified.num_tensors} of {verified.num_tensors_sent}"
    right = outcome.gap < LARGEST_GAP < outcome.old_gap and not outcome.unnoticed
    return f"| {title} | {'yes' if right else 'NO'} | {outcome.gap:.0e} | {told} | {share} | {packed} |"


def main(chosen: list[str]) -> int:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    print("| family | serves new weights | gap, nats | tensors verified | parameters verified | training |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    families = {title: family for title, family in TABLE.items() if not chosen or family in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        models = {title: make(Path(scratch) / family, family) for title, family in families.items()}
        lines = []
        for alone in (False, True):
            with engine_process() as run:
                for title, (old, new) in models.items():
                    if (families[title] in NEEDS_ITS_OWN_PROCESS) != alone:
                        continue
                    folder = str(Path(scratch) / families[title])
                    try:
                        lines.append(line(title, compare(old, new, run(folder, as_arrays(new.state_dict())))))
                    except ray.exceptions.RayError as error:  # the others are tried all the same
                        lines.append(f"| {title} | NO: {str(error).strip().splitlines()[-1]} | | | | |")
                        print(error, file=sys.stderr)
                    print(lines[-1], flush=True)
    return int(any("| NO" in told for told in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
