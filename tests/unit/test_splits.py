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
from pipelines.preferences import check_text_task
from prefarena.config import Comparison, TextTask, parse_config
from prefarena.data import rejections as why
from prefarena.data.counting import count_rows
from prefarena.data.first_rows import look_at_pairs, look_at_test
from prefarena.data.formats import Pair
from prefarena.data.preparation import COLUMNS, prepare_pairs
from prefarena.data.sources import Part, find_parts, read_chunks
from prefarena.data.splits import ALL_TEST, Shares, ignored_judge, leakage_notes, shares_of
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
        assert (
            said.startswith(f"task.{next(iter(settings))} sets nothing aside")
            and "those rows are used for training" in said
        )
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


# ------------------------------------------------------------------------------------------- a test set of one's own


def with_test(folder: Path, bpe: Path, task: TextTask) -> dict[str, Any]:
    """As `tables_of`, for a task with a test set of its own."""
    tokenizer, test = Tokenizer.load(bpe, None, task), look_at_test(task, look_at_pairs(task))
    assert test is not None
    shares = shares_of(task, find_parts(task.data, task.split), learns_judge=True)
    with TokenTables(folder, own_test=True) as tables:
        for part in test.parts:
            for chunk in read_chunks(part, COLUMNS, task.max_row_bytes):
                tables.add_test(prepare_pairs(chunk, task, tokenizer, shares=ALL_TEST))
        tables.check_test(task)
        for part in find_parts(task.data, task.split):
            for chunk in read_chunks(part, COLUMNS, task.max_row_bytes):
                tables.add(prepare_pairs(chunk, task, tokenizer, shares=shares))
    return tables.summary(task, shares)


def test_rows_of_the_test_set_test_and_their_dialogues_do_not_train(tmp_path: Path, bpe: Path) -> None:
    question = {"role": "user", "content": "Is it?"}

    def chat(name: str, answer: str, *more: Row) -> Row:
        prompt = [{**question, "content": name}, *more]
        return {"prompt": prompt, "chosen": answer, "rejected": "No."}

    turns = ({"role": "assistant", "content": "Why?"}, question)
    train = [chat(f"Is {i} even?", "Yes.") for i in range(40)]
    train += [chat("Is 7 odd?", "Sure."), chat("Is 7 odd?", "Yes.", *turns), chat("Is 9 odd?", "Yes.")]
    test = [chat(f"Is {name} odd?", "Yes.") for name in ("7", "9", "1", "word " * 300)]
    test += [chat("Is 7 odd?", "Yes.")]
    task = TextTask(
        data=write(tmp_path / "train.jsonl", train),
        test_data=write(tmp_path / "test.jsonl", test),
        max_prompt_tokens=200,
        max_rejected_share=0.2,
    )
    counts = with_test(tmp_path / "out", bpe, task)
    assert counts["num_rows"] == 43 and counts["dropped"] == {why.IN_TEST_DATA: 3}
    assert counts["num_train_pairs"] + counts["num_judge_pairs"] == 40 and counts["num_test_pairs"] == 3
    assert counts["test_data"]["num_rows"] == 5
    assert counts["test_data"]["dropped"] == {why.PROMPT_TOO_LONG: 1, why.DUPLICATE: 1}
    assert leakage_notes(counts) == [
        "3 of 43 rows begin with the same prompt as a row of the test data, and are not trained on"
    ]
    left_out = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in left_out] == [41, 42, 43]
    left_out = [json.loads(line) for line in (tmp_path / "out/dropped_test.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in left_out] == [(4, why.PROMPT_TOO_LONG), (5, why.DUPLICATE)]
    prompts = read_rows(tmp_path / "out/prompts")
    assert Counter(prompts["split"].to_pylist())["test"] == 3


def test_what_is_cut_of_the_test_set_is_counted_apart(tmp_path: Path, bpe: Path) -> None:
    train, test = rows(30), [{**row, "prompt": f"So, {row['prompt']}", "chosen": "Yes. " * 50} for row in rows(4)]
    task = TextTask(
        data=write(tmp_path / "train.jsonl", train),
        test_data=write(tmp_path / "test.jsonl", test),
        max_response_tokens=30,
    )
    counts = with_test(tmp_path / "out", bpe, task)
    assert counts["num_truncated_responses"] == 0 and counts["num_train_pairs"] > 15
    assert counts["test_data"] == {
        "num_rows": 4,
        "num_dropped": 0,
        "dropped": {},
        "num_truncated": 4,
        "num_truncated_prompts": 0,
        "num_truncated_responses": 4,
    }


def test_a_test_set_that_is_the_training_data_leaves_none_to_train_on(tmp_path: Path, bpe: Path) -> None:
    for name in ("train", "copy"):
        write(tmp_path / f"{name}.jsonl", rows(9))
    task = TextTask(data=str(tmp_path / "train.jsonl"), test_data=str(tmp_path / "copy.jsonl"))
    with pytest.raises(UserError, match=r"no train pairs are left of 9 rows \(its dialogue is in the test data 9\)"):
        with_test(tmp_path / "out", bpe, task)


def test_too_much_lost_of_the_test_set_stops_the_run_before_the_rest(tmp_path: Path, bpe: Path) -> None:
    test = [{**row, "prompt": "word " * 90} if i < 3 else row for i, row in enumerate(rows(20))]
    task = TextTask(
        data=write(tmp_path / "train.jsonl", rows(30)),
        test_data=write(tmp_path / "test.jsonl", test),
        max_prompt_tokens=50,
    )
    with pytest.raises(UserError, match=r"test\.jsonl: 3 of 20 rows \(15\.0%\) cannot be trained on"):
        with_test(tmp_path / "out", bpe, task)


def saved(folder: Path, **splits: list[Row]) -> str:
    datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in splits.items()}).save_to_disk(str(folder))
    return str(folder)


def test_a_splits_name_is_enough(tmp_path: Path) -> None:
    other = [{**row, "prompt": f"So, {row['prompt']}"} for row in rows(5)]
    data = saved(tmp_path / "saved", train_prefs=rows(20), test_prefs=other)
    named = tmp_path / "named"
    named.mkdir()
    write(named / "train-00000-of-00001.jsonl", rows(20))
    write(named / "test-00000-of-00001.jsonl", other)
    for task in (
        TextTask(data=data, split="train_prefs", test_split="test_prefs"),
        TextTask(data=str(named), test_split="test"),
        TextTask(data=str(named), test_data=str(named)),  # the split test, as none is named
        TextTask(data=write(tmp_path / "one.jsonl", rows(20)), test_data=data, test_split="test_prefs"),
    ):
        found = look_at_test(task, look_at_pairs(task))
        assert found is not None and count_rows(found.parts, 1 << 20) == 5
    assert look_at_test(TextTask(data=str(named)), look_at_pairs(TextTask(data=str(named)))) is None


def test_a_test_set_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    one, data = write(tmp_path / "one.jsonl", rows(20)), saved(tmp_path / "saved", train=rows(20), test=rows(4))
    chats = [{"prompt": [{"role": "user", "content": f"Is {i}?"}], "chosen": "Yes.", "rejected": "No."} for i in "12"]
    unsplit = tmp_path / "unsplit"
    datasets.Dataset.from_list(rows(20)).save_to_disk(str(unsplit))
    named = tmp_path / "named"
    named.mkdir()
    write(named / "train.jsonl", rows(3))
    whole = "is also all that task.data trains on; name other rows in task.test_data"
    faults: list[tuple[str, Row, str]] = [
        (one, {"test_data": str(tmp_path / "absent.jsonl")}, "absent.jsonl: no such file"),
        (one, {"test_data": write(tmp_path / "q.jsonl", [{"question": "a"}])}, "no column 'chosen'"),
        (one, {"test_data": write(tmp_path / "empty.jsonl", [])}, "there are no rows in it"),
        (
            one,
            {"test_data": write(tmp_path / "chats.jsonl", chats)},
            "to test on are messages, and those to train on are",
        ),
        (one, {"test_split": "test"}, f"task.test_split: {one} {whole}"),
        (one, {"test_data": one}, f"task.test_data: {one} {whole}"),
        (str(unsplit), {"test_split": "test"}, f"task.test_split: {unsplit} {whole}"),
        (data, {"test_split": "dev"}, "there is no split 'dev'; there are train, test"),
        (
            str(named),
            {"test_split": "test"},
            "set task.test_split to one of them, or name the file itself in task.data",
        ),
        (
            one,
            {"test_data": str(named)},
            "set task.test_split to one of them, or name the file itself in task.test_data",
        ),
    ]
    for data_path, settings, said in faults:
        with pytest.raises(UserError) as error:
            check_text_task(TextTask(data=data_path, **settings))
        assert said in str(error.value)
    wrong: list[tuple[Row, str]] = [
        ({"test_data": one, "test_share": 0.3}, "test_share holds out rows of data, and test_data says which"),
        ({"test_split": "test", "num_test_pairs": 5}, "num_test_pairs holds out rows of data, and test_split says"),
        ({"test_split": "train"}, "test_split: these are the rows to train on"),
    ]
    for settings, said in wrong:
        with pytest.raises(UserError, match=said):
            text_config(data, LEARNED, **settings)


def test_changed_test_data_give_another_stage(tmp_path: Path) -> None:
    data, test = write(tmp_path / "data.jsonl", rows(9)), str(tmp_path / "test.jsonl")
    config, keys = text_config(data, LEARNED, test_data=test), []
    for number in (2, 3):
        write(Path(test), rows(number))
        keys += [make_plan(config)[0].data.key, make_plan(config)[0].data.key]
    assert keys[0] == keys[1] != keys[2] == keys[3]
