"""Writes a text task's token tables row by row: repeats left out, dropped rows listed, everything counted."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefarena.config import TextTask
from prefarena.errors import UserError
from prefarena.records import DEMONSTRATIONS, PAIRS, PROMPTS, content_id

DUPLICATE = "repeats an earlier pair"
OTHER_SPLIT = "its truncated prompt is in another split"
BROKEN = "broken"

_TABLES = {
    "train_pairs": PAIRS,
    "judge_pairs": PAIRS,
    "test_pairs": PAIRS,
    "demonstrations": DEMONSTRATIONS,
    "prompts": PROMPTS,
}
_ROW_GROUP = 1024


class ParquetRows:
    """One parquet file in its own folder, written a row group at a time."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(folder / "part-0.parquet", schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.count += 1
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


class Seen:
    """A set of hex ids with a value each, on disk, so that it takes no memory however many there are."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._base = sqlite3.connect(path, isolation_level=None)
        self._base.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8192")
        self._base.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def first(self, kind: str, identity: str, value: str = "") -> str | None:
        """None the first time that an identity of this kind comes; afterwards the value that it came with first."""
        key = kind.encode() + bytes.fromhex(identity)
        if self._base.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, value)).rowcount:
            return None
        return str(self._base.execute("SELECT value FROM seen WHERE id = ?", (key,)).fetchone()[0])

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)


class TokenTables:
    """The tables of one task under `folder`. Use as a context manager; `add` takes prepared rows in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_rows = 0
        self._dropped: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()

    def __enter__(self) -> TokenTables:
        self._tables = {name: ParquetRows(self.folder / name, schema) for name, schema in _TABLES.items()}
        self._list: IO[str] = (self.folder / "dropped.jsonl").open("w", encoding="utf-8")
        self._seen = Seen(self.folder / ".seen.sqlite")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for table in self._tables.values():
            table.close()
        self._list.close()
        self._seen.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, or list it as dropped. Raises UserError at a broken one."""
        self.num_rows += 1
        if row["reason"] == BROKEN:
            raise UserError(row["detail"])
        if row["reason"] is not None:
            return self._drop(row, row["reason"], row["detail"])
        split, prompt_id = row["split"], content_id(row["prompt_ids"])
        if self._seen.first("pair", row["id"]) is not None:
            return self._drop(row, DUPLICATE)
        earlier = self._seen.first("prompt", prompt_id, split)
        if earlier not in (None, split):  # two long prompts with the same end
            return self._drop(row, OTHER_SPLIT)
        self._tables[f"{split}_pairs"].add({name: row[name] for name in PAIRS.names})
        self._cut["prompts"] += row["prompt_cut"]
        self._cut["responses"] += row["num_responses_cut"]
        self._cut["rows"] += bool(row["prompt_cut"] or row["num_responses_cut"])
        if split != "judge" and earlier is None:
            prompt = {"id": prompt_id, "prompt_ids": row["prompt_ids"], "covered": split == "train", "split": split}
            self._tables["prompts"].add(prompt)
        if split == "train":
            self._demonstrate(row)

    def summary(self, task: TextTask) -> dict[str, Any]:
        """Counts. Raises UserError where a split is empty, or too many rows were dropped."""
        rejected = sum(count for reason, count in self._dropped.items() if reason != DUPLICATE)
        reasons = ", ".join(f"{reason} {count}" for reason, count in self._dropped.most_common())
        if rejected > task.max_rejected_share * self.num_rows:
            raise UserError(
                f"{task.data}: {rejected} of {self.num_rows} rows cannot be trained on ({reasons}), which is more than "
                f"task.max_rejected_share {task.max_rejected_share}; {self.folder / 'dropped.jsonl'} lists them"
            )
        needed = ["train", "test", *(["judge"] if task.judge_share > 0 else [])]
        for split in needed:
            if self._tables[f"{split}_pairs"].count == 0:
                raise UserError(
                    f"{task.data}: no {split} pairs are left of {self.num_rows} rows"
                    f"{f' ({reasons})' if reasons else ''}; give more data or another share of it"
                )
        return {
            "num_rows": self.num_rows,
            **{f"num_{name}": table.count for name, table in self._tables.items()},
            "num_dropped": sum(self._dropped.values()),
            "dropped": dict(self._dropped.most_common()),
            "num_truncated": self._cut["rows"],
            "num_truncated_prompts": self._cut["prompts"],
            "num_truncated_responses": self._cut["responses"],
        }

    def _demonstrate(self, row: dict[str, Any]) -> None:
        identity = content_id(row["prompt_ids"], row["chosen_ids"])
        if self._seen.first("demonstration", identity) is None:
            fields = {"id": identity, "prompt_ids": row["prompt_ids"], "response_ids": row["chosen_ids"]}
            self._tables["demonstrations"].add(fields)

    def _drop(self, row: dict[str, Any], reason: str, detail: str | None = None) -> None:
        self._dropped[reason] += 1
        line = {"file": row["file"], "row": row["row"], "reason": reason, "detail": detail or ""}
        self._list.write(json.dumps(line, ensure_ascii=False) + "\n")
