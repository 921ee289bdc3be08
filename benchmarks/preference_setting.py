"""What benchmarks/preference_step.py compares at: model, pairs, batches, and the folder that every side reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from random_pairs import (
    EQUAL_LENGTHS,
    MAX_PROMPT,
    MAX_RESPONSE,
    TokenPairs,
    equal_lengths,
    hh_lengths,
    random_pairs,
    word_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from prefarena.config import ScratchModel, TextTask
from prefarena.data.formats import Pair, Unusable, normalise
from prefarena.data.plan import BatchPlan
from prefarena.data.sources import find_parts, read_rows_of
from prefarena.data.tables import write_rows
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError
from prefarena.modeling.load import new_policy, save_policy
from prefarena.records import PAIRS

#: Nine million parameters, 4.2 of them in the embedding and the head.
MODEL = ScratchModel(hidden_size=256, num_layers=6, num_heads=4, intermediate_size=704, vocab_size=8192)


#: Of a row that is read.
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Setting:
    """Everything that all sides must agree on. A block is one pass over `num_steps * batch_size` pairs."""

    name: str
    title: str
    num_steps: int = 10
    batch_size: int = 8
    parity_steps: int = 10
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    beta: float = 0.1
    threads: int = 2
    seed: int = 0

    @property
    def num_pairs(self) -> int:
        return self.num_steps * self.batch_size


SETTINGS = (
    Setting("natural", "natural lengths"),
    Setting("equal", f"equal lengths: prompts of {EQUAL_LENGTHS[0]} tokens, responses of {EQUAL_LENGTHS[1]}"),
)


def hh_pairs(path: str, setting: Setting, folder: Path) -> tuple[TokenPairs, PreTrainedTokenizerBase]:
    """Pairs drawn from raw HH-RLHF rows, in tokens of a BPE that is learnt from all of them."""
    texts = list(_usable(path))
    answers = (pair.prompt + answer for pair in texts for answer in (pair.chosen, pair.rejected))  # type: ignore[operator]
    fast = train_tokenizer(answers, MODEL.vocab_size, folder)
    limits = TextTask(
        data=path, max_prompt_tokens=MAX_PROMPT, max_response_tokens=MAX_RESPONSE, long_prompts="keep_end"
    )
    tokenizer = Tokenizer(fast, limits)
    pairs: TokenPairs = []
    for index in np.random.default_rng(setting.seed).permutation(len(texts)):
        try:
            pair = tokenizer.pair(texts[index])
        except Unusable:
            continue
        pairs.append((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if len(pairs) == setting.num_pairs:
            return pairs, fast
    raise UserError(f"{path}: {len(pairs)} usable pairs, of which {setting.num_pairs} are needed; give more rows")


def _usable(path: str) -> Iterator[Pair]:
    for part in find_parts(path, "train"):
        for _, row in read_rows_of(part, ("chosen", "rejected"), _MOST_BYTES):
            try:
                if not isinstance(row, Unusable):
                    yield normalise(row, "hh")
            except Unusable:
                continue


def prepare(setting: Setting, data: str | None, folder: Path) -> Path:
    """Write model, pairs, batches and settings into `folder`; returns the file that every side is given."""
    folder.mkdir(parents=True)
    if data is not None and setting.name == "natural":
        pairs, tokenizer = hh_pairs(data, setting, folder / "tokenizer")
    else:
        tokenizer = word_tokenizer(MODEL.vocab_size)
        equal = setting.name == "equal"
        lengths = equal_lengths(setting.num_pairs) if equal else hh_lengths(setting.num_pairs, setting.seed)
        pairs = random_pairs(lengths, MODEL.vocab_size, setting.seed)
    return write_spec(setting, MODEL, pairs, tokenizer, folder)


def write_spec(
    setting: Setting, model: ScratchModel, pairs: TokenPairs, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """The model, the table of pairs and the settings in `folder`; returns the settings' file."""
    save_policy(new_policy(model, tokenizer, MAX_PROMPT + MAX_RESPONSE, setting.seed), tokenizer, folder / "policy")
    _write_pairs(pairs, folder / "pairs.parquet")
    spec: dict[str, Any] = asdict(setting) | {
        "device": "cpu",
        "bf16": False,
        "policy": str(folder / "policy"),
        "pairs_table": str(folder / "pairs.parquet"),
        "referenced_table": str(folder / "referenced.parquet"),
        "output": str(folder / "output"),
        "max_length": MAX_PROMPT + MAX_RESPONSE,
        "pad": tokenizer.pad_token_id,
        "pairs": pairs,
        "orders": orders(setting, pairs),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def orders(setting: Setting, pairs: TokenPairs) -> dict[str, list[int]]:
    """The order of the pairs in which a block's batches are cut: `bucketed` by length, as ours are, or `shuffled`."""
    lengths = np.array([2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs])
    return {"bucketed": _order(setting, lengths), "shuffled": _order(setting, np.ones_like(lengths))}


def _order(setting: Setting, lengths: NDArray[np.int64]) -> list[int]:
    plan = BatchPlan(lengths, lengths, setting.batch_size, 1, 1, setting.seed)
    return [int(row) for step in range(setting.num_steps) for row in plan.rows(step)]


def _write_pairs(pairs: TokenPairs, path: Path) -> None:
    columns = {
        "id": [f"{i:06d}" for i in range(len(pairs))],
        "prompt_ids": [pair[0] for pair in pairs],
        "chosen_ids": [pair[1] for pair in pairs],
        "rejected_ids": [pair[2] for pair in pairs],
        "label": np.ones(len(pairs), dtype=np.float32),
        "source": ["benchmark"] * len(pairs),
    }
    write_rows(pa.table(columns), path, PAIRS)


def num_tokens(spec: dict[str, Any]) -> int:
    """Tokens of both sequences of all pairs of a block, the prompt counted in each."""
    return sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in spec["pairs"])


def num_parameters(path: Path) -> int:
    from safetensors.torch import load_file

    return sum(torch.numel(tensor) for tensor in load_file(path / "model.safetensors").values())
