"""A share of a text task's training prompts, set aside in place of the test prompts: what tuning is measured on.

    pairs ─▶ validation: the training prompts without a share of them, and those as the ones to test on

The rows that the data holds out to test on are left behind unread, so nothing that is chosen here has seen them.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prefarena.config import TextTask
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.mirror import bring
from prefarena.records import content_id
from prefarena.stages import costs_of, write_json, write_manifest

RESPONSES = "responses"


def is_set_aside(prompt_id: str, share: float, seed: int) -> bool:
    """Whether a training prompt is set aside for validation: by a seeded hash of its id, so independently of others."""
    digest = hashlib.sha256(f"validation:{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def set_aside(task: TextTask, pairs: Path, singles: Path | None, folder: Path) -> None:
    """Write the tables of `pairs` to `folder`, divided anew, and the manifest.

    pairs: a folder with prompts/, train_pairs/ and demonstrations/. singles: of single responses, where the task has
    such rows. Raises UserError where nothing is left to train on, or to validate on.
    """
    if task.validation_share is None:
        raise TypeError("nothing is set aside of this task")
    started, share = time.perf_counter(), task.validation_share
    prompts = read_rows(pairs / "prompts")
    prompts = prompts.filter(pc.equal(prompts["split"], "train"))
    aside = {name for name in prompts["id"].to_pylist() if is_set_aside(name, share, task.split_seed)}
    table = read_rows(pairs / "train_pairs")
    parts = {"train_pairs": _of(table, aside, inside=False), "test_pairs": _of(table, aside, inside=True)}
    for name, what in (("train_pairs", "train"), ("test_pairs", "validate")):
        if not parts[name].num_rows:
            raise UserError(
                f"tuning.validation_share {share:g} leaves no pairs to {what} on, of {table.num_rows} training pairs; "
                "give more data or another share"
            )
    parts["demonstrations"] = _of(read_rows(pairs / "demonstrations"), aside, inside=False)
    if singles is not None:
        bring(singles)
        parts[RESPONSES] = _of(read_rows(singles), aside, inside=False)
    parts["prompts"] = _divided(prompts, aside)
    for name, part in parts.items():
        write_rows(part, folder / name / "part-0.parquet", part.schema)
    summary: dict[str, Any] = {f"num_{name}": parts[name].num_rows for name in ("train_pairs", "test_pairs")}
    summary["notes"] = [
        f"{len(aside):,} of {prompts.num_rows:,} training prompts, with {summary['num_test_pairs']:,} of "
        f"{table.num_rows:,} pairs, are set aside for tuning; the test prompts are not used"
    ]
    write_json(folder / "summary.json", summary)
    write_manifest(folder, {"data": summary, "costs": costs_of(time.perf_counter() - started)})


def _of(rows: pa.Table, prompts: set[str], *, inside: bool) -> pa.Table:
    """Select the rows whose prompt is one of these, or is none of them."""
    found = [(content_id(ids) in prompts) == inside for ids in rows["prompt_ids"].to_pylist()]
    return rows.filter(pa.array(found, pa.bool_()))


def _divided(prompts: pa.Table, aside: set[str]) -> pa.Table:
    """The training prompts, of which those set aside become test prompts."""
    is_aside = [name in aside for name in prompts["id"].to_pylist()]
    covered = [own and not out for own, out in zip(prompts["covered"].to_pylist(), is_aside, strict=True)]
    split = pa.array(["test" if out else "train" for out in is_aside], pa.string())
    prompts = prompts.set_column(prompts.schema.get_field_index("covered"), "covered", pa.array(covered, pa.bool_()))
    return prompts.set_column(prompts.schema.get_field_index("split"), "split", split)
