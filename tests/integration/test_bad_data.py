"""A corpus of bad input. Each case names the place, the reason and the remedy that must be said.

A bad row is rejected and its neighbours are kept; a bad file, and one with too many bad rows, stop the run before Ray
is started.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipelines.cli import main
from pipelines.preferences import check_text_task, prepare_text
from prefarena.config import PretrainedModel, ScratchModel, TextTask
from prefarena.data import rejections as why
from prefarena.data.preparation import COLUMNS, prepare_pairs, prepare_pieces
from prefarena.data.sources import Part, read_chunks
from prefarena.data.splits import NONE_HELD_OUT
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError
from prefarena.modeling.load import load_tokenizer

Row = dict[str, Any]
HH = "\n\nHuman: Why is the sky blue?\n\nAssistant:"
LIMIT = 20_000  # task.max_row_bytes of the cases


def standard(**columns: Any) -> Row:
    """A row that is good but for `columns`."""
    return {"prompt": "Why is the sky blue?", "chosen": " Light scatters.", "rejected": " Paint.", **columns}


def message(role: Any, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


USER, YES, NO = message("user", "Blue?"), message("assistant", "Yes."), message("assistant", "No.")


def chat(*prompt: Any, chosen: Any = (YES,), rejected: Any = (NO,)) -> Row:
    return {"prompt": list(prompt), "chosen": list(chosen), "rejected": list(rejected)}


def encode(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


class BadRow(NamedTuple):
    """A line, or a row to be written as one, and what must be said of it."""

    name: str
    line: Any
    reason: str
    detail: str = ""


BAD_ROWS = [
    # Not JSON.
    BadRow("a truncated line", b'{"prompt": "p", "chosen": "a', why.NOT_JSON, "Unterminated string"),
    BadRow("text that is no JSON", b"Human: hello", why.NOT_JSON, "Expecting value at character 1"),
    BadRow("two objects on a line", encode(standard()) * 2, why.NOT_JSON, "Extra data"),
    BadRow("a comma behind the line", encode(standard()) + b",", why.NOT_JSON, "Extra data"),
    BadRow("a trailing comma", b'{"prompt": "p", "chosen": "a", "rejected": "b",}', why.NOT_JSON, "property name"),
    BadRow("single quotes", b"{'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}", why.NOT_JSON, "property name"),
    BadRow("half of an object", b"{", why.NOT_JSON, "character 2"),
    BadRow("a NUL byte", b'{"prompt": "p\0", "chosen": "a", "rejected": "b"}', why.NOT_JSON, "control character"),
    BadRow("a tab in a string", b'{"prompt": "p\t", "chosen": "a", "rejected": "b"}', why.NOT_JSON, "control"),
    BadRow("a wrong escape", b'{"prompt": "\\x41", "chosen": "a", "rejected": "b"}', why.NOT_JSON, "escape"),
    BadRow("deep nesting of lists", b"[" * 9000, why.NOT_JSON, "nested too deeply"),
    BadRow("deep nesting in a column", b'{"x":' * 2000 + b"1" + b"}" * 2000, why.NOT_JSON, "nested too deeply"),
    BadRow("a number of 5,000 digits", b'{"label": ' + b"9" * 5000 + b"}", why.NOT_JSON, "digits"),
    BadRow("an array", [standard()], why.NOT_AN_OBJECT, "list"),
    BadRow("a string", "text", why.NOT_AN_OBJECT, "str"),
    BadRow("null", None, why.NOT_AN_OBJECT, "NoneType"),
    # Encodings.
    BadRow("latin-1 bytes", '{"prompt": "café"}'.encode("latin-1"), why.NOT_UTF8, "byte 0xe9 at character 16"),
    BadRow("a cut character", '{"prompt": "caf\u00e9'.encode()[:-1], why.NOT_UTF8, "byte 0xc3"),
    BadRow("a surrogate in UTF-8", b'{"prompt": "\xed\xa0\x80"}', why.NOT_UTF8, "byte 0xed"),
    BadRow("a lone surrogate", standard(chosen="a\ud800"), why.BAD_UNICODE, "chosen"),
    BadRow("a lone surrogate in messages", chat(message("user", "\udfff")), why.BAD_UNICODE, "prompt"),
    BadRow("a lone surrogate in the source", standard(source="\ud800"), why.BAD_UNICODE, "source"),
    BadRow("an escaped NUL", standard(rejected="b\0"), why.NUL_INSIDE, "rejected"),
    # Sizes.
    BadRow("a row over the limit", standard(prompt="x" * LIMIT), why.TOO_LARGE, f"task.max_row_bytes {LIMIT}"),
    BadRow("a huge row", standard(extra="x" * 3_000_000), why.TOO_LARGE, f"task.max_row_bytes {LIMIT}"),
    # Columns.
    BadRow("no columns", {}, why.MISSING_COLUMN, "chosen"),
    BadRow("no rejected", {"prompt": "p", "chosen": "a"}, why.MISSING_COLUMN, "rejected"),
    BadRow("null in chosen", standard(chosen=None), why.MISSING_COLUMN, "chosen"),
    BadRow("other names", {"prompt": "p", "completion": "a", "label": True}, why.MISSING_COLUMN, "chosen"),
    BadRow("a number as an answer", standard(rejected=3), why.WRONG_TYPE, "rejected is int"),
    BadRow("NaN as an answer", standard(chosen=math.nan), why.WRONG_TYPE, "chosen is float"),
    BadRow("an object as an answer", standard(chosen={"text": "a"}), why.WRONG_TYPE, "chosen is dict"),
    BadRow("a number as a prompt", standard(prompt=1.5), why.WRONG_TYPE, "prompt is float"),
    BadRow("a list as a prompt of strings", standard(prompt=["p"]), why.WRONG_TYPE, "prompt holds str"),
    BadRow("text against messages", standard(chosen=[YES]), why.WRONG_TYPE, "rejected is str"),
    # Labels.
    BadRow("a label that is NaN", standard(label=math.nan), why.BAD_LABEL, "nan"),
    BadRow("an infinite label", standard(label=math.inf), why.BAD_LABEL, "inf"),
    BadRow("a label that overflows", b'{"prompt":"p","chosen":"a","rejected":"b","label":1e999}', why.BAD_LABEL, "inf"),
    BadRow("a negative label", standard(label=-0.1), why.BAD_LABEL, "-0.1"),
    BadRow("a label above one", standard(label=2), why.BAD_LABEL, "2"),
    BadRow("a label of 400 digits", standard(label=10**400), why.BAD_LABEL, "1000"),
    BadRow("a label in words", standard(label="0.5"), why.WRONG_TYPE, "label is str"),
    BadRow("a label that is true", standard(label=True), why.WRONG_TYPE, "label is bool"),
    # Texts.
    BadRow("an empty response", standard(chosen=""), why.EMPTY_RESPONSE, "chosen"),
    BadRow("a blank response", standard(rejected=" \n\t\u2003"), why.EMPTY_RESPONSE, "rejected"),
    BadRow("an empty prompt", standard(prompt=""), why.EMPTY_PROMPT),
    BadRow("a blank prompt", standard(prompt="\n\n"), why.EMPTY_PROMPT),
    BadRow("identical responses", standard(rejected=" Light scatters."), why.IDENTICAL),
    BadRow("responses that differ in blanks", standard(rejected="Light scatters.\n"), why.IDENTICAL),
    BadRow("a prompt over the limit", standard(prompt="word " * 200), why.PROMPT_TOO_LONG, "tokens"),
    BadRow("a difference beyond the limit", standard(chosen="x" * 99, rejected="x" * 98), why.IDENTICAL_CUT),
    BadRow("an end-of-sequence token inside", standard(chosen="a<|eos|>b"), why.END_INSIDE),
    BadRow("no prompt and no mark", {"chosen": "blue", "rejected": "black"}, why.NO_BOUNDARY, "Assistant:"),
    BadRow("transcripts that differ", {"chosen": HH + " a", "rejected": HH + " c" + HH + " b"}, why.PROMPTS_DIFFER),
    BadRow("one transcript", {"chosen": HH + " a", "rejected": "b"}, why.NOT_HH, "rejected"),
    BadRow("a human turn last", {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c"}, why.NOT_AN_ANSWER, "human"),
    # Conversations.
    BadRow("the assistant first", chat(YES, USER), why.BAD_ROLES, "message 1 is from assistant, at the start"),
    BadRow("two users in a row", chat(USER, USER), why.BAD_ROLES, "message 2 is from user, after one of user"),
    BadRow("two assistants in a row", chat(USER, YES, NO, USER), why.BAD_ROLES, "message 3 is from assistant"),
    BadRow("a system message in the middle", chat(USER, YES, message("system", "s"), USER), why.BAD_ROLES, "message 3"),
    BadRow("a tool before any call", chat(USER, message("tool", "4")), why.BAD_ROLES, "tool, after one of user"),
    BadRow("an unknown role", chat(message("human", "Blue?")), why.BAD_ROLES, "'human'"),
    BadRow("a role that is a list", chat(message(["user"], "Blue?")), why.BAD_ROLES, "['user']"),
    BadRow("a message without role", chat({"content": "Blue?"}), why.BAD_ROLES, "None"),
    BadRow("a prompt that ends with an answer", chat(USER, YES), why.BAD_ROLES, "ends with a message of assistant"),
    BadRow("a system message alone", chat(message("system", "s")), why.EMPTY_PROMPT, "no user message"),
    BadRow("no messages", chat(), why.EMPTY_PROMPT, "no user message"),
    BadRow("an empty message", chat(message("user", ""), YES, USER), why.EMPTY_MESSAGE, "message 1, of user"),
    BadRow("a blank message", chat(USER, message("assistant", " "), USER), why.EMPTY_MESSAGE, "message 2"),
    BadRow("null as content", chat(message("user", None)), why.WRONG_TYPE, "without text in `content`"),
    BadRow("parts as content", chat(message("user", [{"type": "text", "text": "p"}])), why.WRONG_TYPE, "`content`"),
    BadRow("a string as a message", chat("Blue?"), why.WRONG_TYPE, "prompt holds str"),
    BadRow(
        "calls of tools", chat(USER, message("assistant", "x", tool_calls=[{"name": "f"}])), why.TOOL_CALLS, "prompt"
    ),
    BadRow("an empty answer", chat(USER, chosen=[message("assistant", "")]), why.EMPTY_RESPONSE, "chosen"),
    BadRow("an answer of no messages", chat(USER, chosen=[]), why.NOT_AN_ANSWER, "chosen"),
    BadRow("an answer by the user", chat(USER, rejected=[USER]), why.NOT_AN_ANSWER, "rejected"),
    BadRow("an answer of two messages", chat(USER, chosen=[YES, USER, YES]), why.NOT_AN_ANSWER, "one message"),
    BadRow("eos in a message", chat(USER, chosen=[message("assistant", "a<|eos|>")]), why.END_INSIDE),
]

#: Rows that look odd and are good.
GOOD_ROWS = {
    "line ends of Unicode": standard(chosen=" a\u2028b\u2029c\u0085d\x0be"),
    "a NaN that nobody uses": standard(score_chosen=math.nan, score_rejected=math.inf, margin=-1),
    "columns that nobody uses": standard(id=7, chosen_rating={"a": [1]}, created="2026-01-01", metadata=None),
    "a source that is no text": standard(source=3),
    "a label at its limit": standard(label=0),
    "a system message and a tool's result": chat(message("system", ""), USER, YES, message("tool", ""), YES, USER),
    "nulls that Arrow writes": chat({**USER, "tool_calls": None, "name": None}),
    "surrogates in pairs": standard(chosen=" \U0001f642 \ufeff"),
}


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer([HH + " I think that light scatters. \u2028 word"] * 4, 300, folder)
    return folder


def task_of(data: str | Path, **settings: Any) -> TextTask:
    limits = {"max_row_bytes": LIMIT, "max_prompt_tokens": 120, "max_response_tokens": 40}
    return TextTask(data=str(data), **{**limits, **settings})


def prepared(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> list[Row]:
    """Every row of a file, as the pipeline's actors prepare it."""
    task = task_of(path, **settings)
    part = Part("parquet" if path.suffix == ".parquet" else "jsonl", str(path))
    prepare = partial(prepare_pairs, task=task, tokenizer=Tokenizer(tokenizer, task), shares=NONE_HELD_OUT)
    return [row for chunk in read_chunks(part, COLUMNS, task.max_row_bytes) for row in prepare(chunk).to_pylist()]


@pytest.mark.parametrize("case", BAD_ROWS, ids=lambda case: case.name)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_bad_row_is_rejected_alone(tmp_path: Path, bpe_folder: Path, case: BadRow, place: str) -> None:
    lines = [encode(standard(prompt=f"Question {i}?")) for i in range(2)]
    lines.insert(["first", "middle", "last"].index(place), encode(case.line))
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    if place == "first" and lines[0].startswith(b"["):
        with pytest.raises(UserError, match=r"holds a JSON array (that is not closed|with something else)"):
            check_text_task(task_of(path))
        return
    rows = prepared(path, load_tokenizer(bpe_folder))
    assert [row["row"] for row in rows] == [1, 2, 3]
    (bad,) = (row for row in rows if row["reason"] is not None)
    assert (bad["file"], bad["row"]) == (str(path), lines.index(encode(case.line)) + 1)
    assert bad["reason"] == case.reason
    assert case.detail in bad["detail"] and len(bad["detail"]) < 250
    assert why.REMEDIES[bad["reason"]]


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in BAD_ROWS}) == len(BAD_ROWS) >= 60


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_odd_rows_are_kept(tmp_path: Path, bpe_folder: Path, name: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD_ROWS[name], ensure_ascii=False).encode() + b"\r\n")
    tokenizer = load_tokenizer(bpe_folder)
    (row,) = prepared(path, tokenizer)
    assert row["reason"] is None
    chosen = GOOD_ROWS[name]["chosen"]
    text = chosen if isinstance(chosen, str) else " " + chosen[0]["content"]
    assert tokenizer.decode(row["chosen_ids"][:-1]) == text


def test_blank_lines_and_a_byte_order_mark_are_no_rows_and_lines_keep_their_numbers(
    tmp_path: Path, bpe_folder: Path
) -> None:
    path = tmp_path / "data.jsonl"
    one, other = encode(standard()), encode(standard(prompt="p"))
    path.write_bytes(codecs.BOM_UTF8 + b"\n\n" + one + b"\r\n \n" + other + b"\n\n")
    assert [(row["row"], row["reason"]) for row in prepared(path, load_tokenizer(bpe_folder))] == [(3, None), (5, None)]
    path.write_bytes(codecs.BOM_UTF8 + one)
    assert [(row["row"], row["reason"]) for row in prepared(path, load_tokenizer(bpe_folder))] == [(1, None)]


def test_rows_around_chunk_borders_and_huge_lines_keep_their_numbers(tmp_path: Path, bpe_folder: Path) -> None:
    lines = [encode(standard(prompt=f"{i}?", extra="x" * (i * 977 % 5000))) for i in range(400)]
    lines[100], lines[101], lines[399] = b'{"extra": "' + b"x" * 2_000_000 + b'"}', b"{", b"y" * 700_000
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    rows = prepared(path, load_tokenizer(bpe_folder))
    assert [row["row"] for row in rows] == list(range(1, 401))
    assert {row["row"]: row["reason"] for row in rows if row["reason"]} == {
        101: why.TOO_LARGE,
        102: why.NOT_JSON,
        400: why.TOO_LARGE,
    }


def test_a_huge_row_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.writelines([encode(standard()), b"\n", *[b"x" * (1 << 20)] * 64, b"\n", encode(standard())])
    tracemalloc.start()
    chunks = [(chunk.first, chunk.kind) for chunk in read_chunks(Part("jsonl", str(path)), COLUMNS, LIMIT)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chunks == [(1, "lines"), (2, "too_long"), (3, "lines")]
    assert peak < 4 << 20


# ------------------------------------------------------------------------------------------------ files


def parquet(table: pa.Table) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(table, folder / "data.parquet")
        return folder / "data.parquet"

    return write


def holding(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def folder_of(*writers: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for number, writer in enumerate(writers):
            path = writer(folder)
            path.rename(path.with_name(f"{number}-{path.name}"))
        return folder

    return write


def several(number: int = 30, **columns: Any) -> dict[str, list[Any]]:
    return {name: [value] * number for name, value in standard(**columns).items()}


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(encode(row) + b"\n" for row in rows)


_GOOD = jsonl([standard(prompt=f"Question {i}?") for i in range(30)])
_PARQUET = pa.table(several())
_BINARY = pa.table({**several(), "chosen": pa.array([b"bytes"] * 30)})
_TIMES = pa.table({**several(), "rejected": pa.array([0] * 30, pa.timestamp("ms"))})


def _parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_PARQUET, sink)
    return sink.getvalue().to_pybytes()


class BadFile(NamedTuple):
    """How to write a source that cannot be used, and the parts of the one sentence about it."""

    name: str
    write: Callable[[Path], Path]
    says: tuple[str, ...]


BAD_FILES = [
    BadFile("nothing there", lambda folder: folder / "absent.jsonl", ("absent.jsonl: no such file",)),
    BadFile("an empty file", holding("data.jsonl", b""), ("data.jsonl: there are no rows in it",)),
    BadFile("an empty archive", holding("data.jsonl.gz", b""), ("data.jsonl.gz: there are no rows in it",)),
    BadFile("blank lines", holding("data.jsonl", b"\n \n"), ("there are no rows in it",)),
    BadFile("an empty folder", lambda folder: folder, ("holds no jsonl or parquet file",)),
    BadFile("a wrong ending", holding("data.xlsx", b"a,b"), ("data.xlsx: neither jsonl, json, csv", "convert it")),
    BadFile("no ending", holding("data", _GOOD), ("data: neither jsonl, json, csv", "rename")),
    BadFile("UTF-16", holding("data.jsonl", _GOOD.decode().encode("utf-16")), ("data.jsonl: is UTF-16", "iconv")),
    BadFile("UTF-16 unmarked", holding("data.jsonl", _GOOD.decode().encode("utf-16-le")), ("is UTF-16", "iconv")),
    BadFile("UTF-32", holding("data.jsonl", _GOOD.decode().encode("utf-32")), ("is UTF-16, UTF-32", "iconv")),
    BadFile("zeros", holding("data.jsonl", bytes(4096)), ("data.jsonl: is UTF-16, UTF-32 or binary",)),
    BadFile("half an array", holding("data.json", encode([standard()] * 3)[:-9]), ("holds a JSON array that is not",)),
    BadFile(
        "one object over many lines",
        holding("data.json", json.dumps(standard(), indent=1).encode()),
        ("not valid JSON", "data.json:1", "one whole JSON object on each line"),
    ),
    BadFile("an archive without .gz", holding("data.jsonl", gzip.compress(_GOOD)), ("is compressed", ".gz")),
    BadFile("no archive", holding("data.jsonl.gz", _GOOD), ("data.jsonl.gz:1: the compressed file is damaged",)),
    BadFile("a cut archive", holding("data.jsonl.gz", gzip.compress(_GOOD)[:-9]), (".jsonl.gz:", "damaged", "get it")),
    BadFile(
        "a damaged archive",
        holding("data.jsonl.gz", gzip.compress(_GOOD)[:60] + b"\0" * 40 + gzip.compress(_GOOD)[100:]),
        ("data.jsonl.gz:1: the compressed file is damaged", "gzip -t"),
    ),
    BadFile("parquet as jsonl", holding("data.jsonl", _parquet_bytes()), ("is a parquet file; rename it",)),
    BadFile("jsonl as parquet", holding("data.parquet", _GOOD), ("data.parquet:1: not readable as parquet", "again")),
    BadFile("a cut parquet file", holding("data.parquet", _parquet_bytes()[:-100]), ("data.parquet:1: not readable",)),
    BadFile(
        "a damaged parquet file",
        holding("data.parquet", b"PAR1" + b"\xff" * 200 + _parquet_bytes()[204:]),
        ("data.parquet:1: not readable as parquet", "get or write the file again"),
    ),
    BadFile("parquet without rows", parquet(_PARQUET.slice(0, 0)), ("data.parquet: there are no rows in it",)),
    BadFile(
        "parquet without a column",
        parquet(_PARQUET.drop_columns(["rejected"])),
        ("data.parquet: no column 'rejected'; its columns are prompt, chosen", "rename or add"),
    ),
    BadFile(
        "parquet of numbers",
        parquet(pa.table(several(chosen=1))),
        ("data.parquet: its column 'chosen' is int64, not text, or a list of messages; convert it",),
    ),
    BadFile("parquet of bytes", parquet(_BINARY), ("its column 'chosen' is binary",)),
    BadFile("parquet of times", parquet(_TIMES), ("its column 'rejected' is timestamp[ms]",)),
    BadFile("parquet of objects", parquet(pa.table(several(chosen={"a": "b"}))), ("'chosen' is struct<a: string>",)),
    BadFile("parquet of lists of text", parquet(pa.table(several(prompt=["a"]))), ("'prompt' is list<",)),
    BadFile("parquet labels in words", parquet(pa.table(several(label="1"))), ("'label' is string, not a number",)),
    BadFile("parquet labels yes and no", parquet(pa.table(several(label=True))), ("'label' is bool, not a number",)),
    BadFile("a null column", parquet(pa.table(several(rejected=None))), ("no column 'rejected'",)),
    BadFile(
        "parquet files that differ",
        folder_of(parquet(_PARQUET), parquet(_PARQUET.drop_columns(["chosen"]))),
        ("1-data.parquet: no column 'chosen'; its columns are prompt, rejected",),
    ),
    BadFile(
        "a broken file among good ones",
        folder_of(holding("data.jsonl", _GOOD), holding("data.jsonl.gz", b"gzip?")),
        ("1-data.jsonl.gz:1: the compressed file is damaged",),
    ),
    BadFile(
        "other columns",
        holding("data.jsonl", jsonl([{"question": "q", "better": "a"}] * 3)),
        ("data.jsonl: no column 'chosen' and 'rejected'; its columns are better, question", "rename or add"),
    ),
    BadFile(
        "latin-1",
        holding("data.jsonl", "".join(f'{{"prompt": "café {i}"}}\n' for i in range(2000)).encode("latin-1")),
        ("none of its first 1000 rows", "not UTF-8 1000, first at", "data.jsonl:1 (byte 0xe9", "iconv"),
    ),
    BadFile(
        "numbers for text",
        holding("data.jsonl", jsonl([standard(chosen=1)] * 2000)),
        ("none of its first 1000 rows can be trained on", "wrong type 1000", "data.jsonl:1 (chosen is int, not text)"),
    ),
    BadFile(
        "one bad row of a few",
        holding("data.jsonl", _GOOD + b'{"chosen":\n'),
        (
            "1 of 31 rows (3.2%)",
            "allows 0.01",
            "not valid JSON 1, first at",
            "data.jsonl:31",
            "raise task.max_rejected",
        ),
    ),
    BadFile(
        "many reasons",
        holding("data.jsonl", _GOOD + jsonl([{}, [], 1, standard(chosen=""), standard(label=9), standard(label=8)])),
        ("label is not a probability 2, first at", "data.jsonl:35 (9)", "not a JSON object 2", "other reasons 1"),
    ),
]


@pytest.mark.parametrize("case", BAD_FILES, ids=lambda case: case.name)
def test_a_bad_file_is_said_in_one_sentence_before_ray_starts(tmp_path: Path, case: BadFile) -> None:
    with pytest.raises(UserError) as caught:
        check_text_task(task_of(case.write(tmp_path)))
    said = str(caught.value)
    assert "\n" not in said
    for part in case.says:
        assert part in said


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s4://bucket/data.jsonl", "s4://bucket/data.jsonl: this URL cannot be read (Protocol not known: s4)"),
        ("file:///nowhere/data.jsonl", "file:///nowhere/data.jsonl: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder"),
    ],
)
def test_urls_that_cannot_be_read(url: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_text_task(task_of(url))
    assert says in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_the_limit_on_rejected_rows_is_a_setting(tmp_path: Path, share: float) -> None:
    path = holding("data.jsonl", _GOOD + b"{\n{\n")(tmp_path)  # 2 of 32
    if share < 2 / 32:
        with pytest.raises(UserError, match=r"2 of 32 rows \(6\.2%\) .* task\.max_rejected_share allows 0\.02"):
            check_text_task(task_of(path, max_rejected_share=share))
    else:
        assert check_text_task(task_of(path, max_rejected_share=share))


def test_parquet_rows_are_rejected_with_their_number(tmp_path: Path, bpe_folder: Path) -> None:
    columns = several(6)
    columns["prompt"] = [f"Question {i}?" for i in range(6)]
    columns["chosen"][1], columns["rejected"][2], columns["label"] = None, "", [0.5, 1, 1, math.nan, math.inf, None]
    columns["chosen"][5] = "x" * LIMIT
    pq.write_table(pa.table(columns), tmp_path / "data.parquet", row_group_size=4)
    rows = prepared(tmp_path / "data.parquet", load_tokenizer(bpe_folder))
    reasons = [None, why.MISSING_COLUMN, why.EMPTY_RESPONSE, why.BAD_LABEL, why.BAD_LABEL, why.TOO_LARGE]
    assert [(row["row"], row["reason"]) for row in rows] == list(enumerate(reasons, start=1))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": 3}, why.WRONG_TYPE),
        ({"body": "x"}, why.WRONG_TYPE),
        ({"text": "a\ud800"}, why.BAD_UNICODE),
        (b'{"text": ', why.NOT_JSON),
        ({"text": "x" * LIMIT}, why.TOO_LARGE),
    ],
)
def test_bad_pretraining_text_is_rejected_alone(tmp_path: Path, bpe_folder: Path, line: Any, reason: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(jsonl([{"text": "Good."}, line, {"text": " "}, {"text": "Good, too."}]))
    task = task_of(path)
    tokenizer = Tokenizer(load_tokenizer(bpe_folder), task)
    (chunk, *others) = read_chunks(Part("jsonl", str(path)), ("text",), LIMIT)
    rows = [row for one in (chunk, *others) for row in prepare_pieces(one, task, tokenizer).to_pylist()]
    assert [(row["row"], row["reason"]) for row in rows] == [(1, None), (2, reason), (4, None)]


# ----------------------------------------------------------------------------------- tokenizers and templates

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].parts[1] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_stops_the_run_before_ray_starts(
    tmp_path: Path, bpe_folder: Path, template: str, says: str
) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    path = holding("data.jsonl", jsonl([chat(message("user", f"Blue {i}?")) for i in range(9)]))(tmp_path)
    assert {row["reason"] for row in prepared(path, tokenizer)} == {why.TEMPLATE_REFUSES}
    with pytest.raises(UserError) as caught:
        check_text_task(task_of(path), PretrainedModel(path=str(tmp_path / "model")))
    said = str(caught.value)
    assert f"with the tokenizer of {tmp_path / 'model'}: none of its first 9 rows" in said
    assert f"{path}:1" in said and says in said and "fix the template" in said


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (None, "<|bos|>\n\nHuman: Blue?\n\nAssistant:", " Yes.<|eos|>"),  # no template
        (TEMPLATE, "<|bos|>[user]Blue?<|eos|>[assistant]", "Yes.<|eos|>"),  # `add_generation_prompt` is ignored
        (
            "{{ messages | length }}{{ messages[-1].content }}",
            "<|bos|>1Blue?",
            "Yes.<|eos|>",
        ),  # the prompt is rewritten
    ],
)
def test_templates_that_are_missing_or_rewrite_the_prompt_keep_the_boundary(
    tmp_path: Path, bpe_folder: Path, template: str | None, prompt: str, answer: str
) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.chat_template = template
    (row,) = prepared(holding("data.jsonl", jsonl([chat(USER)]))(tmp_path), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == prompt
    assert tokenizer.decode(row["chosen_ids"]) == answer


def test_a_template_that_leaves_out_the_answer_is_noticed(tmp_path: Path, bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    (row,) = prepared(holding("data.jsonl", jsonl([chat(USER)]))(tmp_path), tokenizer)
    assert row["reason"] == why.IDENTICAL


@pytest.mark.parametrize("token", ["pad", "bos", "eos"])
def test_tokenizers_without_special_tokens(tmp_path: Path, bpe_folder: Path, token: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    setattr(tokenizer, f"{token}_token", None)
    tokenizer.save_pretrained(tmp_path / "model")
    path = holding("data.jsonl", _GOOD)(tmp_path)
    model = PretrainedModel(path=str(tmp_path / "model"))
    if token == "eos":
        with pytest.raises(UserError, match=r"model: its tokenizer has no eos token, .*; set one"):
            check_text_task(task_of(path), model)
        return
    assert check_text_task(task_of(path), model)
    loaded = load_tokenizer(tmp_path / "model")
    assert loaded.pad_token_id == (loaded.eos_token_id if token == "pad" else 0)
    (row, *_) = prepared(path, loaded)
    assert loaded.decode(row["prompt_ids"]) == ("" if token == "bos" else "<|bos|>") + "Question 0?"


# ---------------------------------------------------------------------------------------------- end to end


def test_the_corpus_through_the_pipeline_lists_every_bad_row(
    ray_session: None, tmp_path: Path, bpe_folder: Path
) -> None:
    good = [encode(standard(prompt=f"Question {i}?", id=7)) for i in range(40)]
    lines = [*good, *(encode(case.line) for case in BAD_ROWS), good[0]]
    data = holding("data.jsonl", b"\n".join(lines))(tmp_path)
    summary = prepare_text(
        task_of(data, max_rejected_share=0.9), str(bpe_folder), ScratchModel(), tmp_path / "out", num_tokenisers=1
    )
    listed = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text("utf-8").splitlines()]
    expected = [(str(data), 41 + i, case.reason) for i, case in enumerate(BAD_ROWS)]
    assert [(line["file"], line["row"], line["reason"]) for line in listed] == [
        *expected,
        (str(data), len(lines), why.DUPLICATE),
    ]
    assert all(line["remedy"] == why.REMEDIES[line["reason"]] for line in listed)
    assert summary["num_rows"] == len(lines) and summary["num_dropped"] == len(BAD_ROWS) + 1
    assert summary["num_train_pairs"] + summary["num_judge_pairs"] + summary["num_test_pairs"] == 40


def test_the_command_ends_with_status_2_and_one_sentence(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [encode(standard(prompt=f"Question {i}?")) for i in range(1100)]
    lines[1050:1070] = [encode(case.line) for case in BAD_ROWS[:20]]  # behind what is looked at first
    data = holding("data.jsonl", b"\n".join(lines))(tmp_path)
    tree = {
        "output": str(tmp_path / "runs"),
        "task": {"kind": "text", "data": str(data)},
        "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
    }
    (tmp_path / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    assert main(["compare", str(tmp_path / "config.json")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"prefarena: {data}: 20 of 1100 rows (1.8%) cannot be trained on")
    assert f"not valid JSON 13, first at {data}:1051" in said
    (dropped,) = (tmp_path / "runs/stages").glob("data-*/dropped.jsonl")
    assert len(dropped.read_text("utf-8").splitlines()) == 20
    assert not list((tmp_path / "runs/stages").glob("base-*"))
