"""A small table of pairs with a random Llama's reference log-probs, and jobs on it, that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from prefarena.config import LanguageTask, OffPolicy, OffPolicyMethod, ScratchModel
from prefarena.data.responses import mismatch, taken_apart
from prefarena.data.tables import read_rows, write_rows
from prefarena.methods.custom import Custom
from prefarena.modeling.load import load_policy, load_tokenizer, new_policy, save_policy
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.records import DEMONSTRATIONS, REFERENCED_PAIRS, REFERENCED_RESPONSES
from prefarena.stage_files import METRICS, read_log
from prefarena.tasks.language import Language
from prefarena.training.jobs import OffPolicyJob

TASK = LanguageTask(num_letters=5, num_prompts=12, prompt_letters=2, num_demonstrations=256)


def write_inputs(folder: Path) -> Path:
    """model/, demonstrations/ and pairs/: random pairs whose reference log-probs are the model's own."""
    language = Language(TASK)
    language.save_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = new_policy(ScratchModel(), tokenizer, 8, 0)
    save_policy(model, tokenizer, folder / "model")
    write_rows(language.sample_demonstrations(), folder / "demonstrations" / "part.parquet", DEMONSTRATIONS)
    rng, rows, module = np.random.default_rng(0), [], LogProbs(model)
    for i in range(48):
        prompt = language.prompt_ids[i % 12]
        # Two equal responses would tie but for the last bit of their scores, which differs between processors.
        chosen = rejected = _response(rng)
        while rejected == chosen:
            rejected = _response(rng)
        with torch.no_grad():
            logps = sequence_logps(module, [prompt], [[chosen, rejected]])[0].tolist()
        rows.append(
            {"id": f"{i:03}", "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "label": 1.0,
             "source": "test", "ref_chosen_logp": logps[0], "ref_rejected_logp": logps[1],
             "score_chosen": i % 5 + 0.25, "score_rejected": i % 3 - 0.5}
        )  # fmt: skip
    write_rows(pa.Table.from_pylist(rows, REFERENCED_PAIRS), folder / "pairs" / "part.parquet", REFERENCED_PAIRS)
    return folder


def example(method: type[OffPolicy], **settings: Any) -> OffPolicy:
    """The method with its defaults, and with something where it has none."""
    required = {"objective": "losses:logistic"} if method is Custom else {}
    return method(**required, **settings)


def write_responses(inputs: Path) -> Path:
    """responses/ beside the pairs of `write_inputs`: the pairs taken apart, with the model's own log-probs."""
    rows = taken_apart(read_rows(inputs / "pairs"))
    others = rows["response_ids"].take(pa.array(mismatch(rows)))
    module = LogProbs(load_policy(inputs / "model"))
    table = rows.append_column("mismatched_ids", others)
    for name, column in (("ref_logp", "response_ids"), ("ref_mismatched_logp", "mismatched_ids")):
        responses = [[ids] for ids in table[column].to_pylist()]
        with torch.no_grad():
            logps = sequence_logps(module, table["prompt_ids"].to_pylist(), responses)[0]
        table = table.append_column(name, pa.array(logps.numpy(), pa.float32()))
    write_rows(table, inputs / "responses" / "part.parquet", REFERENCED_RESPONSES)
    return inputs / "responses"


def _response(rng: np.random.Generator) -> list[int]:
    return [int(token) for token in rng.integers(3, 8, rng.integers(1, 4))] + [2]


def off_policy_job(inputs: Path, folder: Path, method: OffPolicyMethod) -> OffPolicyJob:
    return OffPolicyJob(
        stage_dir=str(folder), name=folder.name, policy=str(inputs / "model"), seed=3, method=method,
        pairs=str(inputs / "pairs"), demonstrations=str(inputs / "demonstrations"),
        responses=str(inputs / "responses"),
    )  # fmt: skip


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder / METRICS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float32).state_dict()
