"""Where rows come from: JSON lines, JSON arrays, csv and parquet files, folders of them, saved `datasets`, hub ids.

A part is read in chunks: some lines of a file, or some rows of a table, with the number of the first of them. A chunk
is what travels to the processes that parse it; nothing here holds a whole file. A row that cannot be parsed is an
`Unusable` in its place; a file that cannot be read, or breaks off, is a `BrokenFile`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from prefarena.data.arrays import BadArray
from prefarena.data.compression import CHECKS, Damaged, Decompressed, ending
from prefarena.data.delimited import delimited_schema, read_delimited
from prefarena.data.files import choose, listed
from prefarena.data.lines import WrongFile, parse_line, read_lines
from prefarena.data.rejections import TOO_LARGE, Unusable
from prefarena.errors import UserError
from prefarena.stores import file_system, fingerprint, is_url, reaching

_JSONL = tuple(kind + end for kind in (".jsonl", ".ndjson", ".json") for end in ("", *CHECKS))
_DELIMITED = tuple(kind + end for kind in (".csv", ".tsv") for end in ("", *CHECKS))
_SUFFIXES = (*_JSONL, *_DELIMITED, ".parquet")
_HEAD_BYTES = 64 << 10  # of a file that may be metadata
_DATASET_PART = 10_000  # rows of a `datasets` table that one reader takes
_COMPRESSION = 3  # of gzip and parquet files, about
_ROW_BYTES = 1500  # of a `datasets` table, about
_HUB_LIMIT_S = 20.0
_CHUNK_BYTES = 256 << 10
_CHUNK_ROWS = 256  # most rows of a table in a chunk


@dataclass(frozen=True)
class Part:
    """The input of one reader: a file, or the rows from `start` to `stop` of a `datasets` table.

    split: the split, of a table that has splits.
    """

    kind: Literal["jsonl", "parquet", "csv", "saved", "hub"]
    path: str
    split: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of a file: `data` is lines, or rows of a table in Arrow's stream format.

    `first` is the line number in a jsonl file, else the row number, from 1. A `too_long` line's data is left out.
    """

    file: str
    first: int
    kind: Literal["lines", "table", "too_long"]
    data: bytes


class BrokenFile(Exception):
    """A file that cannot be read to its end; the message names it, where it breaks, and what to do."""


@dataclass(frozen=True)
class Found:
    """The parts to read, and a sentence for each thing that is not read."""

    parts: list[Part]
    notes: list[str]


def find_parts(path: str, split: str) -> list[Part]:
    """Find the parts to read at `path`, in a fixed order. Raises UserError where there is nothing."""
    return survey(path, split).parts


def survey(path: str, split: str, settings: tuple[str, str] = ("task.data", "task.split")) -> Found:
    """Like `find_parts`, but with the notes. `settings` names the settings of path and split, for errors."""
    with reaching(path):
        return _survey(path, split, settings)


def _survey(path: str, split: str, settings: tuple[str, str]) -> Found:
    fs, root = file_system(path)
    if fs.isfile(root):
        return Found([_file_part(path, fs.unstrip_protocol(root))], [])
    if fs.isdir(root):
        return _survey_folder(path, fs, root, split, settings)
    looks_like_path = path.lower().endswith(_SUFFIXES) or path.startswith((".", "/", "~")) or "://" in path
    if looks_like_path or path.count("/") > 1:
        raise UserError(f"{path}: no such file or folder")
    return Found(_table_parts("hub", path, split), [])


def _survey_folder(path: str, fs: Any, root: str, split: str, settings: tuple[str, str]) -> Found:
    entries = [(entry["name"], entry["type"] == "directory") for entry in fs.ls(root, detail=True)]
    entries = [entry for entry in entries if entry[0].rstrip("/") != root.rstrip("/")]  # a store may list it, too
    there = {name.rstrip("/").rsplit("/", 1)[-1]: name for name, _ in entries}
    folders = [name.rstrip("/").rsplit("/", 1)[-1] for name, is_folder in entries if is_folder]
    files = [name for name in there if name not in folders]
    choice = choose(path, files, folders, _SUFFIXES, split, lambda name: fs.head(there[name], _HEAD_BYTES), settings)
    if "dataset_dict.json" in files or ("state.json" in files and not choice.files):
        saved = fs.unstrip_protocol(root).removeprefix("file://")
        return Found(_table_parts("saved", saved, split if "dataset_dict.json" in files else ""), [])
    if not choice.files:
        inside = f" ({listed(sorted(f'{name}/' for name in folders))} in it are not searched)" if folders else ""
        raise UserError(
            f"{path}: the folder holds no jsonl or parquet file, and no saved dataset{inside}; give the files' own "
            "folder"
        )
    return Found([_file_part(path, fs.unstrip_protocol(there[name])) for name in choice.files], choice.notes)


def version_of(path: str) -> list[Any]:
    """A mark that changes with the content of remote data: of the files under a URL, or a hub dataset's commit.

    Empty for paths, and where nothing is found. Of a hub dataset that cannot be asked, the commit that was downloaded
    last, as that is what will be read.
    """
    if is_url(path):
        return list(fingerprint(path))
    if (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or path.lower().endswith(_SUFFIXES)
        or Path(path).exists()
    ):
        return []
    return [commit] if (commit := _hub_commit(path)) else []


def _hub_commit(name: str) -> str | None:
    from huggingface_hub import HfApi, constants, file_download
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name, timeout=_HUB_LIMIT_S).sha
    except (OfflineModeIsEnabled, HTTPError, HFValidationError, OSError):
        folder = file_download.repo_folder_name(repo_id=name, repo_type="dataset")
        known = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
        return known.read_text(encoding="ascii").strip() if known.is_file() else None


def approximate_bytes(parts: list[Part]) -> int:
    """About how much text there is to read."""
    size = 0
    for part in parts:
        if part.kind in ("jsonl", "parquet", "csv"):
            fs, root = fsspec.core.url_to_fs(part.path)
            size += (fs.size(root) or 0) * (_COMPRESSION if part.path.lower().endswith((".parquet", *CHECKS)) else 1)
        else:
            size += (part.stop - part.start) * _ROW_BYTES
    return size


def read_chunks(part: Part, columns: tuple[str, ...], most_bytes: int, limit: int | None = None) -> Iterator[Chunk]:
    """The rows of a part, in order; with `limit` no chunks beyond that many rows.

    `columns` are all that is kept of tables; lines are kept whole. A row of more than `most_bytes` is not held. Raises
    BrokenFile where a file cannot be read.
    """
    read = {
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "csv": _read_csv,
        "saved": _read_table,
        "hub": _read_table,
    }[part.kind]
    num_rows = 0
    for chunk in read(part, columns, most_bytes):
        yield chunk
        if limit is not None:
            num_rows += sum(1 for _ in raw_rows(chunk))
            if num_rows >= limit:
                return


def rows_of(chunk: Chunk, most_bytes: int) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    """The rows of a chunk with their numbers; blank lines are none."""
    for number, row in raw_rows(chunk):
        try:
            if row is None or (isinstance(row, dict) and len(chunk.data) > most_bytes and _size(row) > most_bytes):
                raise Unusable(TOO_LARGE, f"more than task.max_row_bytes {most_bytes}")
            yield number, parse_line(row) if isinstance(row, bytes) else row
        except Unusable as error:
            yield number, error


def raw_rows(chunk: Chunk) -> Iterator[tuple[int, bytes | dict[str, Any] | None]]:
    """The rows of a chunk with their numbers, lines unparsed; None for one that is too long."""
    if chunk.kind == "too_long":
        yield chunk.first, None
    elif chunk.kind == "table":
        with pa.ipc.open_stream(chunk.data) as stream:
            yield from enumerate(stream.read_all().to_pylist(), start=chunk.first)
    else:
        for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first):
            if line and not line.isspace():
                yield number, line


def read_rows_of(
    part: Part, columns: tuple[str, ...], most_bytes: int, limit: int | None = None
) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    """The rows of a part (its first `limit`) with their numbers."""
    count = 0
    for chunk in read_chunks(part, columns, most_bytes, limit):
        for numbered in rows_of(chunk, most_bytes):
            yield numbered
            count += 1
            if count == limit:
                return


def table_schema(part: Part) -> pa.Schema | None:
    """The columns of a table; None for lines, of which each has its own. Raises BrokenFile where there are none."""
    if part.kind == "jsonl":
        return None
    if part.kind == "csv":
        with _broken_at(part, lambda: 1):
            return delimited_schema(functools.partial(_opened, part), part.path)
    if part.kind == "parquet":
        try:
            with fsspec.open(part.path, "rb") as raw:
                return pq.read_schema(raw)
        except (pa.ArrowException, OSError) as error:
            raise _damaged_parquet(part, 1, error) from None
    return _load_table(part.kind, part.path, part.split).features.arrow_schema


def _size(row: dict[str, Any]) -> int:
    return len(json.dumps(row, default=str, ensure_ascii=False))


def _what(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _file_part(given: str, url: str) -> Part:
    path = url.removeprefix("file://")
    if path.lower().endswith(".parquet"):
        return Part("parquet", path)
    if path.lower().endswith(_JSONL):
        return Part("jsonl", path)
    if path.lower().endswith(_DELIMITED):
        return Part("csv", path)
    raise UserError(
        f"{given}: neither jsonl, json, csv (each also compressed: {', '.join(CHECKS)}) nor parquet, by its name; "
        "rename or convert it"
    )


@contextmanager
def _opened(part: Part) -> Iterator[Any]:
    with fsspec.open(part.path, "rb") as raw:
        yield Decompressed(raw, part.path)


@contextmanager
def _broken_at(part: Part, following: Callable[[], int]) -> Iterator[None]:
    """Turn a reader's error into a BrokenFile, at the line or row that `following` gives."""
    try:
        yield
    except (WrongFile, BadArray) as error:
        raise BrokenFile(f"{part.path}: {error}") from None
    except Damaged as error:
        raise BrokenFile(
            f"{part.path}:{following()}: the compressed file is damaged at this line or after it ({error}); "
            f"get it again, and check it by `{CHECKS[ending(part.path)]}`"
        ) from None
    except pa.ArrowException as error:
        raise BrokenFile(
            f"{part.path}:{following()}: not readable as csv from here on ({_what(error)}); fix the file"
        ) from None
    except OSError as error:
        raise BrokenFile(f"{part.path}:{following()}: the file cannot be read ({_what(error)})") from None


def _read_jsonl(part: Part, columns: tuple[str, ...], most_bytes: int) -> Iterator[Chunk]:
    following = 1
    with _broken_at(part, lambda: following), _opened(part) as stream:
        for lines in read_lines(stream, _CHUNK_BYTES, most_bytes):
            following = lines.first + lines.data.count(b"\n") + 1
            yield Chunk(part.path, lines.first, "too_long" if lines.too_long else "lines", lines.data)


def _read_csv(part: Part, columns: tuple[str, ...], most_bytes: int) -> Iterator[Chunk]:
    first = 1
    with _broken_at(part, lambda: first):
        for table in read_delimited(functools.partial(_opened, part), part.path, columns, most_bytes):
            for start in range(0, table.num_rows, _CHUNK_ROWS):
                rows = table.slice(start, _CHUNK_ROWS)
                yield _table_chunk(part, first, rows)
                first += rows.num_rows


def _read_parquet(part: Part, columns: tuple[str, ...], most_bytes: int) -> Iterator[Chunk]:
    first = 1
    try:
        with fsspec.open(part.path, "rb") as raw:
            file = pq.ParquetFile(raw)
            names = [name for name in file.schema_arrow.names if name in columns]
            for group in range(file.num_row_groups):
                size = _rows_at_once(file.metadata.row_group(group), names)
                for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=names):
                    yield _table_chunk(part, first, pa.Table.from_batches([batch]))
                    first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged_parquet(part, first, error) from None


def _rows_at_once(group: Any, names: list[str]) -> int:
    """Rows of a parquet row group that make up a chunk, by their mean size: huge rows are taken singly."""
    columns = [group.column(i) for i in range(group.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in names)
    return max(1, min(_CHUNK_ROWS, 4 * _CHUNK_BYTES * group.num_rows // max(1, size)))


def _damaged_parquet(part: Part, row: int, error: Exception) -> BrokenFile:
    return BrokenFile(f"{part.path}:{row}: not readable as parquet ({_what(error)}); get or write the file again")


def _read_table(part: Part, columns: tuple[str, ...], most_bytes: int) -> Iterator[Chunk]:
    table = _load_table(part.kind, part.path, part.split)
    table = table.select_columns([name for name in table.column_names if name in columns]).with_format("arrow")
    for start in range(part.start, part.stop, _CHUNK_ROWS):
        yield _table_chunk(part, start + 1, table[start : min(start + _CHUNK_ROWS, part.stop)])


def _table_chunk(part: Part, first: int, table: pa.Table) -> Chunk:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Chunk(part.path, first, "table", sink.getvalue().to_pybytes())


def _table_parts(kind: Literal["saved", "hub"], path: str, split: str) -> list[Part]:
    size = len(_load_table(kind, path, split))
    starts = range(0, size, _DATASET_PART)
    return [Part(kind, path, split, start, min(start + _DATASET_PART, size)) for start in starts]


def _load_table(kind: str, path: str, split: str) -> Any:
    """Load a memory-mapped `datasets.Dataset`. Raises UserError where it, or the split, is not available."""
    import datasets

    try:
        if kind == "hub":
            return datasets.load_dataset(path, split=split)
        table = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = _what(error)
        kind_name = "hub dataset" if kind == "hub" else "saved dataset"
        raise UserError(
            f"{path}: cannot be read as a {kind_name}{f' with a split {split!r}' if split else ''} ({first_line})"
        ) from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserError(f"{path}: there is no split {split!r}; there are {', '.join(table)}")
        return table[split]
    return table
