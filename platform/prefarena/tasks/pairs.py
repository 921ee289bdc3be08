"""Preference pairs of the enumerable language, drawn from the reference policy's exact distribution."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

from prefarena.errors import UserError
from prefarena.records import DEMONSTRATIONS, PAIR_SCORES, PAIRS, content_id
from prefarena.tasks.language import seeded, unpadded

_MOST_REDRAWS = 10_000


def sample_pairs(
    prompts: list[list[int]],
    covered: np.ndarray,
    sequences: np.ndarray,
    ref_logps: np.ndarray,
    rewards: np.ndarray,
    *,
    num_pairs: int,
    labels: Literal["deterministic", "bradley_terry"],
    temperature: float,
    seed: int,
    split: Literal["train", "test"],
) -> pa.Table:
    """Pairs of responses as records.PAIRS, the same number (±1) for every covered prompt.

    Two independent draws from the reference, given that they differ (both are drawn again until they do). The
    ordering is the one by reward, or for `bradley_terry` drawn with P(y1 > y2) = sigmoid((r1 - r2) / temperature);
    of equal rewards the second draw wins, which favours neither response. `label` is 1 always: the row holds an
    observed ordering, and the scores are the rewards. `seed` and `split` together choose the draws, so train and test
    pairs of one seed are independent.

    prompts: P lists of token ids. covered: bool [P]. sequences: [N, L], -1 behind the response. ref_logps and
    rewards: [P, N]. Raises UserError when the reference gives one response all the probability.
    """
    rng = seeded(seed, f"pairs-{split}")
    owners = rng.permutation(np.flatnonzero(covered)[np.arange(num_pairs) % int(covered.sum())])
    rows: list[dict[str, object]] = [{} for _ in range(num_pairs)]
    for owner in np.flatnonzero(covered):
        places = np.flatnonzero(owners == owner)
        first, second = _draw_different(rng, ref_logps[owner], len(places), prompts[owner])
        gap = rewards[owner, first] - rewards[owner, second]
        if labels == "deterministic":
            first_wins = gap > 0
        else:
            first_wins = rng.random(len(places)) < np.exp(-np.logaddexp(0.0, -gap / temperature))
        winners, losers = np.where(first_wins, first, second), np.where(first_wins, second, first)
        for place, winner, loser in zip(places, winners, losers, strict=True):
            scores = (float(rewards[owner, response]) for response in (winner, loser))
            chosen, rejected = unpadded(sequences[winner]), unpadded(sequences[loser])
            rows[place] = {
                "id": content_id("pair", split, seed, int(place), prompts[owner], chosen, rejected),
                "prompt_ids": prompts[owner],
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "label": 1.0,
                "source": "language",
                **dict(zip(PAIR_SCORES, scores, strict=True)),
            }
    return pa.Table.from_pylist(rows, schema=PAIRS)


def sample_responses(rng: np.random.Generator, logps: np.ndarray, number: int) -> np.ndarray:
    """`number` independent draws of a row index [number] from the distribution exp(logps) [N]."""
    cumulative = np.cumsum(np.exp(logps))
    draws = np.searchsorted(cumulative, rng.random(number) * cumulative[-1], side="right")
    return np.minimum(draws, len(logps) - 1)


def reference_samples(
    prompts: list[list[int]],
    sequences: np.ndarray,
    ref_logps: np.ndarray,
    per_prompt: int,
    seed: int,
    purpose: str = "reference-samples",
) -> pa.Table:
    """`per_prompt` independent draws from the reference for each of P prompts, as records.DEMONSTRATIONS.

    sequences: [N, L], -1 behind the response. ref_logps: [P, N]. purpose: other ones have other draws.
    """
    rng = seeded(seed, purpose)
    rows = []
    for prompt, logps in zip(prompts, ref_logps, strict=True):
        for place, draw in enumerate(sample_responses(rng, logps, per_prompt)):
            response = unpadded(sequences[draw])
            identity = content_id("sample", seed, place, prompt, response)
            rows.append({"id": identity, "prompt_ids": prompt, "response_ids": response})
    return pa.Table.from_pylist(rows, schema=DEMONSTRATIONS)


def _draw_different(
    rng: np.random.Generator, logps: np.ndarray, number: int, prompt: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    first, second = sample_responses(rng, logps, number), sample_responses(rng, logps, number)
    for _ in range(_MOST_REDRAWS):
        same = np.flatnonzero(first == second)
        if not len(same):
            return first, second
        first[same], second[same] = sample_responses(rng, logps, len(same)), sample_responses(rng, logps, len(same))
    raise UserError(f"task: the reference policy has only one response to prompt {prompt}; no pair can be drawn")
