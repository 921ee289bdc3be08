"""Labelled single responses with the reference's log-probs, for methods that learn from those.

Beside its own response each row has a mismatched one, a response to another prompt, from which KTO estimates how far
the policy is from the reference. It is part of the data: so its reference log-probs are a column like the others,
computed once by Ray Data, and no training worker holds the reference. What scores pairs (reference.py) scores both.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.reference import TRAIN, score_rows
from prefarena.config import Resources
from prefarena.data.responses import mismatch, taken_apart
from prefarena.data.tables import read_rows, write_rows
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.records import REFERENCED_RESPONSES
from prefarena.stages import write_manifest

#: The folder of the stage with what is trained on.
RESPONSES = "train_responses"


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

    singles: a table of records.RESPONSES; None means the training pairs under `pairs`, taken apart. Raises UserError
    where no mismatched responses can be found.
    """
    started = time.perf_counter()
    rows = taken_apart(read_rows(pairs / TRAIN)) if singles is None else read_rows(singles)
    scored, scoring = score_rows(
        _as_pairs(rows), RESPONSES, reference, folder, arithmetic,
        cache=cache, resources=resources, max_length=max_length,
    )  # fmt: skip
    write_rows(_of_responses(scored), folder / RESPONSES / "part-0.parquet", REFERENCED_RESPONSES)
    counts: dict[str, Any] = {"num_responses": rows.num_rows, "num_desirable": sum(rows["label"].to_pylist())}
    write_manifest(folder, {**scoring.contents(started), **counts})


def _as_pairs(rows: pa.Table) -> pa.Table:
    """Put each response and its mismatched one together, as PAIRS."""
    others = rows["response_ids"].take(pa.array(mismatch(rows)))
    renamed = rows.rename_columns({"response_ids": "chosen_ids"})
    return renamed.append_column("rejected_ids", others)


def _of_responses(scored: pa.Table) -> pa.Table:
    """The inverse of `_as_pairs`, with the reference's log-probs."""
    names = {
        "chosen_ids": "response_ids", "rejected_ids": "mismatched_ids",
        "ref_chosen_logp": "ref_logp", "ref_rejected_logp": "ref_mismatched_logp",
    }  # fmt: skip
    return scored.rename_columns(names)
