"""Which rows train and which are held out. No Ray: the actors' work and the writer's, in this process."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from pipelines.plan import make_plan
from prefarena.config import Comparison, TextTask, parse_config
from prefarena.data.counting import count_rows
from prefarena.data.formats import Pair
from prefarena.data.preparation import COLUMNS, prepare_pairs
from prefarena.data.sources import Part, find_parts, read_chunks
from prefarena.data.splits import Shares, ignored_judge, shares_of
from prefarena.data.tables import read_rows
from prefarena.data.token_tables import TokenTables
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError

Row = dict[str, Any]
LEARNED: Row = {"kind": "learned"}
EXTERNAL: list[Row] = [
    {"kind": "endpoint", "base_url": "http://host:1/v1", "model": "m"},
    {"kind": "classifier", "path": "some/model"},
    {"kind": "function", "function": "json:dumps"},
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(["Is 7 even? Yes. No."], 300, folder)
    return folder


def rows(count: int) -> list[Row]:
    return [{"prompt": f"Is {i} even?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(count)]


def write(path: Path, lines: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return str(path)


def text_config(data: str, judge: Row, **task: Any) -> Comparison:
    entries = [{"name": "dpo", "method": {"kind": "dpo"}}]
    return parse_config({"task": {"kind": "text", "data": data, **task}, "judge": judge, "entries": entries})


def tables_of(folder: Path, bpe: Path, task: TextTask, shares: Shares) -> dict[str, Any]:
    """The summary of the task's tables, which are then in `folder`."""
    tokenizer = Tokenizer.load(bpe, None, task)
    with TokenTables(folder) as tables:
        for part in find_parts(task.data, task.split):
            for chunk in read_chunks(part, COLUMNS, task.max_row_bytes):
                tables.add(prepare_pairs(chunk, task, tokenizer, shares=shares))
    return tables.summary(task, shares)


# ------------------------------------------------------------------------------------------------ the judge's rows


def test_the_judges_rows_train_where_no_judge_is_learned(tmp_path: Path, bpe: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows(200))
    task = TextTask(data=data, test_share=0.25, judge_share=0.25)
    found, ids = {}, {}
    for learned in (True, False):
        folder = tmp_path / str(learned)
        found[learned] = tables_of(folder, bpe, task, shares_of(task, find_parts(data, "train"), learned))
        ids[learned] = {
            split: set(read_rows(folder / f"{split}_pairs")["id"].to_pylist()) for split in ("train", "judge", "test")
        }
    assert found[True]["num_judge_pairs"] > 30 and found[False]["num_judge_pairs"] == 0
    assert ids[False]["test"] == ids[True]["test"]  # what is tested on does not depend on the judge
    assert ids[False]["train"] == ids[True]["train"] | ids[True]["judge"]
    assert found[False]["num_demonstrations"] == found[False]["num_train_pairs"]


@pytest.mark.parametrize("judge", EXTERNAL, ids=lambda judge: judge["kind"])
def test_data_without_rows_for_a_judge_have_a_stage_of_their_own(tmp_path: Path, judge: Row) -> None:
    data = write(tmp_path / "data.jsonl", rows(9))
    (learned,), (external,), (other,) = (
        make_plan(text_config(data, settings)) for settings in (LEARNED, judge, {**EXTERNAL[0], "model": "other"})
    )
    assert learned.data.key != external.data.key == other.data.key
    assert learned.judge is not None and external.judge is None


def test_a_size_for_a_judge_that_is_not_learned_is_said_to_do_nothing() -> None:
    for settings in ({"judge_share": 0.3}, {"num_judge_pairs": 10}):
        task = TextTask(data="pairs.jsonl", **settings)
        (said,) = ignored_judge(task, learns_judge=False)
        assert said.startswith(f"task.{next(iter(settings))} sets nothing aside") and "those rows train" in said
        assert ignored_judge(task, learns_judge=True) == []
    assert ignored_judge(TextTask(data="pairs.jsonl"), learns_judge=False) == []


# --------------------------------------------------------------------------------------------- how many are held out


@pytest.mark.parametrize(
    ("num_rows", "settings", "test", "judge"),
    [
        (500, {}, 0.2, 0.2),  # small data: a fifth
        (10_000, {}, 0.2, 0.2),
        (60_000, {}, 2_000 / 60_000, 2_000 / 60_000),
        (60_000, {"test_share": 0.25, "judge_share": 0.1}, 0.25, 0.1),  # what is said is done
        (60_000, {"num_test_pairs": 500, "judge_share": 0.1}, 500 / 60_000, 0.1),
        (300, {"num_test_pairs": 150, "num_judge_pairs": 90}, 0.5, 0.3),
        (60_000, {"max_rows": 40_000}, 0.05, 0.05),
        (60_000, {"max_rows": 100, "num_test_pairs": 30}, 0.3, 0.2),
    ],
)
def test_a_number_of_rows_is_held_out(num_rows: int, settings: Row, test: float, judge: float) -> None:
    parts = [Part("saved", "data", "train", start, min(start + 9_000, num_rows)) for start in range(0, num_rows, 9_000)]
    task = TextTask(data="data", **settings)
    assert shares_of(task, parts, learns_judge=True) == Shares(test, judge, 0)
    assert shares_of(task, parts, learns_judge=False) == Shares(test, 0.0, 0)


def test_of_60000_rows_about_2000_test_and_all_others_train() -> None:
    shares = shares_of(TextTask(data="data"), [Part("saved", "data", "train", 0, 60_000)], learns_judge=False)
    pairs = (Pair(str(i), "Yes.", "No.", 1.0, "", opening=str(i)) for i in range(60_000))
    found = Counter(shares.split_of(pair) for pair in pairs)
    assert 1_850 < found["test"] < 2_150 and found["train"] == 60_000 - found["test"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "saved"])
def test_rows_are_counted_in_every_form(tmp_path: Path, name: str) -> None:
    table, path = rows(700), tmp_path / name
    if name == "a.jsonl":
        path.write_bytes(b"\n \n".join(json.dumps(row).encode() for row in table))  # blank lines are no rows
    elif name == "a.json":
        path.write_text(json.dumps(table, indent=1))
    elif name == "a.jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in table).encode()))
    elif name == "a.csv":
        pa_csv.write_csv(pa.Table.from_pylist(table), path)
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=90)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(table)}).save_to_disk(str(path))
    parts = find_parts(str(path), "train")
    assert count_rows(parts, 4 << 20) == 700 and count_rows(parts, 4 << 20, limit=650) == 650


def test_numbers_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows(100))
    task = TextTask(data=data, num_test_pairs=80, judge_share=0.2)
    with pytest.raises(UserError) as error:
        shares_of(task, find_parts(data, "train"), learns_judge=True)
    assert str(error.value) == (
        f"{data}: task.judge_share 0.2 and task.num_test_pairs 80 leave none of its 100 rows to train on; lower them"
    )
    assert shares_of(task, find_parts(data, "train"), learns_judge=False) == Shares(0.8, 0.0, 0)
    for settings, said in (
        ({"test_share": 0.5, "num_test_pairs": 3}, "test_share and num_test_pairs say the same thing"),
        ({"judge_share": 0.5, "num_judge_pairs": 3}, "judge_share and num_judge_pairs say the same thing"),
        ({"test_share": 0.6, "judge_share": 0.5}, "1.1 together, which leaves no rows to train on"),
    ):
        with pytest.raises(UserError, match=said):
            text_config(data, LEARNED, **settings)
