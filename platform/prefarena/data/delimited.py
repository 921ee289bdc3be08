"""Rows of csv and tsv files, as Arrow tables of some rows each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from prefarena.data.compression import CHECKS
from prefarena.data.labels import SCORES

_BLOCK_BYTES = 8 << 20  # the longest row of which the first block must hold one
_NUMBERS = ("label", *SCORES)


def read_delimited(
    opened: Callable[[], AbstractContextManager[Any]], path: str, columns: tuple[str, ...], most_bytes: int
) -> Iterator[pa.Table]:
    """The rows of a file; `columns` are all that is kept. Cells are text, those of number columns numbers.

    `opened` opens the file.

    Raises pyarrow.ArrowInvalid where the file breaks the format, or a row has more than `most_bytes`.
    """
    names = [name for name in column_names(opened, path) if name in columns]
    if not names:
        return
    converting = pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string()))
    with opened() as stream, pacsv.open_csv(stream, **_options(path, most_bytes), convert_options=converting) as reader:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            for i, name in enumerate(names):
                if name in _NUMBERS:
                    table = table.set_column(i, name, _number(table[name]))
            yield table


def delimited_schema(opened: Callable[[], AbstractContextManager[Any]], path: str) -> pa.Schema:
    """The schema of a file: text columns, and number columns where they are read as such."""
    names = column_names(opened, path)
    return pa.schema([(name, pa.float64() if name in _NUMBERS else pa.string()) for name in names])


def column_names(opened: Callable[[], AbstractContextManager[Any]], path: str) -> list[str]:
    """The cells of the first line; empty where the file is."""
    with opened() as stream:
        first = stream.read(1)
        if not first:
            return []
    with opened() as stream, pacsv.open_csv(stream, **_options(path, 0)) as reader:
        return list(reader.schema.names)


def _options(path: str, most_bytes: int) -> dict[str, Any]:
    is_tabbed = path.lower().endswith((".tsv", *(f".tsv{end}" for end in CHECKS)))
    return {
        "parse_options": pacsv.ParseOptions(delimiter="\t" if is_tabbed else ",", newlines_in_values=True),
        "read_options": pacsv.ReadOptions(block_size=max(_BLOCK_BYTES, 2 * most_bytes), use_threads=False),
    }


def _number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert text cells to whole numbers, else to numbers, else leave them; blank ones become null."""
    cells = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, pa.string()), column)
    for kind in (pa.int64(), pa.float64()):
        try:
            return pc.cast(cells, kind)
        except pa.ArrowInvalid:
            continue
    return cells
