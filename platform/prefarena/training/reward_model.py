"""The reward model: trained on pairs, normalised on the reference's samples, measured on held-out pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from prefarena.data.plan import LARGEST_PASS, within_budget
from prefarena.data.tables import read_rows
from prefarena.judges.calibration import calibration
from prefarena.judges.models import RewardModelJudge
from prefarena.mirror import mirror_of
from prefarena.modeling.arithmetic import attends_in, body_in_weights, products_of
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_reward_model, load_tokenizer, new_reward_model
from prefarena.modeling.lora import add_adapters
from prefarena.training.jobs import RewardModelJob
from prefarena.training.loading import Loader
from prefarena.training.off_policy import train
from prefarena.training.saving import save_trained
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

    model = Loader(worker).new_reward_model(job.policy, job.seed)
    if settings.training.lora is not None:
        add_adapters(model, settings.training.lora, job.seed)
    head = ScalarHead(model, job.max_length, worker.device, attends_in(job.settings.training.precision))
    worker.note_padding(head.notes)
    shares = Shares(settings.training, worker.world_size, job.seed, head.packed)
    term = RewardModelTerm(job.pairs, shares, tokenizer.pad_token_id, centre_weight=settings.centre_weight)
    counts = train(head, [term], settings.training, worker)
    trained = save_trained(
        model,
        job,
        tokenizer,
        worker,
        lambda: new_reward_model(job.policy, job.seed),
        has_adapters=settings.training.lora is not None,
    )
    del model, head
    judge = _finished(trained, job, worker)
    measured = {} if judge is None else _measured(judge, job, tokenizer.pad_token_id, worker)
    return {"costs": worker.costs(**counts), **measured}


def _finished(trained: PreTrainedModel | None, job: RewardModelJob, worker: Worker) -> RewardModelJudge | None:
    """The model as it will score; None on workers that have no part in measuring it."""
    if worker.shards:
        worker.drop_garbage()  # the trained weights and the optimizer
        worker.share(None)  # rank 0 has written the model
        if mirror_of(job.model_dir) is None:  # else the model is on rank 0's node alone
            return Loader(worker).spread_reward_model(job.model_dir, job.scored_in)
        trained = load_reward_model(job.model_dir) if worker.rank == 0 else None
    if trained is None:
        return None
    nn.Module.to(trained, worker.device)
    return RewardModelJudge.of(body_in_weights(trained, job.scored_in))  # from here on it is only measured


def _measured(judge: RewardModelJudge, job: RewardModelJob, pad_id: int, worker: Worker) -> dict[str, Any]:
    """Mean and scale go into the model's config; its quality on held-out pairs into the manifest.

    Where the model is spread every worker makes every pass, and rank 0 writes.
    """
    with products_of(job.scored_in):
        samples = read_rows(job.samples)
        raw = judge.score(samples["prompt_ids"].to_pylist(), samples["response_ids"].to_pylist())
        assert isinstance(judge.head, ScalarHead)
        head = judge.head if worker.shards else ScalarHead(judge.head.model, job.max_length)
        chosen, rejected = held_out_scores(head, job.test_pairs, pad_id, worker.device)
    if worker.rank == 0:
        config = judge.head.model.config
        config.reward_mean = float(raw.mean())
        config.reward_scale = float(max(raw.std(), 1e-6))
        config.save_pretrained(job.model_dir)
    return {"reward_model": calibration(chosen - rejected)}


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
