"""The reward model: trained on pairs, normalised on the reference's samples, measured on held-out pairs.

All workers have a part in measuring it, whether each holds the model or a part of it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from prefarena.data.plan import bounded_passes, largest_scored, within_budget
from prefarena.data.tables import read_rows
from prefarena.judges.calibration import calibration
from prefarena.judges.models import RewardModelJudge
from prefarena.mirror import bring_anew, push
from prefarena.modeling.arithmetic import attends_in, body_in_weights, products_of
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_tokenizer, new_reward_model
from prefarena.modeling.lora import add_adapters
from prefarena.training.jobs import RewardModelJob
from prefarena.training.loading import Loader
from prefarena.training.off_policy import train
from prefarena.training.saving import save_trained
from prefarena.training.tally import Tally
from prefarena.training.terms import Pairs, RewardModelTerm, Rows, Shares, pair_scores
from prefarena.training.worker import Worker

#: In one pass over held-out pairs, and over samples.
_MOST_PAIRS, _MOST_SAMPLES = 256, 64


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
    term = RewardModelTerm(
        job.pairs,
        shares,
        tokenizer.pad_token_id,
        centre_weight=settings.centre_weight,
        num_pairs=settings.num_pairs,
    )
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
    tally = Tally([judge.head], settings.training, worker)
    measured = _measured(judge, job, tokenizer.pad_token_id, worker)
    counts["num_flops"] += tally.take()
    labels = min(int(counts["num_steps"]) * settings.training.batch_size, len(term.plan.lengths))
    return {"costs": worker.costs(**counts), "pairs": {"num_data_labels": labels}, **measured}


def _finished(trained: PreTrainedModel | None, job: RewardModelJob, worker: Worker) -> RewardModelJudge:
    """The model as it will score, on every worker."""
    if trained is None:
        worker.drop_garbage()  # the trained weights and the optimizer
        if worker.rank == 0:
            push(Path(job.model_dir))
        if worker.share(socket.gethostname()) != socket.gethostname():  # it was written on another node
            bring_anew(job.model_dir)
        worker.gathered(None)  # nobody reads it while it is replaced
        return Loader(worker).spread_reward_model(job.model_dir, job.scored_in)
    nn.Module.to(trained, worker.device)
    return RewardModelJudge.of(body_in_weights(trained, job.scored_in))  # from here on it is only measured


def _measured(judge: RewardModelJudge, job: RewardModelJob, pad_id: int, worker: Worker) -> dict[str, Any]:
    """Mean and scale go into the model's config; its quality on held-out pairs into the manifest."""
    with products_of(job.scored_in):
        samples = read_rows(job.samples)
        raw = _scores(judge, samples["prompt_ids"].to_pylist(), samples["response_ids"].to_pylist(), worker)
        assert isinstance(judge.head, ScalarHead)
        head = judge.head if worker.shards else ScalarHead(judge.head.model, job.max_length)
        chosen, rejected = held_out_scores(head, job.test_pairs, pad_id, worker)
    if worker.rank == 0:
        config = judge.head.model.config
        config.reward_mean = float(raw.mean())
        config.reward_scale = float(max(raw.std(), 1e-6))
        config.save_pretrained(job.model_dir)
    return {"reward_model": calibration(chosen - rejected)}


def _scores(
    judge: RewardModelJudge, prompts: list[list[int]], responses: list[list[int]], worker: Worker
) -> np.ndarray:
    """Return scores [N], the same on all workers."""
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], np.int64)

    def score(rows: Rows) -> np.ndarray:
        return judge.score([prompts[i] for i in rows], [responses[i] for i in rows])

    return over_workers(bounded_passes(lengths, _MOST_SAMPLES, largest_scored(worker.device.type)), score, worker)


@torch.no_grad()
def held_out_scores(
    head: ScalarHead, path: str, pad_id: int, worker: Worker, most_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores of the chosen and the rejected responses of a table of pairs, [N] float64 each, on all workers.

    A pass has at most 256 pairs, and at most `most_tokens` tokens, padding included (none means as many as suit the
    worker's device); a longer pair goes alone.
    """
    most_tokens = most_tokens or largest_scored(worker.device.type)
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

    def score(rows: Rows) -> np.ndarray:
        both = pair_scores(head, pairs, rows, worker.device, pad_id)
        return torch.stack([both.chosen, both.rejected], 1).double().cpu().numpy()

    found = over_workers(passes, score, worker)
    return found[:, 0], found[:, 1]


def over_workers(passes: list[Rows], compute: Callable[[Rows], np.ndarray], worker: Worker) -> np.ndarray:
    """Return what `compute` gives for the rows of each pass, in the order of rows 0 to N - 1, the same on all workers.

    Each pass is made by one worker, so their number changes no bit. A worker that has no pass left repeats the last one
    and drops the result: a model that is spread needs every worker in every pass.
    """
    own: list[tuple[Rows, np.ndarray]] = []
    for start in range(0, len(passes), worker.world_size):
        place = start + worker.rank
        found = compute(passes[min(place, len(passes) - 1)])
        if place < len(passes):
            own.append((passes[place], found))
    together = [one for part in worker.gathered(own) for one in part]
    rows, values = (np.concatenate([one[side] for one in together]) for side in (0, 1))
    return values[np.argsort(rows)]
