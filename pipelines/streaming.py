"""Rows of files through Ray Data, in their order: read in chunks by tasks, and prepared by a pool of actors.

Blocks are small and the object store's share is capped, so memory does not grow with the data.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pyarrow as pa

from prefarena.cluster.pools import map_in_pool, through_deaths
from prefarena.config import TextTask
from prefarena.data.sources import BrokenFile, Chunk, Part, approximate_bytes, read_chunks
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError

_BLOCK_BYTES = 2 << 20
_STORE_BYTES = 256 << 20  # object store memory that one pipeline may fill
_ACTOR_BYTES = 16 << 20  # of text for which it is worth starting one more actor

_BROKEN = "broken"  # the kind of a chunk, and the reason of a row, that tells of a file that cannot be read
Prepare = Callable[[Chunk, TextTask, Tokenizer], pa.Table]

_CHUNKS = pa.schema([("file", pa.string()), ("first", pa.int64()), ("kind", pa.string()), ("data", pa.binary())])


def first_of(tables: Iterable[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    """Yield the first `limit` rows of the tables, or all; no table is requested beyond them."""
    num_rows = 0
    for rows in tables:
        rows = rows if limit is None else rows.slice(0, limit - num_rows)
        yield rows
        num_rows += rows.num_rows
        if num_rows == limit:
            return


def stream(
    task: TextTask,
    parts: list[Part],
    columns: tuple[str, ...],
    limit: int | None,
    prepare: Prepare,
    tokenizer: tuple[str, str | None],
    most: int | None,
) -> Iterator[pa.Table]:
    """The parts' rows, in order, prepared by at most `most` actors. Raises UserError at a file that cannot be read.

    `tokenizer`: its path and revision. Where an actor dies, everything is read again and the rows that were yielded
    are passed over: rows come in the same order every time.
    """
    num_yielded = 0

    def attempt() -> Iterator[pa.Table]:
        to_pass_over = num_yielded
        for rows in _blocks(task, parts, columns, limit, prepare, tokenizer, most):
            passed_over = min(to_pass_over, rows.num_rows)
            to_pass_over -= passed_over
            if passed_over < rows.num_rows:
                yield rows.slice(passed_over)

    for rows in through_deaths(attempt, "preparing the data"):
        num_yielded += rows.num_rows
        if _BROKEN in rows["reason"].unique().to_pylist():
            told = next(row for row in rows.select(["reason", "detail"]).to_pylist() if row["reason"] == _BROKEN)
            raise UserError(told["detail"])
        yield rows


def _blocks(
    task: TextTask,
    parts: list[Part],
    columns: tuple[str, ...],
    limit: int | None,
    prepare: Prepare,
    tokenizer: tuple[str, str | None],
    most: int | None,
) -> Iterator[pa.Table]:
    """A block of prepared rows for each chunk of the parts, in their order."""
    import ray
    from ray.data import DataContext, ExecutionResources

    if not ray.is_initialized():
        ray.init()
    most = max(1, most or int(ray.cluster_resources().get("CPU", 1)))
    context = DataContext.get_current().copy()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_STORE_BYTES)
    read = functools.partial(_read, columns=columns, most_bytes=task.max_row_bytes, limit=limit)
    with DataContext.current(context):
        data = ray.data.from_items([vars(part) for part in parts], override_num_blocks=len(parts))
        # Different CPU shares keep the two steps from being fused: one big file then still feeds every actor.
        chunks = data.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.1)
        done = map_in_pool(
            chunks,
            _Prepare,
            min(most, 1 + approximate_bytes(parts) // _ACTOR_BYTES),
            fn_constructor_args=(prepare, task, *tokenizer),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.9,
        )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield cast(pa.Table, batch)


def _read(batch: pa.Table, columns: tuple[str, ...], most_bytes: int, limit: int | None) -> Iterator[pa.Table]:
    """The chunks of the parts in a batch, one at a time; a file that cannot be read ends with one that says so."""
    for fields in batch.to_pylist():
        part = Part(**fields)
        try:
            for chunk in read_chunks(part, columns, most_bytes, limit):
                yield pa.Table.from_pylist([vars(chunk)], schema=_CHUNKS)
        except BrokenFile as error:
            yield pa.Table.from_pylist(
                [{"file": part.path, "first": 0, "kind": _BROKEN, "data": str(error).encode()}], schema=_CHUNKS
            )


class _Prepare:
    """Chunks of raw rows to prepared rows; a file that cannot be read travels as a row, for the driver to say it."""

    def __init__(self, prepare: Prepare, task: TextTask, path: str, revision: str | None) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # an actor has one CPU
        self.prepare = prepare
        self.task = task
        self.tokenizer = Tokenizer.load(path, revision, task)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables([self._prepared(fields) for fields in batch.to_pylist()])

    def _prepared(self, fields: dict[str, Any]) -> pa.Table:
        if fields["kind"] != _BROKEN:
            return self.prepare(Chunk(**fields), self.task, self.tokenizer)
        schema = self.prepare(Chunk(fields["file"], 1, "lines", b""), self.task, self.tokenizer).schema
        told = {"file": fields["file"], "row": 0, "reason": _BROKEN, "detail": fields["data"].decode()}
        return pa.Table.from_pylist([told], schema=schema)
