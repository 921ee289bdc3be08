"""The Ray Data pipeline, from raw files to token tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from pipelines.demonstrations import write_demonstrations
from pipelines.preferences import check_text_task, prepare_text
from prefarena.config import ScratchModel, TextTask
from prefarena.data import rejections
from prefarena.data.tables import read_rows
from prefarena.errors import UserError
from prefarena.records import DEMONSTRATIONS, PAIRS, PRETRAINING, PROMPTS, RESPONSES

MODEL = ScratchModel(vocab_size=400)


def hh(question: str, answer: str, other: str) -> dict[str, Any]:
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{prompt} {answer}", "rejected": f"{prompt} {other}"}


def rows(count: int) -> list[dict[str, Any]]:
    return [hh(f"Question {i}?\u2028Really?", f"I think yes {i}", f"I think no {i}") for i in range(count)]


def write(path: Path, lines: list[Any]) -> str:
    data = b"".join((x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode()) + b"\n" for x in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_transcripts_become_tables_and_every_dropped_row_is_listed(ray_session: None, tmp_path: Path) -> None:
    good = [{**row, "score_chosen": i, "score_rejected": 0.5 if i % 2 else None} for i, row in enumerate(rows(60))]
    bad = [hh("q", "same", "same"), {**hh("a", "x", "y"), "rejected": hh("b", "x", "y")["rejected"]}, good[0]]
    extra = write(tmp_path / "text.jsonl", [{"text": "Some text. " * 40}, {"text": "More."}])
    data = write(tmp_path / "hh.jsonl.gz", [*good, b"", *bad])
    task = TextTask(
        data=data, pretraining_text=extra, max_prompt_tokens=60, max_response_tokens=20, max_rejected_share=0.1
    )
    summary = prepare_text(task, None, MODEL, tmp_path / "out", num_tokenisers=1)

    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in dropped] == [
        (62, rejections.IDENTICAL),
        (63, rejections.PROMPTS_DIFFER),
        (64, rejections.DUPLICATE),
    ]
    assert summary["num_rows"] == 63 and summary["num_dropped"] == 3
    tables = {name: read_rows(tmp_path / "out" / name) for name in ("train_pairs", "judge_pairs", "test_pairs")}
    assert sum(table.num_rows for table in tables.values()) == 60
    assert all(table.num_rows > 0 and table.schema.equals(PAIRS) for table in tables.values())
    prompts = [{tuple(ids) for ids in table["prompt_ids"].to_pylist()} for table in tables.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 60

    tokenizer = PreTrainedTokenizerFast.from_pretrained(summary["tokenizer"])
    whole = {
        tokenizer.decode(r["prompt_ids"][1:] + r["chosen_ids"][:-1]) for t in tables.values() for r in t.to_pylist()
    }
    assert whole == {row["chosen"] for row in good}
    scores = [(r["score_chosen"], r["score_rejected"]) for t in tables.values() for r in t.to_pylist()]
    assert sorted(both for both in scores if both != (None, None)) == [(float(i), 0.5) for i in range(1, 60, 2)]

    demonstrations, listed = (read_rows(tmp_path / "out" / name) for name in ("demonstrations", "prompts"))
    assert demonstrations.schema.equals(DEMONSTRATIONS) and listed.schema.equals(PROMPTS)
    assert demonstrations.num_rows == tables["train_pairs"].num_rows == sum(listed["covered"].to_pylist())
    assert listed.num_rows - demonstrations.num_rows == listed["split"].to_pylist().count("test")
    pretraining = read_rows(tmp_path / "out/pretraining")
    assert pretraining.schema.equals(PRETRAINING) and pretraining.num_rows == summary["num_pretraining"] > 2


def single(i: int, label: Any, answer: str = "I think") -> dict[str, Any]:
    return {"prompt": f"Other {i}?", "completion": f"{answer} {i}", "label": label}


def test_single_responses_become_a_table_without_what_is_tested_on(ray_session: None, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i in range(60)])
    good = [single(i, i % 3 > 0) for i in range(30)]
    asked = [{"prompt": f"Q {i}?", "completion": "maybe", "label": 0.25} for i in range(60)]
    bad = [single(5, True), {"prompt": "P", "completion": "without a label"}, single(40, 2.0)]
    path = write(tmp_path / "singles.jsonl", [*good, *asked, *bad])
    task = TextTask(data=data, unpaired_data=path, max_rejected_share=0.1)
    summary = prepare_text(task, None, MODEL, tmp_path / "out", num_tokenisers=1, learns_judge=False)

    tested = read_rows(tmp_path / "out/test_pairs").num_rows
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped_unpaired.jsonl").read_text().splitlines()]
    assert sum(row["reason"] == rejections.IN_TEST_DATA for row in dropped) == tested > 3
    others = [(row["row"], row["reason"]) for row in dropped if row["reason"] != rejections.IN_TEST_DATA]
    assert others == [(91, rejections.DUPLICATE), (92, rejections.MISSING_COLUMN), (93, rejections.BAD_LABEL)]
    table = read_rows(tmp_path / "out/responses")
    assert table.schema.equals(RESPONSES) and table.num_rows == 90 - tested == summary["unpaired"]["num_responses"]
    assert summary["unpaired"]["num_desirable"] == 20 and summary["unpaired"]["num_undesirable"] == 70 - tested
    tokenizer = PreTrainedTokenizerFast.from_pretrained(summary["tokenizer"])
    found = {
        (tokenizer.decode(row["prompt_ids"][1:]), tokenizer.decode(row["response_ids"][:-1]), row["label"])
        for row in table.to_pylist()
    }
    assert {(row["prompt"], row["completion"], float(row["label"])) for row in good} <= found
    assert all(row["response_ids"][-1] == tokenizer.eos_token_id for row in table.to_pylist())


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([single(i, True) for i in range(20)], "none of its 20 responses to train on is undesirable"),
        ([{"prompt": "a", "completion": "b"}] * 3, "label"),
        ([single(i, "good") for i in range(20)], "label is str, not a number"),
    ],
    ids=["one kind", "no labels", "words"],
)
def test_single_responses_that_cannot_be_used_stop_the_run(
    ray_session: None, tmp_path: Path, lines: list[Any], says: str
) -> None:
    task = TextTask(data=write(tmp_path / "data.jsonl", rows(40)), unpaired_data=write(tmp_path / "s.jsonl", lines))
    with pytest.raises(UserError, match=says):
        prepare_text(task, None, MODEL, tmp_path / "out", num_tokenisers=1, learns_judge=False)


def test_demonstrations_of_a_file_become_a_table_or_are_refused_by_file_and_row(
    ray_session: None, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i in range(40)])
    good = [{"prompt": f"Other {i}?", "response": f"I think {i}"} for i in range(20)]
    own = write(tmp_path / "own.jsonl", [*good, good[3], {"prompt": "Q 1?", "response": "maybe"}, {"prompt": "P"}])
    task = TextTask(data=data, demonstration_data=own, max_rejected_share=0.1)
    summary = prepare_text(task, None, MODEL, tmp_path / "out", num_tokenisers=1, learns_judge=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(summary["tokenizer"])
    prompts = read_rows(tmp_path / "out/prompts").to_pylist()
    tested = {row["id"] for row in prompts if tokenizer.decode(row["prompt_ids"][1:]) == "Q 1?"}
    assert len(tested) == 1
    found = write_demonstrations(task, (summary["tokenizer"], None), tested, tmp_path / "own", 1)
    assert (found["num_rows"], found["num_demonstrations"]) == (23, 20)
    assert found["dropped"] == {rejections.DUPLICATE: 1, rejections.IN_TEST_DATA: 1, rejections.MISSING_COLUMN: 1}
    table = read_rows(tmp_path / "own/demonstrations")
    said = {
        (tokenizer.decode(r["prompt_ids"][1:]), tokenizer.decode(r["response_ids"][:-1])) for r in table.to_pylist()
    }
    assert table.schema.equals(DEMONSTRATIONS) and said == {(row["prompt"], row["response"]) for row in good}
    strict = task.model_copy(update={"max_rejected_share": 0.01})
    with pytest.raises(UserError, match=rf"missing column 1, first at {own}:23 \(response\)"):
        write_demonstrations(strict, (summary["tokenizer"], None), tested, tmp_path / "strict", 1)


def test_a_test_set_of_its_own_goes_through_the_pipeline(ray_session: None, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows(50))
    test = write(tmp_path / "test.jsonl.gz", [*rows(3), *[hh(f"Why {i}?", "So.", "No.") for i in range(5)]])
    task = TextTask(data=data, test_data=test, max_rows=40)
    summary = prepare_text(task, None, MODEL, tmp_path / "out", num_tokenisers=1, learns_judge=False)
    assert (summary["num_rows"], summary["num_train_pairs"], summary["num_judge_pairs"]) == (40, 37, 0)
    assert (summary["test_data"]["num_rows"], summary["num_test_pairs"]) == (8, 8)
    assert summary["dropped"] == {rejections.IN_TEST_DATA: 3}
    assert (
        "3 of 40 rows begin with the same prompt as a row of the test data, and are not trained on" in summary["notes"]
    )
    assert test in summary["rules"]["splits"]


def test_the_same_rows_from_any_source_give_the_same_tables(ray_session: None, tmp_path: Path) -> None:
    good = rows(40)
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts/a.jsonl", good[:25])
    pq.write_table(pa.Table.from_pylist(good[25:]), tmp_path / "parts/b.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(good)}).save_to_disk(str(tmp_path / "saved"))
    columns = ["id", "prompt_ids", "chosen_ids", "rejected_ids"]
    results = []
    for i, data in enumerate([tmp_path / "parts", tmp_path / "saved", tmp_path / "saved"]):
        prepare_text(TextTask(data=str(data)), None, MODEL, tmp_path / f"out{i}", num_tokenisers=1)
        results.append(read_rows(tmp_path / f"out{i}/train_pairs"))
    assert results[0].select(columns).equals(results[1].select(columns))
    assert results[1].equals(results[2])
    assert (tmp_path / "out1/train_pairs/part-0.parquet").read_bytes() == (
        tmp_path / "out2/train_pairs/part-0.parquet"
    ).read_bytes()


def test_a_broken_line_is_a_rejected_row_and_a_broken_file_stops_the_run(ray_session: None, tmp_path: Path) -> None:
    data = write(tmp_path / "broken.jsonl", [*rows(50), b'{"chosen": "a', *rows(60)[50:]])
    summary = prepare_text(TextTask(data=data, max_rejected_share=0.02), None, MODEL, tmp_path / "out", 1)
    assert (summary["num_rows"], summary["dropped"]) == (61, {rejections.NOT_JSON: 1})
    (line,) = (tmp_path / "out/dropped.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "file": data,
        "row": 51,
        "reason": rejections.NOT_JSON,
        "detail": "Unterminated string starting at character 12",
        "remedy": rejections.REMEDIES[rejections.NOT_JSON],
    }
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows(4000)))[:-2000])
    assert check_text_task(TextTask(data=str(cut)))  # the first rows are good
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz:\d+: the compressed file is damaged"):
        prepare_text(TextTask(data=str(cut)), summary["tokenizer"], MODEL, tmp_path / "again", num_tokenisers=1)


def test_too_many_unusable_rows_stop_the_run(ray_session: None, tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", [*rows(1000), *[hh("q", "same", "same")] * 11])
    with pytest.raises(UserError) as caught:
        prepare_text(TextTask(data=data), None, MODEL, tmp_path / "out", num_tokenisers=1)
    for part in (
        "11 of 1011 rows (1.1%) cannot be trained on, and task.max_rejected_share allows 0.01 of them",
        f"identical responses 11, first at {data}:1001 - leave out pairs whose responses are identical",
        f"{tmp_path / 'out/dropped.jsonl'} lists them all",
        "fix the rows, or raise task.max_rejected_share",
    ):
        assert part in str(caught.value)
    assert len((tmp_path / "out/dropped.jsonl").read_text().splitlines()) == 11


def test_what_cannot_be_read_is_said_before_ray_starts(tmp_path: Path) -> None:
    def complaint(data: str, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_text_task(TextTask(data=data, **settings))
        return str(caught.value)

    assert "no such file" in complaint(str(tmp_path / "absent.jsonl"))
    assert "there are no rows" in complaint(write(tmp_path / "empty.jsonl", [b"", b" "]))
    columns = complaint(write(tmp_path / "columns.jsonl", [{"question": "q", "chosen": "a"}]))
    assert "no column 'rejected'; its columns are chosen, question" in columns
    few = complaint(write(tmp_path / "first.jsonl", [rows(1)[0], [1]]))
    assert f"not a JSON object 1, first at {tmp_path}/first.jsonl:2 (list) - write one whole JSON object" in few
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows(9)[0]).encode())[:-20])
    assert "cut.jsonl.gz:1: the compressed file is damaged" in complaint(str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not one")
    assert "not readable as parquet" in complaint(str(tmp_path / "bad.parquet"))
    datasets.Dataset.from_list(rows(2)).train_test_split(1).save_to_disk(str(tmp_path / "saved"))
    assert "no split 'validation'; there are train, test" in complaint(str(tmp_path / "saved"), split="validation")
    assert "cannot be read as a hub dataset" in complaint("nobody/no-such-data-set")
