"""The policies' answers side by side: the largest disagreements first, as many as a page can hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

#: Of an evaluation's stage, and of the run folder, where it holds all policies (records.ALL_SAMPLES).
SAMPLES_FILE = "samples.parquet"
#: Of prompts and responses on a page, in bytes of UTF-8: what a browser on a telephone opens without a pause.
MOST_BYTES = 4 * 2**20

Answer = tuple[str, float | None, int]  # response, score, tokens
Place = tuple[int, int]  # seed, place


@dataclass(frozen=True)
class SideBySide:
    """A prompt and what each policy answered; policies that have no sample of it are left out."""

    seed: int
    place: int
    prompt: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Samples:
    """rows: in the order of `disagreement`, the largest first. num_left_out: rows that the page has no room for."""

    rows: list[SideBySide]
    num_left_out: int

    @property
    def num_all(self) -> int:
        return len(self.rows) + self.num_left_out


def load_samples(folder: Path, most_bytes: int = MOST_BYTES) -> Samples | None:
    """The samples of a run folder; None where it has none.

    The texts that are kept come to `most_bytes` at most, but for the first row, which is always kept.
    """
    path = folder / SAMPLES_FILE
    if not path.is_file():
        return None
    dataset = pads.dataset(path, format="parquet")
    ordered = _ordered(dataset)
    kept: list[Place] = []
    total = 0
    for place, size in ordered:
        total += size
        if kept and total > most_bytes:
            break
        kept.append(place)
    return Samples(_read(dataset, kept), len(ordered) - len(kept))


def disagreement(scores: list[float | None], lengths: list[int]) -> tuple[bool, float]:
    """How far policies are apart on a prompt, to be compared: the range of their scores.

    Prompts of which fewer than two responses have a score come behind all others, by the range of lengths.
    """
    known = [score for score in scores if score is not None]
    if len(known) > 1:
        return True, max(known) - min(known)
    return False, float(max(lengths) - min(lengths))


def _ordered(dataset: pads.Dataset) -> list[tuple[Place, int]]:
    """Every (seed, place) with the bytes of its texts, the largest disagreement first. Reads no text into memory."""
    columns = {name: pads.field(name) for name in ("seed", "place", "score", "num_tokens")}
    columns["prompt_size"] = pc.binary_length(pads.field("prompt"))
    columns["response_size"] = pc.binary_length(pads.field("response"))
    found: dict[Place, tuple[list[float | None], list[int], list[int]]] = {}
    for batch in dataset.to_batches(columns=columns):
        rows = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
        for seed, place, score, num_tokens, prompt_size, response_size in rows:
            scores, lengths, sizes = found.setdefault((seed, place), ([], [], [prompt_size]))
            scores.append(score)
            lengths.append(num_tokens)
            sizes.append(response_size)
    apart = {place: disagreement(scores, lengths) for place, (scores, lengths, _) in found.items()}
    order = sorted(found, key=lambda place: (not apart[place][0], -apart[place][1], place))
    return [(place, sum(found[place][2])) for place in order]


def _read(dataset: pads.Dataset, kept: list[Place]) -> list[SideBySide]:
    """The texts of these places, in their order."""
    wanted = set(kept)
    rows: dict[Place, SideBySide] = {}
    chosen = pads.field("place").isin(pa.array(sorted({place for _, place in kept}), pa.int32()))
    for row in dataset.to_table(filter=chosen).to_pylist():
        place = (row["seed"], row["place"])
        if place in wanted:
            side_by_side = rows.setdefault(place, SideBySide(*place, row["prompt"], {}))
            if side_by_side.prompt != row["prompt"]:
                raise ValueError(f"samples are put side by side by prompt, and place {place} has two prompts")
            side_by_side.answers[row["policy"]] = (row["response"], row["score"], row["num_tokens"])
    return [rows[place] for place in kept]
