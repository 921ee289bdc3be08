"""Where rows come from: jsonl(.gz) and parquet files, folders of them, saved `datasets`, hub ids.

Rows are read in pieces, in the order in which they are written, with the file and the line (or row) that they came
from. Nothing here holds a whole file. Lines end at b"\\n" alone: other characters that Unicode calls line ends may
stand inside a JSON string.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from prefarena.errors import UserError

_JSONL = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz")
_SUFFIXES = (*_JSONL, ".parquet")
_DATASET_FILES = ("state.json", "dataset_dict.json")
_DATASET_PART = 10_000  # rows of a `datasets` table that one reader takes
_READ_BATCH = 256  # rows taken from a parquet file or a `datasets` table at once


@dataclass(frozen=True)
class Part:
    """What one reader reads: a file, or the rows from `start` to `stop` of a `datasets` table."""

    kind: Literal["jsonl", "parquet", "saved", "hub"]
    path: str
    split: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class RawRow:
    """A row as JSON. `row` is the line number in a jsonl file, else the row number; both start at 1."""

    file: str
    row: int
    data: bytes


class BrokenRow(Exception):
    """A line that is not JSON, or a file that breaks off; the message names file and line."""


def find_parts(path: str, split: str) -> list[Part]:
    """What there is to read at `path`, in a fixed order. Raises UserError where there is nothing."""
    fs, root = fsspec.core.url_to_fs(os.path.expanduser(path))
    if fs.isfile(root):
        return [_file_part(path, fs.unstrip_protocol(root))]
    if fs.isdir(root):
        names = sorted(fs.ls(root, detail=False))
        if any(name.rsplit("/", 1)[-1] in _DATASET_FILES for name in names):
            return _table_parts("saved", root, split)
        files = [name for name in names if name.endswith(_SUFFIXES)]
        if not files:
            raise UserError(f"{path}: the folder holds no jsonl or parquet file, and no saved dataset")
        return [_file_part(path, fs.unstrip_protocol(name)) for name in files]
    looks_like_path = path.endswith(_SUFFIXES) or path.startswith((".", "/", "~")) or "://" in path
    if looks_like_path or path.count("/") > 1:
        raise UserError(f"{path}: no such file or folder")
    return _table_parts("hub", path, split)


def read_part(part: Part, columns: tuple[str, ...], limit: int | None = None) -> Iterator[RawRow]:
    """The rows of a part (its first `limit`). `columns` are all that is kept of tables; lines are kept whole.

    Raises BrokenRow where a compressed or parquet file is damaged.
    """
    rows = {"jsonl": _read_jsonl, "parquet": _read_parquet, "saved": _read_table, "hub": _read_table}[part.kind]
    for count, row in enumerate(rows(part, columns)):
        if limit is not None and count >= limit:
            return
        yield row


def column_names(part: Part) -> list[str]:
    """The columns of a part's first rows."""
    if part.kind == "jsonl":
        return sorted({name for raw in read_part(part, (), 20) for name in parse(raw)})
    if part.kind == "parquet":
        with fsspec.open(part.path, "rb") as raw_file:
            return list(pq.read_schema(raw_file).names)
    return list(_load_table(part.kind, part.path, part.split).column_names)


def parse(row: RawRow) -> dict[str, Any]:
    """The JSON object of a row. Raises BrokenRow naming file and line."""
    try:
        value = json.loads(row.data)
    except (ValueError, RecursionError) as error:
        raise BrokenRow(f"{row.file}:{row.row}: the line is not valid JSON ({_what(error)})") from None
    if not isinstance(value, dict):
        raise BrokenRow(f"{row.file}:{row.row}: the line is not a JSON object but {type(value).__name__}")
    return value


def _what(error: Exception) -> str:
    return str(error) or type(error).__name__


def _file_part(given: str, url: str) -> Part:
    path = url.removeprefix("file://")
    if path.endswith(".parquet"):
        return Part("parquet", path)
    if path.endswith(_JSONL):
        return Part("jsonl", path)
    raise UserError(f"{given}: neither jsonl, jsonl.gz nor parquet, by its name")


def _read_jsonl(part: Part, columns: tuple[str, ...]) -> Iterator[RawRow]:
    number = 0
    try:
        with fsspec.open(part.path, "rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if part.path.endswith(".gz") else raw
            for number, line in enumerate(lines, start=1):  # binary files split at b"\n" alone
                if line.strip():
                    yield RawRow(part.path, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BrokenRow(f"{part.path}:{number + 1}: the compressed file is damaged ({_what(error)})") from None


def _read_parquet(part: Part, columns: tuple[str, ...]) -> Iterator[RawRow]:
    number = 0
    try:
        with fsspec.open(part.path, "rb") as raw:
            file = pq.ParquetFile(raw)
            names = [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(batch_size=_READ_BATCH, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(part.path, number, _as_json(row))
    except (pa.ArrowException, OSError) as error:
        first_line = _what(error).splitlines()[0]
        raise BrokenRow(f"{part.path}: row {number + 1}: not readable as parquet ({first_line})") from None


def _read_table(part: Part, columns: tuple[str, ...]) -> Iterator[RawRow]:
    table = _load_table(part.kind, part.path, part.split)
    table = table.select_columns([name for name in table.column_names if name in columns])
    for start in range(part.start, part.stop, _READ_BATCH):
        batch = table[start : min(start + _READ_BATCH, part.stop)]
        for i, values in enumerate(zip(*batch.values(), strict=True)):
            yield RawRow(part.path, start + i + 1, _as_json(dict(zip(batch, values, strict=True))))


def _as_json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, default=str).encode()


def _table_parts(kind: Literal["saved", "hub"], path: str, split: str) -> list[Part]:
    size = len(_load_table(kind, path, split))
    starts = range(0, size, _DATASET_PART)
    return [Part(kind, path, split, start, min(start + _DATASET_PART, size)) for start in starts]


def _load_table(kind: str, path: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`. Raises UserError where it, or the split, is not to be had."""
    import datasets

    try:
        if kind == "hub":
            return datasets.load_dataset(path, split=split)
        table = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = _what(error).splitlines()[0]
        kind_name = "hub dataset" if kind == "hub" else "saved dataset"
        raise UserError(f"{path}: cannot be read as a {kind_name} with a split {split!r} ({first_line})") from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserError(f"{path}: there is no split {split!r}; there are {', '.join(table)}")
        return table[split]
    return table
