"""What runs in pool actors of test_pools.py, and ends its process as a kill would."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from pipelines.reference import ReferenceLogps
from prefarena.config import TextTask
from prefarena.data.preparation import prepare_pairs
from prefarena.data.sources import Chunk
from prefarena.data.splits import NONE_HELD_OUT
from prefarena.data.tokenization import Tokenizer


def die_once(marker: Path) -> None:
    """End this process unless one has done so before."""
    if not marker.exists():
        marker.touch()
        os._exit(1)


def prepare(chunk: Chunk, task: TextTask, tokenizer: Tokenizer) -> pa.Table:
    """`prepare_pairs`, with no row held out."""
    return prepare_pairs(chunk, task, tokenizer, shares=NONE_HELD_OUT)


def prepare_and_die(chunk: Chunk, task: TextTask, tokenizer: Tokenizer) -> pa.Table:
    """`prepare`, but the process dies at the first chunk of the second file."""
    if Path(chunk.file).name == "b.jsonl":
        die_once(Path(chunk.file).with_name("died"))
    return prepare(chunk, task, tokenizer)


class ScoresAndDies(ReferenceLogps):
    """`ReferenceLogps`, but the process dies once, with one part done and the next one read."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        cache = Path(batch.to_pylist()[0]["scores"]).parent
        if any(cache.glob("*.npz")):
            die_once(cache / "died")
        return super().__call__(batch)


class AlwaysDies:
    """Dies at every call."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        os._exit(1)


class CannotBeMade:
    """Raises where it is made."""

    def __init__(self) -> None:
        raise ValueError("no such model")

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch
