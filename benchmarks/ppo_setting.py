"""What benchmarks/ppo_step.py compares at: sizes, models, prompts, and the folder that both sides read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prefarena.config import ScratchModel
from prefarena.data.tables import write_rows
from prefarena.modeling.load import new_policy, new_reward_model, save_policy
from prefarena.records import PROMPTS

VOCABULARY = 4096
MODEL = ScratchModel(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=704)
#: Prompt lengths of HH-RLHF's harmless split: every 5th percentile of 2,000 rows, tokens counted as 1.1 for each word
#: and punctuation mark.
HH_PROMPT_PERCENTILES = (8, 12, 15, 18, 21, 28, 41, 54, 66, 78, 90, 103, 116, 130, 144, 164, 186, 222, 275, 341, 870)
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Setting:
    """One comparison. Lengths in tokens; everything that both sides must agree on.

    prompt_lengths: of the prompts, all of which are in every rollout batch. end_probability: of eos at each token; 0:
    every response is `response_limit` long. trl_forward_batch and micro_batch: the sequences that TRL, and we, pass
    through a model at once, each side's fastest on two cores.
    """

    name: str
    title: str
    prompt_lengths: tuple[int, ...]
    response_limit: int
    end_probability: float
    trl_forward_batch: int
    micro_batch: int
    epochs: int = 2
    minibatches: int = 4
    temperature: float = 0.7
    learning_rate: float = 3e-6
    kl_coef: float = 0.05
    clip: float = 0.2
    value_clip: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    vf_coef: float = 0.1
    threads: int = 2

    @property
    def ends_early(self) -> bool:
        return self.end_probability > 0

    @property
    def rollouts(self) -> int:
        return len(self.prompt_lengths)

    @property
    def max_length(self) -> int:
        return max(self.prompt_lengths) + self.response_limit


def hh_prompt_lengths(num_prompts: int, limit: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths drawn from HH-RLHF's distribution; a longer prompt keeps its last `limit` tokens."""
    drawn = np.random.default_rng(seed).uniform(0, 100, num_prompts)
    lengths = np.interp(drawn, np.linspace(0, 100, len(HH_PROMPT_PERCENTILES)), HH_PROMPT_PERCENTILES)
    return tuple(int(length) for length in np.minimum(lengths, limit))


SETTINGS = (
    Setting("equal", "equal lengths: prompts of 128 tokens, responses of 64, no padding anywhere",
            (128,) * 64, 64, 0.0, trl_forward_batch=16, micro_batch=16),
    Setting("hh", "lengths as in HH-RLHF: prompts of up to 256 tokens, responses of up to 128 that end with eos",
            hh_prompt_lengths(64, 256), 128, 1 / 42, trl_forward_batch=16, micro_batch=16),
)  # fmt: skip


def prepare(setting: Setting, folder: Path, iterations: int) -> Path:
    """Write models, prompts and the settings into `folder`; returns the file that both sides are given."""
    folder.mkdir(parents=True)
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=f"t{PAD}")),
        pad_token=f"t{PAD}", bos_token=f"t{BOS}", eos_token=f"t{EOS}",
    )  # fmt: skip
    policy = new_policy(MODEL, tokenizer, setting.max_length, seed=0)
    _set_ending(policy, setting)
    source = np.random.default_rng(1)
    prompts = [source.integers(EOS + 1, VOCABULARY, length).tolist() for length in setting.prompt_lengths]
    save_policy(policy, tokenizer, folder / "policy")
    critic = new_reward_model(folder / "policy", seed=0)
    save_policy(critic, tokenizer, folder / "reward")
    save_policy(_perturbed(policy, seed=1), tokenizer, folder / "perturbed-policy")
    save_policy(_perturbed(critic, seed=2), tokenizer, folder / "perturbed-critic")
    _write_prompts(prompts, folder / "prompts.parquet")
    spec: dict[str, Any] = asdict(setting) | {
        "rollouts": setting.rollouts,
        "ends_early": setting.ends_early,
        "max_length": setting.max_length,
        "pad": PAD,
        "eos": EOS,
        "prompts": prompts,
        "prompts_table": str(folder / "prompts.parquet"),
        "iterations": iterations,
        "frozen_rollouts": setting.rollouts // 2,
        "frozen": str(folder / "frozen.npz"),
        "trl_output": str(folder / "trl"),
    }
    for name in ("policy", "reward", "perturbed-policy", "perturbed-critic"):
        spec[name.replace("-", "_")] = str(folder / name)
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def _write_prompts(prompts: list[list[int]], path: Path) -> None:
    columns = {
        "id": [f"{i:04d}" for i in range(len(prompts))],
        "prompt_ids": prompts,
        "covered": [True] * len(prompts),
        "split": ["train"] * len(prompts),
    }
    write_rows(pa.table(columns), path, PROMPTS)


@torch.no_grad()
def _set_ending(policy: PreTrainedModel, setting: Setting) -> None:
    """Give eos its probability at every position, and the pad token none: TRL takes a sampled one for padding.

    One channel of the residual stream is made constant (nothing writes to it), so that the head can use it as a bias.
    """
    named = dict(policy.named_parameters())
    embedding, head = named["model.embed_tokens.weight"], named["lm_head.weight"]
    embedding[:, 0] = 4 * embedding.std()
    for name, weight in named.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
    head[[PAD, EOS]] = 0.0
    sample = torch.randint(EOS + 1, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    output = policy(input_ids=sample, output_hidden_states=True)
    constant = output.hidden_states[-1][..., 0].mean()
    others = torch.logsumexp(output.logits[..., EOS + 1 :] / setting.temperature, -1).mean()
    probability = setting.end_probability or 1e-20
    head[EOS, 0] = setting.temperature * (others + math.log(probability / (1 - probability))) / constant
    head[PAD, 0] = -50.0 / constant


@torch.no_grad()
def _perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model itself with noise on every weight, 10 % of its tensor's deviation."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source)
        parameter.add_(0.1 * noise * parameter.std())
    return model
