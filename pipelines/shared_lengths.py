"""The reference's log-probs of as many first tokens as the shorter response of a pair has, for LD-DPO's weighting.

A log-prob of first tokens is that of the response cut off behind them: what scores pairs (reference.py) scores the cut
ones. Only the longer response of a pair has something to cut; the other keeps the score that it has, to the last bit.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.reference import TRAIN, score_rows
from prefarena.config import Resources
from prefarena.data.tables import TokenColumn, read_rows, write_rows
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.records import PAIRS, SHARED_PAIRS, conformed
from prefarena.stages import write_manifest

_SIDES = ("chosen", "rejected")


def add_shared_logps(
    scored: Path,
    reference: str,
    folder: Path,
    *,
    cache: Path,
    resources: Resources,
    max_length: int | None = None,
    arithmetic: Arithmetic = "float32",
) -> None:
    """Write train_pairs/ (SHARED_PAIRS) and the manifest to `folder`; under `scored` they are REFERENCED_PAIRS."""
    started = time.perf_counter()
    rows = read_rows(scored / TRAIN)
    scored_cut, scoring = score_rows(
        cut(rows), TRAIN, reference, folder, arithmetic, cache=cache, resources=resources, max_length=max_length
    )
    write_rows(_joined(rows, scored_cut), folder / TRAIN / "part-0.parquet", SHARED_PAIRS)
    write_manifest(folder, scoring.contents(started))


def cut(pairs: pa.Table) -> pa.Table:
    """Cut both responses of the pairs (PAIRS) to no more tokens than the shorter one has."""
    sides = [TokenColumn.of(pairs, f"{side}_ids") for side in _SIDES]
    shorter = np.minimum(sides[0].lengths, sides[1].lengths)
    every = np.arange(pairs.num_rows)
    for side, column in zip(_SIDES, sides, strict=True):
        ids = [ids[:length] for ids, length in zip(column.take(every), shorter, strict=True)]
        place = pairs.schema.get_field_index(f"{side}_ids")
        pairs = pairs.set_column(place, f"{side}_ids", pa.array(ids, pa.list_(pa.int32())))
    return conformed(pairs, PAIRS)


def _joined(pairs: pa.Table, scored: pa.Table) -> pa.Table:
    """`pairs` with two more columns; `scored`: the cut pairs with the reference's log-probs, in the same order."""
    if pairs["id"].to_pylist() != scored["id"].to_pylist():
        raise ValueError("the cut pairs are not those that were cut")
    lengths = [TokenColumn.of(pairs, f"{side}_ids").lengths for side in _SIDES]
    for side, own, other in zip(_SIDES, lengths, lengths[::-1], strict=True):
        whole, of_cut = (table[f"ref_{side}_logp"].to_numpy() for table in (pairs, scored))
        found = np.where(own > other, of_cut, whole).astype(np.float32)
        pairs = pairs.append_column(f"ref_{side}_shared_logp", pa.array(found))
    return pairs
