"""The names of the files that stages leave, and the only reader of the rows that training logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefarena.errors import UserError

#: Of every stage, written last: the one or the other says that there is nothing more to come.
MANIFEST, FAILURE = "manifest.json", "failure.json"

#: Of a training: rows of metrics, and faults that were mended, as JSON lines.
METRICS, FAULTS = "metrics.jsonl", "faults.jsonl"
#: Names the attempt at a training that is the current one; there from the moment its workers look for a checkpoint.
ATTEMPT = "attempt.json"
#: What a training is predicted to hold in memory.
MEMORY = "memory.json"
#: Folders of a training: the model that it made, its adapter, policies on the way, and what it goes on from.
MODEL, ADAPTER, SNAPSHOTS, CHECKPOINTS = "model", "adapter", "snapshots", "checkpoints"
#: Of a training online: a table for each step at which pairs were drawn.
DRAWN_PAIRS = "drawn"

#: Of an evaluation: what was measured; of every response, the reward of an entry, or a policy's log-probs.
ROW, SCORES, LOGPS = "row.json", "scores.npy", "logps.npy"
#: Of abilities: every metric of every item.
ITEMS = "items.parquet"
#: Of an evaluation of best-of-n: of ever more samples.
BEST_OF_CURVE = "curve.json"
#: Of an evaluation through training, of one from samples, and of a comparison by pairs.
TRAJECTORY, SAMPLE_SCORES, RESPONSES, GAMES = "trajectory.json", "scores.npz", "responses.json", "games.npz"
#: Of pairs in the enumerable language: the gold reward, and every reward and reference log-prob.
GOLD, EXACT = "gold.json", "exact.npz"

_TAIL_BYTES = 8192


def read_log(path: Path, *, under_way: bool = False) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, such as metrics.jsonl; none where there is no such file.

    under_way: what is no JSON is left out, since it is being written, or a killed process was writing it. Of a finished
    stage it raises UserError naming the file and the line.
    """
    return parse_log(path.read_text(encoding="utf-8", errors="replace"), path, under_way) if path.is_file() else []


def parse_log(text: str, path: Path, under_way: bool) -> list[dict[str, Any]]:
    """The rows of a file's text, as `read_log` returns them."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if not under_way:
                raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from None
    return rows


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole row, read only from the end of the file; None if there is none yet."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        *lines, _ = file.read().split(b"\n")
    return next((json.loads(line) for line in reversed(lines) if line.startswith(b"{")), None)
