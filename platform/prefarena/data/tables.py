"""Parquet tables of typed rows, read in an order that depends only on their content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefarena.mirror import bring
from prefarena.records import conformed

ROW_GROUP = 1024  # rows that are read or written at once where a table is not taken whole


def read_rows(path: str | Path, columns: list[str] | None = None, *, first: int | None = None) -> pa.Table:
    """A parquet file, or a folder of them, sorted by `id`: the order of files and blocks does not matter.

    first: read at most this many rows. Ids are hashes of content, so these are a random subset, the same on every
    machine, and within that of any larger number.
    """
    bring(path)
    wanted = None if columns is None else list(dict.fromkeys(["id", *columns]))
    table = pads.dataset(str(path), format="parquet").to_table(columns=wanted)
    rows = table.sort_by("id").combine_chunks()
    return rows if first is None else rows.slice(0, first)


def column_names(path: str | Path) -> list[str]:
    """The column names of a parquet file, or of a folder of them."""
    bring(path)
    return list(pads.dataset(str(path), format="parquet").schema.names)


def write_rows(table: pa.Table, path: str | Path, schema: pa.Schema) -> None:
    """One parquet file at `path`, with exactly `schema`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(conformed(table, schema), target, row_group_size=ROW_GROUP)


@dataclass(frozen=True)
class TokenColumn:
    """A column of int lists without Python objects: row i is values[offsets[i]:offsets[i + 1]]."""

    values: NDArray[np.int32]
    offsets: NDArray[np.int32]

    @classmethod
    def of(cls, table: pa.Table, name: str) -> TokenColumn:
        column = table[name].combine_chunks()
        return cls(column.values.to_numpy(), column.offsets.to_numpy())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of values in each row, [N]."""
        return np.diff(self.offsets).astype(np.int64)

    def take(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """Return the values of each of these rows, as views."""
        return [self.values[self.offsets[row] : self.offsets[row + 1]] for row in rows]
