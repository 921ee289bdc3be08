"""Which rows train and which are held out. No Ray: the actors' work and the writer's, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan import make_plan
from prefarena.config import Comparison, TextTask, parse_config
from prefarena.data.preparation import COLUMNS, prepare_pairs
from prefarena.data.sources import find_parts, read_chunks
from prefarena.data.splits import Shares, shares_of
from prefarena.data.tables import read_rows
from prefarena.data.token_tables import TokenTables
from prefarena.data.tokenization import Tokenizer, train_tokenizer

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
    task = TextTask(data=write(tmp_path / "data.jsonl", rows(200)), test_share=0.25, judge_share=0.25)
    found, ids = {}, {}
    for learned in (True, False):
        folder = tmp_path / str(learned)
        found[learned] = tables_of(folder, bpe, task, shares_of(task, learned))
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
