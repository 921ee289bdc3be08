"""Pairs of sampled text: which responses to a prompt make a pair, and which of the two is chosen. No model is here.

Every draw has a generator of its own, seeded by the settings' seed, what is drawn and the prompt: so the labels of a
prompt do not depend on which other prompts there are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from prefarena.config import DrawnPairs
from prefarena.records import PAIR_SCORES, PAIRS, content_id
from prefarena.tasks.language import seeded


@dataclass(frozen=True)
class Answered:
    """A prompt with its different responses, in the order in which they were first drawn.

    split: train or test. num_repeated: samples that were equal to an earlier one. annotator: the number of the one that
    orders the responses.
    """

    id: str
    prompt_ids: list[int]
    split: str
    responses: list[list[int]]
    num_repeated: int
    annotator: int


@dataclass(frozen=True)
class Contest:
    """Two responses to a prompt by their places, and P(first > second); nan: the judge is silent.

    scores: of first and second by their annotator, noise included; none where that one compares without scoring.
    """

    first: int
    second: int
    chance: float
    scores: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Ordered:
    """Two responses to a prompt by their places, the better one first, and the scores of both where there are some."""

    prompt: Answered
    winner: int
    loser: int
    scores: tuple[float, float] | None

    @property
    def turned_round(self) -> _Ordered:
        """Return the pair in the other order. A score stays with its response."""
        scores = None if self.scores is None else self.scores[::-1]
        return _Ordered(self.prompt, self.loser, self.winner, scores)


def choose_covered(ids: Sequence[str], share: float, seed: int) -> set[str]:
    """The ids of the training prompts that get pairs: the share of them, rounded, but at least one."""
    ordered = sorted(ids)
    number = max(1, round(share * len(ordered)))
    return {ordered[i] for i in seeded(seed, "covered").choice(len(ordered), number, replace=False)}


def answered(samples: pa.Table, prompts: pa.Table, share: float, settings: DrawnPairs) -> list[Answered]:
    """The prompts that get pairs, by id: those to test on, and the covered share of those to train on.

    samples: records.DRAWN. prompts: records.PROMPTS.
    """
    splits = dict(zip(prompts["id"].to_pylist(), prompts["split"].to_pylist(), strict=True))
    covered = choose_covered([name for name, split in splits.items() if split == "train"], share, settings.seed)
    drawn: dict[str, list[tuple[int, list[int], list[int]]]] = defaultdict(list)
    for row in samples.to_pylist():
        if splits[row["prompt_id"]] == "test" or row["prompt_id"] in covered:
            drawn[row["prompt_id"]].append((row["place"], row["prompt_ids"], row["response_ids"]))
    found = []
    for name in sorted(drawn):
        rows = sorted(drawn[name])
        different = list({tuple(response): response for _, _, response in rows}.values())
        who = int(seeded(settings.seed, f"annotator-{name}").integers(len(settings.annotators)))
        found.append(Answered(name, rows[0][1], splits[name], different, len(rows) - len(different), who))
    return found


def contests_of_scores(prompt: Answered, scores: np.ndarray, settings: DrawnPairs) -> list[Contest]:
    """The contests that an annotator's scores [m] of a prompt's m responses decide; those without a score are in none.

    The annotator's noise is added here.
    """
    noise = settings.annotators[prompt.annotator].noise
    if noise > 0:
        draws = seeded(settings.seed, f"noise-{prompt.annotator}-{prompt.id}").standard_normal(len(scores))
        scores = scores + noise * draws
    known = np.flatnonzero(np.isfinite(scores))
    if len(known) < 2:
        return []
    places = [(int(i), int(j)) for n, i in enumerate(known) for j in known[n + 1 :]]
    if settings.choose == "best_worst":
        best, worst = known[scores[known].argmax()], known[scores[known].argmin()]
        places = [(int(best), int(worst))] if best != worst else places[:1]
    return [
        Contest(i, j, chance(float(scores[i] - scores[j]), settings), (float(scores[i]), float(scores[j])))
        for i, j in places
    ]


def chance(gap: float, settings: DrawnPairs) -> float:
    """P(y1 > y2) of a gap r1 - r2 in score, as the settings label."""
    return chance_of_gap(gap, settings.labels, settings.label_temperature)


def chance_of_gap(gap: float, labels: Literal["deterministic", "bradley_terry"], temperature: float) -> float:
    """P(y1 > y2) of a gap r1 - r2 in score: a sigmoid, or for deterministic labels 0, 1, or 1/2 of a tie."""
    if labels == "deterministic":
        return 0.5 if gap == 0 else float(gap > 0)
    return float(np.exp(-np.logaddexp(0.0, -gap / temperature)))


def all_places(prompt: Answered) -> list[tuple[int, int]]:
    """Every pair of a prompt's responses, by their places."""
    number = len(prompt.responses)
    return [(i, j) for i in range(number) for j in range(i + 1, number)]


def make_pairs(
    prompts: Sequence[Answered], contests: Sequence[Sequence[Contest]], settings: DrawnPairs
) -> tuple[dict[str, pa.Table], Counter[str]]:
    """The tables `train` and `test` as records.PAIRS, and counts.

    A tie, which only deterministic labels can have, gives no pair. A share `flip_share` of the training pairs, rounded,
    is turned round. `label` is 1 always: a row is an observed ordering. Both responses keep their annotator's scores.
    """
    rows: dict[str, list[_Ordered]] = {"train": [], "test": []}
    counts: Counter[str] = Counter()
    for prompt, its in zip(prompts, contests, strict=True):
        uniform = seeded(settings.seed, f"labels-{prompt.id}").random(len(its))
        for one, draw in zip(its, uniform, strict=True):
            if np.isnan(one.chance):
                continue
            if settings.labels == "deterministic" and one.chance == 0.5:
                counts["ties"] += 1
                continue
            found = _Ordered(prompt, one.first, one.second, one.scores)
            rows[prompt.split].append(found if draw < one.chance else found.turned_round)
    num_train = len(rows["train"])
    flipped = seeded(settings.seed, "flips").choice(num_train, round(settings.flip_share * num_train), replace=False)
    for place in flipped:
        rows["train"][place] = rows["train"][place].turned_round
    counts["flipped"] = len(flipped)
    return {split: _table(split, found) for split, found in rows.items()}, counts


def _table(split: str, rows: list[_Ordered]) -> pa.Table:
    found = []
    for row in rows:
        prompt, chosen, rejected = row.prompt, row.prompt.responses[row.winner], row.prompt.responses[row.loser]
        found.append(
            {
                "id": content_id("pair", split, prompt.prompt_ids, chosen, rejected),
                "prompt_ids": prompt.prompt_ids,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "label": 1.0,
                "source": f"annotator {prompt.annotator}",
                **dict(zip(PAIR_SCORES, row.scores or (None, None), strict=True)),
            }
        )
    return pa.Table.from_pylist(found, schema=PAIRS)
