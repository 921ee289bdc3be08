"""Data of the field as they are: what a row holds beside prompt and answers, and what lies beside the rows' files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefarena.config import TextTask
from prefarena.data import rejections as why
from prefarena.data.first_rows import look_at_pairs
from prefarena.data.formats import normalise
from prefarena.data.labels import order_notes
from prefarena.data.preparation import COLUMNS, prepare_pairs
from prefarena.data.rejections import Unusable
from prefarena.data.sources import find_parts, read_chunks, survey
from prefarena.data.splits import Shares
from prefarena.data.token_tables import TokenTables
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError

Row = dict[str, Any]


def message(role: str, content: str, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


ASK, YES, NO = message("user", "Blue?"), message("assistant", "Yes."), message("assistant", "No.")
KIND = message("system", "Be kind.")
PLAIN = {"prompt": "Blue?", "chosen": "Yes.", "rejected": "No."}
CHAT = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
IMPLICIT = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
LED = (("system", "Be kind."), ("user", "Blue?"))


def as_json(row: Row) -> Row:
    return {name: json.dumps(value) for name, value in row.items()}


def as_python(row: Row) -> Row:
    return {name: repr(value) for name, value in row.items()}


def as_numpy(row: Row) -> Row:
    return {name: "[" + "\n ".join(map(repr, value)) + "]" for name, value in row.items()}


# ------------------------------------------------------------------------------------------------ a row's columns


@pytest.mark.parametrize(
    "row",
    [
        {**PLAIN, "system": "Be kind."},
        {**PLAIN, "system_prompt": "Be kind."},
        {**PLAIN, "system": "Be kind.", "system_prompt": "Be kind."},
        {**CHAT, "system": "Be kind."},
        {**CHAT, "prompt": [KIND, ASK], "system": "Be kind."},
        {**IMPLICIT, "system": "Be kind."},
        {**IMPLICIT, "prompt": "Blue?", "system": "Be kind."},
        {**PLAIN, "chosen": [YES], "rejected": [NO], "system": "Be kind."},
        {**as_json(CHAT), "system": "Be kind."},
    ],
)
def test_a_system_column_leads_the_conversation(row: Row) -> None:
    pair = normalise(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (LED, "Yes.", "No.")


@pytest.mark.parametrize("row", [PLAIN, CHAT, IMPLICIT])
def test_a_blank_system_column_is_no_message_and_makes_all_rows_conversations(row: Row) -> None:
    assert normalise({**row, "system": ""}).prompt == (("user", "Blue?"),)
    assert normalise({**row, "system": None}) == normalise(row)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: Blue?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Blue?\n\nAssistant: No."},
        {"chosen": "Q: Blue?\nA: Yes.", "rejected": "Q: Blue?\nA: No."},
        {**CHAT, "prompt": [message("system", "Be rude."), ASK]},
    ],
)
def test_a_system_column_without_a_place_refuses_the_row(row: Row) -> None:
    with pytest.raises(Unusable) as caught:
        normalise({**row, "system": "Be kind."})
    assert caught.value.reason == why.SYSTEM_APART
    with pytest.raises(Unusable, match="system is int"):
        normalise({**row, "system": 3})


@pytest.mark.parametrize("write", [as_json, as_python, as_numpy])
@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        IMPLICIT,
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {**CHAT, "chosen": [message("assistant", 'It\'s "so".\n\nYes} {no.')]},
    ],
)
def test_messages_stored_as_text_are_messages(write: Callable[[Row], Row], row: Row) -> None:
    assert normalise(write(row)) == normalise(row)


def test_text_that_only_looks_like_messages() -> None:
    for text in ("[1, 2]", '{"answer": 4}', "[assistant] Yes.", '[{"name": "x"}]', "{}"):
        assert normalise({**PLAIN, "chosen": text}).chosen == text
    broken = {**PLAIN, "chosen": '[{"role": "assistant", "content": Yes.}]'}
    mixed = {**PLAIN, "chosen": json.dumps([YES])}
    for row in (broken, mixed):
        with pytest.raises(Unusable) as caught:
            normalise(row)
        assert caught.value.reason == why.NOT_MESSAGES
        assert normalise(row, form="standard").chosen == row["chosen"]


@pytest.mark.parametrize("answers", [("Yes.", "No."), ([YES], [NO]), ([ASK, YES], [ASK, NO])])
def test_answers_to_a_list_prompt_are_texts_or_messages_or_whole_conversations(answers: tuple[Any, Any]) -> None:
    pair = normalise({"prompt": [ASK], "chosen": answers[0], "rejected": answers[1]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "Blue?"),), "Yes.", "No.")
    with pytest.raises(Unusable):
        normalise({"prompt": [message("user", "Red?")], "chosen": [ASK, YES], "rejected": [ASK, NO]})


def said(role: str, text: str) -> Row:
    return {"from": role, "value": text}


G_ASK, G_YES, G_NO = said("human", "Blue?"), said("gpt", "Yes."), said("gpt", "No.")


@pytest.mark.parametrize("write", [dict, as_json, as_python])
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [G_ASK], "chosen": G_YES, "rejected": G_NO},  # as LLaMA-Factory has it
        {"conversations": [G_ASK], "chosen": [G_YES], "rejected": [G_NO]},
        {"conversations": [ASK], "chosen": YES, "rejected": NO},
        {"prompt": [G_ASK], "chosen": [G_YES], "rejected": [G_NO]},
        {"prompt": [G_ASK], "chosen": YES, "rejected": said("chatgpt", "No.")},
        {"chosen": [G_ASK, G_YES], "rejected": [G_ASK, G_NO]},
        {"conversations": [G_ASK, G_YES], "chosen": [G_ASK, G_YES], "rejected": [G_ASK, G_NO]},  # not the prompt
    ],
)
def test_sharegpts_messages_are_messages(write: Callable[[Row], Row], row: Row) -> None:
    pair = normalise(write(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "Blue?"),), "Yes.", "No.")


def test_sharegpts_roles() -> None:
    long = [said("system", "Be kind."), G_ASK, said("gpt", "Hm."), said("observation", "sky: blue")]
    pair = normalise({"conversations": long, "chosen": "Yes.", "rejected": "No."})
    assert isinstance(pair.prompt, tuple)
    assert [role for role, _ in pair.prompt] == ["system", "user", "assistant", "tool"]
    for role, reason in (("function_call", why.TOOL_CALLS), ("narrator", why.BAD_ROLES)):
        with pytest.raises(Unusable) as caught:
            normalise({"conversations": [G_ASK, said(role, "x"), G_ASK], "chosen": G_YES, "rejected": G_NO})
        assert caught.value.reason == reason
    with pytest.raises(Unusable, match="without text in `content`"):
        normalise({"conversations": [{"from": "human", "value": None}], "chosen": G_YES, "rejected": G_NO})


def test_sharegpts_columns_in_a_table_and_unused_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    task = TextTask(data=str(path))
    pq.write_table(pa.Table.from_pylist([{"conversations": [G_ASK], "chosen": G_YES, "rejected": G_NO}] * 3), path)
    assert look_at_pairs(task).notes == []
    pq.write_table(pa.Table.from_pylist([{**CHAT, "conversations": [G_ASK]}] * 3), path)
    (note,) = look_at_pairs(task).notes
    assert note.endswith("columns that are not used: conversations")


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio", "documents", "history"])
def test_a_column_that_would_be_lost_refuses_the_row(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unusable, match=name) as caught:
        normalise({**PLAIN, name: ["x"]})
    assert caught.value.reason == why.LOST_COLUMN
    assert normalise({**PLAIN, name: []}) == normalise({**PLAIN, name: None}) == normalise(PLAIN)
    pq.write_table(pa.Table.from_pylist([{**PLAIN, name: ["x"]}] * 3), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=f"its column '{name}' would be lost"):
        look_at_pairs(TextTask(data=str(tmp_path / "data.parquet")))


@pytest.mark.parametrize(
    "row",
    [
        {**PLAIN, "tools": [{"name": "weather"}]},
        {**PLAIN, "chat_template_kwargs": {"enable_thinking": False}},
        {**CHAT, "chosen": [{**YES, "reasoning_content": "Hm."}]},
        {**CHAT, "prompt": [ASK, {**YES, "thinking": "Hm."}, ASK]},
    ],
)
def test_what_only_a_template_could_show_refuses_the_row(row: Row) -> None:
    with pytest.raises(Unusable) as caught:
        normalise(row)
    assert caught.value.reason == why.LOST_COLUMN


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_not_used_are_named_once(tmp_path: Path, kind: str) -> None:
    rows = [{**PLAIN, "prompt": f"Blue {i}?", "language": 1, "id": "x", "margin": "y"} for i in range(5)]
    data = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        data.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), data)
    assert look_at_pairs(TextTask(data=str(data))).notes == [f"{data}: columns that are not used: id, language, margin"]


# ------------------------------------------------------------------------------------------------ labels, scores


def write_lines(path: Path, rows: list[Row]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def numbered(**columns: list[Any]) -> list[Row]:
    size = len(next(iter(columns.values())))
    return [
        {**PLAIN, "prompt": f"Blue {i}?", **{name: values[i] for name, values in columns.items()}} for i in range(size)
    ]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, 0, 1], "holds only whole numbers, as classes do, and 2 of its first 4 are 0"),
        ([0, 0, 0], "and 3 of its first 3 are 0"),
        ([0, 1, 2, 1], "holds only whole numbers"),
        ([0.0, 0.1, 0.2], "all of its first 3 labels are under one half"),
        (["chosen", "rejected"], "label is str, not a number"),
        ([True, False], "label is bool, not a number"),
        ([1, 2, 3], "rename the column if it is something else"),
        ([-1, 1, 1], "rename the column if it is something else"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_labels_that_are_classes_stop_the_run(tmp_path: Path, labels: list[Any], says: str, kind: str) -> None:
    rows = numbered(label=labels)
    data = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_lines(data, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), data)
    with pytest.raises(UserError) as caught:
        look_at_pairs(TextTask(data=str(data)))
    said = str(caught.value)
    assert "rename" in said
    assert (kind == "parquet" and isinstance(labels[0], (str, bool))) or says in said


@pytest.mark.parametrize("labels", [[1, 1, 1], [0.0, 1.0], [0.9, 0.4, 0.5], [None, None], [1, 0.0]])
def test_labels_that_are_probabilities_pass(tmp_path: Path, labels: list[Any]) -> None:
    assert look_at_pairs(TextTask(data=write_lines(tmp_path / "data.jsonl", numbered(label=labels)))).parts


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("reward_chosen", "reward_rejected"),
        ("chosen_avg_rating", "rejected_avg_rating"),
    ],
)
def test_scores_against_the_order_are_told(names: tuple[str, str]) -> None:
    for chosen, rejected, expected in ((1, 2, True), (2.5, 1, False), (1, 1, False), (None, 1, False), ("1", 2, False)):
        assert normalise({**PLAIN, names[0]: chosen, names[1]: rejected}).scores_contradict is expected
    assert not normalise({**PLAIN, names[0]: 1, names[1]: 2, "label": 0.2}).scores_contradict


def test_labels_and_scores_against_the_order_are_counted_and_said(tmp_path: Path) -> None:
    train_tokenizer(["Blue 1? Yes. No."], 300, tmp_path / "bpe")
    rows = numbered(label=[0.9, 0.2, 0.1] * 20, score_chosen=[1.0, 1.0, 3.0] * 20, score_rejected=[2.0] * 60)
    task = TextTask(data=write_lines(tmp_path / "data.jsonl", rows))
    tokenizer, shares = Tokenizer.load(tmp_path / "bpe", None, task), Shares(test=0.2, judge=0.2, seed=0)
    with TokenTables(tmp_path) as tables:
        for chunk in read_chunks(look_at_pairs(task).parts[0], COLUMNS, task.max_row_bytes):
            tables.add(prepare_pairs(chunk, task, tokenizer, shares=shares))
    counts = tables.summary(task, shares)
    assert (counts["num_labels_under_half"], counts["num_scores_contradicting"]) == (40, 20)
    notes = order_notes(counts)
    assert "40 of 60 pairs have a label under one half" in notes[0]
    assert "20 of 60 pairs have a lower score for `chosen`" in notes[1]


# --------------------------------------------------------------------------------------------- a folder's files

ROWS = (json.dumps(PLAIN) + "\n") * 3
_NO_ROWS = [
    "dataset_infos.json",
    "dataset_info.json",
    "state.json",
    "trainer_state.json",
    ".DS_Store",
    ".train.jsonl.swp",
    "._train.jsonl",
    ".hidden.jsonl",
    "_metadata.parquet",
    "train.jsonl~",
    "train.jsonl.bak",
    "train.jsonl.orig",
    "#train.jsonl#",
    "~$train.json",
    "README.md",
    "shards.zip",
]


@pytest.mark.parametrize("name", _NO_ROWS)
def test_what_lies_beside_the_rows_is_not_read_and_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_text(ROWS)
    (tmp_path / name).write_text('{"chosen": 1}\n')
    found = survey(str(tmp_path), "train")
    assert [Path(part.path).name for part in found.parts] == ["train.jsonl"]
    assert found.notes == [f"{tmp_path}: not read: {name}"]


@pytest.mark.parametrize("text", ['{\n "default": {"rows": 3}\n}', '{"num_examples": 60}', '{"a": {"b": 1}}\n'])
def test_a_json_object_beside_shards_is_not_read_whatever_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "part-0.jsonl").write_text(ROWS)
    (tmp_path / "info-of-ours.json").write_text(text)
    (tmp_path / "more.json").write_text(ROWS)
    found = survey(str(tmp_path), "train")
    assert [Path(part.path).name for part in found.parts] == ["more.json", "part-0.jsonl"]
    assert "info-of-ours.json" in found.notes[0]


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (("a.jsonl", "b.jsonl"), "train", ("a.jsonl", "b.jsonl")),
        (("train.jsonl", "test.jsonl"), "train", ("train.jsonl",)),
        (("train.jsonl", "test.jsonl"), "test", ("test.jsonl",)),
        (("train-0.jsonl", "train-1.jsonl", "dev.jsonl"), "train", ("train-0.jsonl", "train-1.jsonl")),
        (("train-0.jsonl", "dev.jsonl"), "validation", ("dev.jsonl",)),
        (("my_train1.jsonl", "my_eval1.jsonl"), "test", ("my_eval1.jsonl",)),
        (("contest.jsonl", "retrain.jsonl"), "train", ("contest.jsonl", "retrain.jsonl")),
        (
            ("train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl", "test_prefs-00000-of-00001.jsonl"),
            "train_prefs",
            ("train_prefs-00000-of-00001.jsonl",),
        ),
        (
            ("train-00000-of-00002.jsonl.gz", "train-00001-of-00002.jsonl.gz", "test-00000-of-00001.jsonl.gz"),
            "train",
            ("train-00000-of-00002.jsonl.gz", "train-00001-of-00002.jsonl.gz"),
        ),
    ],
)
def test_files_that_are_named_by_split_honour_it(
    tmp_path: Path, names: tuple[str, ...], split: str, read: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).write_text(ROWS)
    assert [Path(part.path).name for part in find_parts(str(tmp_path), split)] == list(read)


@pytest.mark.parametrize(
    ("names", "split", "says"),
    [
        (("test.jsonl", "dev.jsonl"), "train", "none belongs to 'train': there are test, validation"),
        (("train.jsonl",), "tset", "none belongs to 'tset': there are train"),
        (("a.jsonl", "test.jsonl"), "train", "none belongs to 'train': there are test"),
        (
            ("train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"),
            "train",
            "more than one split matches 'train': train_prefs, train_sft",
        ),
    ],
)
def test_a_folder_without_the_split_stops_with_a_sentence(
    tmp_path: Path, names: tuple[str, ...], split: str, says: str
) -> None:
    for name in names:
        (tmp_path / name).write_text(ROWS)
    with pytest.raises(UserError) as caught:
        find_parts(str(tmp_path), split)
    assert says in str(caught.value) and "set task.split to one of them" in str(caught.value)


def test_a_folder_of_folders_says_that_they_are_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"\(data/ in it are not searched\)"):
        find_parts(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"question": "Blue?"}, "Blue?"),
        ({"input": "Blue?"}, "Blue?"),
        ({"instruction": "Blue?", "input": ""}, "Blue?"),
        ({"instruction": "Is it?", "input": "Blue"}, "Is it?\n\nBlue"),
        ({"prompt": "Blue?", "question": "Red?"}, "Blue?"),
        ({"system": "Be kind.", "question": "Blue?"}, LED),
    ],
)
def test_prompts_under_other_names(columns: Row, prompt: Any) -> None:
    assert normalise({**columns, "chosen": "Yes.", "rejected": "No."}).prompt == prompt


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("prompt", "response_0", "response_1", "better_response_id"), "PKU-SafeRLHF"),
        (("context", "response1", "response2", "overall_preference"), "HelpSteer3"),
        (("history", "human_ref_A", "human_ref_B", "labels"), "SHP"),
        (("prompt", "answers"), "Nectar"),
        (("conversation_a", "conversation_b", "winner"), "Chatbot Arena"),
    ],
)
def test_columns_of_known_data_sets_get_the_renaming(tmp_path: Path, columns: tuple[str, ...], name: str) -> None:
    data = write_lines(tmp_path / "data.jsonl", [dict.fromkeys(columns, "x")] * 3)
    with pytest.raises(UserError, match=f"these are {name}'s: .*`chosen`"):
        look_at_pairs(TextTask(data=data))
