"""The reward model: trained on pairs, normalised on the reference's samples, measured on held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from prefarena.data.plan import LARGEST_PASS, within_budget
from prefarena.data.tables import read_rows
from prefarena.judges.calibration import calibration
from prefarena.judges.models import RewardModelJudge
from prefarena.modeling.arithmetic import attends_in, body_in_weights, products_of
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_tokenizer, new_reward_model, save_policy
from prefarena.modeling.lora import ADAPTER_FOLDER, add_adapters, merge_adapters, save_adapter
from prefarena.training.jobs import RewardModelJob
from prefarena.training.off_policy import train
from prefarena.training.sharding import on_rank_0
from prefarena.training.terms import Pairs, RewardModelTerm, Shares, pair_scores
from prefarena.training.worker import Worker

#: In one pass over held-out pairs.
_MOST_PAIRS = 256


def train_reward_model(job: RewardModelJob, worker: Worker) -> dict[str, Any]:
    """Train and save the model; the manifest's contents, with the held-out quality under `reward_model`.

    The mean and the scale of the raw scores on the reference's samples go into the model's config, from where
    `modeling.heads.scores` applies them wherever the model scores.
    """
    tokenizer = load_tokenizer(job.policy)
    settings = job.settings

    def start() -> PreTrainedModel:
        model = new_reward_model(job.policy, job.seed)
        if settings.training.lora is not None:
            add_adapters(model, settings.training.lora, job.seed)
        return model

    model = start()
    head = ScalarHead(model, job.max_length, worker.device, attends_in(job.settings.training.precision))
    worker.note_padding(head.notes)
    shares = Shares(settings.training, worker.world_size, job.seed, head.packed)
    term = RewardModelTerm(job.pairs, shares, tokenizer.pad_token_id, centre_weight=settings.centre_weight)
    counts = train(head, [term], settings.training, worker)
    contents: dict[str, Any] = {}
    trained = on_rank_0(model, start, worker.rank)
    if trained is not None:
        if settings.training.lora is not None:
            save_adapter(trained, job.policy, Path(job.stage_dir) / ADAPTER_FOLDER)  # for PPO, on the policy's weights
            merge_adapters(trained)
        nn.Module.to(trained, worker.device)
        save_policy(trained, tokenizer, job.model_dir)
        contents["reward_model"] = _measure(trained, job, tokenizer.pad_token_id, worker.device)
        trained.config.save_pretrained(job.model_dir)
    return {"costs": worker.costs(**counts), **contents}


def _measure(trained: PreTrainedModel, job: RewardModelJob, pad_id: int, device: torch.device) -> dict[str, float]:
    """Normalise the model's scores, in its config, and measure it on held-out pairs: as it will score from here on."""
    body_in_weights(trained, job.scored_in)
    with products_of(job.scored_in):
        samples = read_rows(job.samples)
        raw = RewardModelJudge.of(trained).score(samples["prompt_ids"].to_pylist(), samples["response_ids"].to_pylist())
        trained.config.reward_mean = float(raw.mean())
        trained.config.reward_scale = float(max(raw.std(), 1e-6))
        chosen, rejected = held_out_scores(ScalarHead(trained, job.max_length), job.test_pairs, pad_id, device)
    return calibration(chosen - rejected)


@torch.no_grad()
def held_out_scores(
    head: ScalarHead, path: str, pad_id: int, device: torch.device, most_tokens: int = LARGEST_PASS
) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores of the chosen and the rejected responses of a table of pairs, [N] float64 each.

    A pass has at most 256 pairs, and at most `most_tokens` tokens, padding included; a longer pair goes alone.
    """
    pairs = Pairs(path, referenced=False)
    lengths = pairs.prompts.lengths + pairs.chosen.lengths + pairs.rejected.lengths
    number = len(lengths)
    if not head.packed:
        longest = pairs.prompts.lengths + np.maximum(pairs.chosen.lengths, pairs.rejected.lengths)
        lengths = np.full(number, 2 * int(longest.max()))
    passes = [
        rows
        for part in np.array_split(np.arange(number), -(-number // _MOST_PAIRS))
        for rows in within_budget(part, lengths, most_tokens)
    ]
    found = [pair_scores(head, pairs, rows, device, pad_id) for rows in passes]
    chosen, rejected = (torch.cat([getattr(part, side) for part in found]) for side in ("chosen", "rejected"))
    return chosen.double().cpu().numpy(), rejected.double().cpu().numpy()
