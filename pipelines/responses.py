"""Labelled single responses with the reference's log-probs, for methods that learn from those.

Beside its own response each row has a mismatched one, a response to another prompt, from which KTO estimates how far
the policy is from the reference. It is part of the data: so its reference log-probs are a column like the others,
computed once by Ray Data, and no training worker holds the reference. What scores pairs (reference.py) scores both.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.reference import TRAIN, score_tables
from prefarena.config import Resources
from prefarena.data.responses import mismatch, taken_apart
from prefarena.data.tables import read_rows, write_rows
from prefarena.mirror import push
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.records import PAIRS, REFERENCED_RESPONSES
from prefarena.stages import write_manifest

#: Folders of the stage: what is trained on, and the same rows as the scorer of pairs reads and leaves them.
RESPONSES = "train_responses"
_AS_PAIRS, _SCORED = "as_pairs", "scored"


def add_responses(
    pairs: Path,
    singles: Path | None,
    reference: str,
    folder: Path,
    *,
    cache: Path,
    resources: Resources,
    max_length: int | None = None,
    arithmetic: Arithmetic = "float32",
) -> None:
    """Write train_responses/ and the manifest to `folder`.

    singles: a table of records.RESPONSES; none: the training pairs under `pairs`, taken apart. Raises UserError where
    no mismatched responses can be found.
    """
    started = time.perf_counter()
    rows = taken_apart(read_rows(pairs / TRAIN)) if singles is None else read_rows(singles)
    write_rows(_as_pairs(rows), folder / _AS_PAIRS / RESPONSES / "part-0.parquet", PAIRS)
    push(folder / _AS_PAIRS)  # the actors that score may be on other nodes
    scoring = score_tables(
        folder / _AS_PAIRS, reference, folder / _SCORED, {RESPONSES: arithmetic},
        cache=cache, resources=resources, max_length=max_length,
    )  # fmt: skip
    scored = read_rows(folder / _SCORED / RESPONSES)
    write_rows(_of_responses(scored), folder / RESPONSES / "part-0.parquet", REFERENCED_RESPONSES)
    for unneeded in (_AS_PAIRS, _SCORED):
        shutil.rmtree(folder / unneeded)
    counts: dict[str, Any] = {"num_responses": rows.num_rows, "num_desirable": sum(rows["label"].to_pylist())}
    write_manifest(folder, {**scoring.contents(started), **counts})


def _as_pairs(rows: pa.Table) -> pa.Table:
    """Each response beside its mismatched one, as PAIRS."""
    others = rows["response_ids"].take(pa.array(mismatch(rows)))
    renamed = rows.rename_columns({"response_ids": "chosen_ids"})
    return renamed.append_column("rejected_ids", others)


def _of_responses(scored: pa.Table) -> pa.Table:
    """The inverse, with the reference's log-probs."""
    names = {
        "chosen_ids": "response_ids", "rejected_ids": "mismatched_ids",
        "ref_chosen_logp": "ref_logp", "ref_rejected_logp": "ref_mismatched_logp",
    }  # fmt: skip
    return scored.rename_columns(names)
