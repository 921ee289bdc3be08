"""Kinds of files: JSON arrays, csv, compressions, endings in capitals; and what is said of damaged ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from prefarena.config import TextTask
from prefarena.data.arrays import ArrayLines, BadArray
from prefarena.data.first_rows import look_at_pairs
from prefarena.data.formats import normalise
from prefarena.data.preparation import COLUMNS
from prefarena.data.sources import find_parts, read_chunks, read_rows_of
from prefarena.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": f'Is {i} "even", [really]?\n\\', "chosen": f"Yes,\n{{{i}}}.", "rejected": "No \u00e9\u2028."}
    for i in range(60)
]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: list[dict[str, Any]], indent: int | None = None) -> bytes:
    return json.dumps(rows, indent=indent, ensure_ascii=False).encode()


def delimited(rows: list[dict[str, Any]], mark: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


FILES: dict[str, bytes] = {
    "array.json": array(ROWS),
    "indented.json": array(ROWS, 2),
    "marked.json": b"\xef\xbb\xbf\n " + array(ROWS, 1) + b"\r\n",
    "array.jsonl": array(ROWS),
    "array.json.gz": gzip.compress(array(ROWS)),
    "lines.jsonl.zst": zstd(lines(ROWS)),
    "lines.jsonl.zstd": zstd(lines(ROWS[:20])) + zstd(lines(ROWS[20:])),
    "lines.jsonl.bz2": bz2.compress(lines(ROWS[:9])) + bz2.compress(lines(ROWS[9:])),
    "lines.jsonl.xz": lzma.compress(lines(ROWS)),
    "array.json.zst": zstd(array(ROWS, 4)),
    "LINES.JSONL": lines(ROWS),
    "Lines.Jsonl.GZ": gzip.compress(lines(ROWS)),
    "rows.csv": delimited(ROWS),
    "rows.tsv": delimited(ROWS, "\t"),
    "ROWS.CSV": b"\xef\xbb\xbf" + delimited(ROWS),
    "rows.csv.gz": gzip.compress(delimited(ROWS)),
    "rows.csv.zst": zstd(delimited(ROWS)),
    "rows.tsv.xz": lzma.compress(delimited(ROWS, "\t")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_folder", [False, True])
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, name: str, as_folder: bool) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    data = str(tmp_path if as_folder else tmp_path / name)
    parts = look_at_pairs(TextTask(data=data)).parts
    read = [row for part in parts for _, row in read_rows_of(part, COLUMNS, 1 << 20)]
    assert read == ROWS


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("text", ["[]", "[1]", '[{"a": "\\"],[\\\\"}, [1, [2]],\n"x,y", {}]', "[ [ ] , { } ]"])
def test_an_array_is_its_elements_wherever_pieces_end(size: int, text: str) -> None:
    stream = ArrayLines(text[:size].encode(), io.BytesIO(text[size:].encode()))
    read = b"".join(iter(lambda: stream.read(size), b""))
    assert [json.loads(line) for line in read.split(b"\n") if line.strip()] == json.loads(text)


@pytest.mark.parametrize(("text", "says"), [("[1, 2", "not closed"), ('["', "not closed"), ("[1]\n{}", "after it")])
def test_an_array_that_is_none(text: str, says: str) -> None:
    stream = ArrayLines(text[:2].encode(), io.BytesIO(text[2:].encode()))
    with pytest.raises(BadArray, match=says):
        while stream.read(1):
            pass


def test_cells_are_text_and_labels_numbers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "007", "chosen": "null", "rejected": "1.50", "label": "1", "system": ""},
        {"prompt": "true", "chosen": "2026-01-01", "rejected": "NaN", "label": "0.7", "system": "Be kind."},
        {"prompt": "p", "chosen": "a", "rejected": "", "label": "", "system": ""},
    ]
    (tmp_path / "rows.csv").write_bytes(delimited(rows))
    read = [row for _, row in read_rows_of(find_parts(str(tmp_path), "train")[0], COLUMNS, 1 << 20)]
    assert [row["label"] for row in read] == [1.0, 0.7, None]  # type: ignore[index]
    assert [[row[name] for name in ("prompt", "chosen", "rejected", "system")] for row in read] == [  # type: ignore[index]
        [row[name] for name in ("prompt", "chosen", "rejected", "system")] for row in rows
    ]


def test_messages_in_cells_are_messages(tmp_path: Path) -> None:
    ask, yes, no = ({"role": r, "content": c} for r, c in (("user", "Blue?"), ("assistant", "Yes."), ("assistant", "")))
    (tmp_path / "rows.csv").write_bytes(
        delimited(
            [
                {
                    "prompt": json.dumps([ask]),
                    "chosen": json.dumps([yes]),
                    "rejected": json.dumps([{**no, "content": "No."}]),
                }
            ]
        )
    )
    (row,) = [row for _, row in read_rows_of(find_parts(str(tmp_path), "train")[0], COLUMNS, 1 << 20)]
    assert isinstance(row, dict) and normalise(row).prompt == (("user", "Blue?"),)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("cut.jsonl.zst", zstd(lines(ROWS))[:-30], "damaged"),
        ("cut.jsonl.bz2", bz2.compress(lines(ROWS))[:-30], "bzip2 -t"),
        ("cut.jsonl.xz", lzma.compress(lines(ROWS))[:-30], "xz -t"),
        ("no.jsonl.zst", lines(ROWS), "zstd -t"),
        ("no.jsonl.bz2", lines(ROWS), "bzip2 -t"),
        ("no.jsonl.xz", lines(ROWS), "xz -t"),
        ("no.csv.gz", delimited(ROWS), "gzip -t"),
        ("lines.jsonl", zstd(lines(ROWS)), "rename it to end in .zst"),
        ("lines.jsonl", bz2.compress(lines(ROWS)), "rename it to end in .bz2"),
        ("lines.jsonl", lzma.compress(lines(ROWS)), "rename it to end in .xz"),
        ("cut.json", array(ROWS)[:-30], "holds a JSON array that is not closed"),
        ("two.json", array(ROWS) + array(ROWS), "something else after it"),
        ("ragged.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", "not readable as csv"),
        ("latin.csv", "prompt,chosen,rejected\na,caf\u00e9,c\n".encode("latin-1"), "not readable as csv"),
        ("empty.csv", b"", "no column 'chosen'"),
        ("header.csv", b"prompt,chosen,rejected\n", "there are no rows in it"),
        ("semicolons.csv", b"prompt;chosen;rejected\na;b;c\n", "no column 'chosen'"),
        ("rows.xlsx", b"PK", "neither jsonl, json, csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        look_at_pairs(TextTask(data=str(tmp_path / name)))
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "write", "most"),
    [
        ("data.json", lambda data: data, 6 << 20),
        ("data.json.zst", zstd, 6 << 20),
        ("data.json.bz2", bz2.compress, 12 << 20),
        ("data.json.xz", lzma.compress, 16 << 20),  # its window is 8 MiB
    ],
)
def test_an_array_is_never_held_in_memory(
    tmp_path: Path, name: str, write: Callable[[bytes], bytes], most: int
) -> None:
    row = json.dumps({"prompt": "p" * 1000, "chosen": "a", "rejected": "b"}).encode()
    huge = json.dumps({"prompt": "p" * (4 << 20)}).encode()
    (tmp_path / name).write_bytes(write(b"[" + b",".join([*[row] * 24_000, huge, row]) + b"]"))
    (part,) = find_parts(str(tmp_path / name), "train")
    tracemalloc.start()
    chunks = [(chunk.first, chunk.kind) for chunk in read_chunks(part, COLUMNS, 20_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chunks[-2:] == [(24_001, "too_long"), (24_002, "lines")]
    assert peak < most
