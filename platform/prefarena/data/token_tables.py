"""Writes a text task's token tables batch by batch: repeats left out, rejected rows listed, everything counted."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefarena.config import TextTask
from prefarena.data.labels import EVEN
from prefarena.data.rejections import DUPLICATE, IN_TEST_DATA, OTHER_SPLIT, Rejections
from prefarena.data.splits import Shares
from prefarena.data.tables import ROW_GROUP
from prefarena.errors import UserError
from prefarena.records import DEMONSTRATIONS, PAIRS, PROMPTS

_TABLES = {
    "train_pairs": PAIRS,
    "judge_pairs": PAIRS,
    "test_pairs": PAIRS,
    "demonstrations": DEMONSTRATIONS,
    "prompts": PROMPTS,
}
#: What decides where a row goes; the token columns stay in Arrow.
_DECIDING = ["file", "row", "reason", "detail", "split", "id", "opening_id", "prompt_id", "demonstration_id"]


class ParquetRows:
    """One parquet file in its own folder, written a row group at a time."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(folder / "part-0.parquet", schema)
        self._waiting = schema.empty_table()

    def add(self, columns: dict[str, pa.ChunkedArray | pa.Array]) -> None:
        """Append rows. Row groups have the same rows however these come."""
        table = pa.Table.from_pydict({name: columns[name] for name in self._schema.names}, schema=self._schema)
        self.count += table.num_rows
        self._waiting = pa.concat_tables([self._waiting, table])
        whole = self._waiting.num_rows // ROW_GROUP * ROW_GROUP
        if whole:
            self._write(self._waiting.slice(0, whole))
            self._waiting = self._waiting.slice(whole).combine_chunks()

    def close(self) -> None:
        if self._waiting.num_rows:
            self._write(self._waiting)
        self._writer.close()

    def _write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.combine_chunks(), row_group_size=ROW_GROUP)


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
        """Return None the first time that an identity of this kind comes, and later the value it first came with."""
        key = kind.encode() + bytes.fromhex(identity)
        if self._base.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, value)).rowcount:
            return None
        return str(self._base.execute("SELECT value FROM seen WHERE id = ?", (key,)).fetchone()[0])

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether the identity (kind, id) has come before."""
        found = self._base.execute("SELECT 1 FROM seen WHERE id = ?", (key[0].encode() + bytes.fromhex(key[1]),))
        return found.fetchone() is not None

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)


def usable(rows: pa.Table, kind: str, tested: set[str], seen: Seen, rejections: Rejections) -> pa.Table:
    """The prepared rows of single responses that can be trained on; the others are added to `rejections`.

    Left out are rows that were rejected before, whose prompt's id is in `tested`, and that repeat one of their kind.
    """
    kept = []
    for i, row in enumerate(rows.select(["file", "row", "reason", "detail", "id", "prompt_id"]).to_pylist()):
        reason = row["reason"] or (IN_TEST_DATA if row["prompt_id"] in tested else None)
        if reason is None and seen.first(kind, row["id"]) is not None:
            reason = DUPLICATE
        if reason is None:
            kept.append(i)
        else:
            rejections.add(row["file"], row["row"], reason, row["detail"] or "")
    return rows.take(kept)


class TokenTables:
    """The tables of one task under `folder`. Use as a context manager; `add` takes prepared rows in order.

    With `own_test`, a test set of its own comes first, by `add_test`; rows of its dialogues are then not trained on.
    """

    def __init__(self, folder: Path, own_test: bool = False) -> None:
        self.folder = folder
        self.own_test = own_test
        self.num_rows = self.num_test_rows = 0
        self._order: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._test_cut: Counter[str] = Counter()

    def __enter__(self) -> TokenTables:
        self._tables = {name: ParquetRows(self.folder / name, schema) for name, schema in _TABLES.items()}
        self.rejections = Rejections(self.folder / "dropped.jsonl")
        self.test_rejections = Rejections(self.folder / "dropped_test.jsonl" if self.own_test else None)
        self._seen = Seen(self.folder / ".seen.sqlite")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for table in self._tables.values():
            table.close()
        self.rejections.close()
        self.test_rejections.close()
        self._seen.close()

    def add(self, rows: pa.Table) -> None:
        """Write PREPARED_PAIRS, or list them as rejected."""
        self.num_rows += rows.num_rows
        self._add(rows, self.rejections, self._cut)

    def add_test(self, rows: pa.Table) -> None:
        """Like `add`, for the test set."""
        self.num_test_rows += rows.num_rows
        self._add(rows, self.test_rejections, self._test_cut)

    def _add(self, rows: pa.Table, rejections: Rejections, cut: Counter[str]) -> None:
        places: dict[str, list[int]] = defaultdict(list)  # row numbers in `rows`, by the table that takes them
        for i, row in enumerate(rows.select(_DECIDING).to_pylist()):
            for name in self._tables_of(row, rejections):
                places[name].append(i)
        for name, numbers in places.items():
            self._tables[name].add(_columns_of(name, rows.take(numbers)))
            if name.endswith("_pairs"):
                _count_cuts(rows.take(numbers), cut)
                self._count_order(rows.take(numbers))

    def summary(self, task: TextTask, shares: Shares) -> dict[str, Any]:
        """Return the counts. Raises UserError where a split is empty, or too many rows were rejected."""
        self.rejections.check(task.data, self.num_rows, task.max_rejected_share)
        for split in shares.needed:
            if self._tables[f"{split}_pairs"].count == 0:
                raise UserError(
                    f"{task.data}: no {split} pairs are left of {self.num_rows} rows{_in_words(self.rejections)}; "
                    f"provide more data, or change the shares"
                )
        dropped = dict(self.rejections.reasons.most_common())
        return {
            "num_rows": self.num_rows,
            **{f"num_{name}": table.count for name, table in self._tables.items()},
            "num_labels_under_half": self._order["under"],
            "num_scores_contradicting": self._order["against"],
            "num_turns_joined": self._order["joined"],
            "num_dropped": sum(dropped.values()),
            "dropped": dropped,
            "num_truncated": self._cut["rows"],
            "num_truncated_prompts": self._cut["prompts"],
            "num_truncated_responses": self._cut["responses"],
            "num_responses_tokenised_apart": self._order["apart"],
            "num_responses_as_written": self._order["as_written"],
            **({"test_data": self._test_summary()} if self.own_test else {}),
        }

    def _test_summary(self) -> dict[str, Any]:
        """The counts of the test set, which are not included in the others."""
        dropped = dict(self.test_rejections.reasons.most_common())
        return {
            "num_rows": self.num_test_rows,
            "num_dropped": sum(dropped.values()),
            "dropped": dropped,
            "num_truncated": self._test_cut["rows"],
            "num_truncated_prompts": self._test_cut["prompts"],
            "num_truncated_responses": self._test_cut["responses"],
        }

    def check_test(self, task: TextTask) -> None:
        """Raise UserError where too much of the test set was rejected, or nothing of it is left."""
        source = task.test_source[0] if task.test_source else task.data
        self.test_rejections.check(source, self.num_test_rows, task.max_rejected_share)
        if self._tables["test_pairs"].count == 0:
            reasons = _in_words(self.test_rejections)
            raise UserError(f"{source}: no test pairs are left of {self.num_test_rows} rows{reasons}")

    def _count_order(self, pairs: pa.Table) -> None:
        self._order["under"] += sum(label < EVEN for label in pairs["label"].to_pylist())
        self._order["against"] += sum(pairs["scores_contradict"].to_pylist())
        self._order["joined"] += sum(pairs["num_turns_joined"].to_pylist())
        for name in ("apart", "as_written"):
            self._order[name] += sum(pairs[f"num_responses_{name}"].to_pylist())

    def _tables_of(self, row: dict[str, Any], rejections: Rejections) -> list[str]:
        """The tables that a row belongs to; none where it is rejected, which is then listed."""
        reason, split, prompt = row["reason"], row["split"], None
        if reason is None and self.own_test:
            reason = self._if_tested_on(row)
        if reason is None and self._seen.first("pair", row["id"]) is not None:
            reason = DUPLICATE
        if reason is None:
            prompt = self._seen.first("prompt", row["prompt_id"], split)
            if prompt not in (None, split):  # two long prompts with the same end
                reason = OTHER_SPLIT
        if reason is not None:
            rejections.add(row["file"], row["row"], reason, row["detail"] or "")
            return []
        names = [f"{split}_pairs"]
        if split != "judge" and prompt is None:
            names.append("prompts")
        if split == "train" and self._seen.first("demonstration", row["demonstration_id"]) is None:
            names.append("demonstrations")
        return names

    def _if_tested_on(self, row: dict[str, Any]) -> str | None:
        """Return IN_TEST_DATA for a training row whose dialogue's opening is in the test set."""
        if row["split"] == "test":
            self._seen.first("opening", row["opening_id"])
            return None
        return IN_TEST_DATA if ("opening", row["opening_id"]) in self._seen else None


def _in_words(rejections: Rejections) -> str:
    """How many rows were rejected for which reason, in brackets; empty where none were."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejections.reasons.most_common())
    return f" ({reasons})" if reasons else ""


def _count_cuts(rows: pa.Table, cut: Counter[str]) -> None:
    for prompt, responses in zip(rows["prompt_cut"].to_pylist(), rows["num_responses_cut"].to_pylist(), strict=True):
        cut["prompts"] += prompt
        cut["responses"] += responses
        cut["rows"] += bool(prompt or responses)


def _columns_of(name: str, rows: pa.Table) -> dict[str, pa.ChunkedArray | pa.Array]:
    """The columns of the table `name` from rows of PREPARED_PAIRS."""
    if name == "prompts":
        covered = pa.array([split == "train" for split in rows["split"].to_pylist()], pa.bool_())
        return {"id": rows["prompt_id"], "prompt_ids": rows["prompt_ids"], "covered": covered, "split": rows["split"]}
    if name == "demonstrations":
        return {
            "id": rows["demonstration_id"],
            "prompt_ids": rows["prompt_ids"],
            "response_ids": rows["chosen_ids"],
        }
    return {column: rows[column] for column in PAIRS.names}
