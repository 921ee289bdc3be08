"""HH-RLHF transcripts read as messages (`task.transcripts: messages`)."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from real_model import smollm2
from templates import CHATML, GEMMA, tokenizer

from prefarena.config import TextTask
from prefarena.data import rejections
from prefarena.data.first_rows import look_at_pairs
from prefarena.data.formats import Format, Pair, normalise
from prefarena.data.notes import transcript_notes
from prefarena.data.preparation import prepare_pairs
from prefarena.data.rejections import Unusable
from prefarena.data.sources import Chunk
from prefarena.data.splits import NONE_HELD_OUT
from prefarena.data.token_tables import TokenTables
from prefarena.data.tokenization import Tokenizer
from prefarena.modeling.load import load_tokenizer

#: Of Anthropic's HH-RLHF, in the folder that PREFARENA_TEST_DATA names.
HH_ROWS = Path(os.environ.get("PREFARENA_TEST_DATA", ""), "hh-rlhf/harmless-2000.jsonl.gz")
ASK = "\n\nHuman: Blue?\n\nAssistant:"
U, A, S = "user", "assistant", "system"


def read(row: dict[str, Any], form: Format = "auto") -> Pair:
    return normalise(row, form, transcripts="messages")


def pair(opening: str, good: str = " Yes.", bad: str = " No.", **more: Any) -> dict[str, Any]:
    return {"chosen": opening + good, "rejected": opening + bad, **more}


@pytest.mark.parametrize(
    ("row", "prompt", "num_joined"),
    [
        (pair(ASK), ((U, "Blue?"),), 0),
        (pair(ASK.lstrip()), ((U, "Blue?"),), 0),
        (pair(ASK.replace("\n", "\r\n")), ((U, "Blue?"),), 0),
        (pair(ASK + " Why?\n\nHuman: Tell!\n\nAssistant:"), ((U, "Blue?"), (A, "Why?"), (U, "Tell!")), 0),
        # Lines with labels that do not stand behind a blank line, or of other kinds, are content.
        (pair("\n\nHuman: Go on:\nHuman: a\nAnswer: b\n\nAssistant:"), ((U, "Go on:\nHuman: a\nAnswer: b"),), 0),
        # Text before the first turn, and a system column.
        (pair("Be brief." + ASK), ((S, "Be brief."), (U, "Blue?")), 0),
        (pair("\n\nSystem: Be brief." + ASK), ((S, "Be brief."), (U, "Blue?")), 0),
        (pair(ASK, system="Be brief."), ((S, "Be brief."), (U, "Blue?")), 0),
        # One speaker twice; a turn without text that goes on.
        (pair("\n\nHuman: Blue?\n\nHuman: Or red?\n\nAssistant:"), ((U, "Blue?\n\nOr red?"),), 1),
        (pair("\n\nHuman:\n\nHuman: Blue?\n\nAssistant:"), ((U, "Blue?"),), 1),
        (pair(ASK + " Hm.\n\nAssistant: So?\n\nHuman: E\n\nAssistant:"),
         ((U, "Blue?"), (A, "Hm.\n\nSo?"), (U, "E")), 1),
        # The prompt in a column of its own, with answers with and without a label, and with whole transcripts.
        ({"prompt": ASK, "chosen": " Yes.", "rejected": " No."}, ((U, "Blue?"),), 0),
        ({"prompt": ASK + " \n", "chosen": "Yes.", "rejected": "No."}, ((U, "Blue?"),), 0),
        ({"prompt": "Human: Blue?", "chosen": "\n\nAssistant: Yes.", "rejected": "Assistant: No."}, ((U, "Blue?"),), 0),
        (pair(ASK, prompt=ASK), ((U, "Blue?"),), 0),
    ],
)  # fmt: skip
def test_turns_become_messages(row: dict[str, Any], prompt: tuple[tuple[str, str], ...], num_joined: int) -> None:
    if row.get("prompt", "").startswith("Human"):
        row = {**row, "prompt": row["prompt"] + "\n\nAssistant: Hm.\n\nHuman: Well?"}
        prompt = (*prompt, (A, "Hm."), (U, "Well?"))
    found = read(row)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, "Yes.", "No.")
    assert found.num_turns_joined == num_joined


def test_an_answer_that_goes_on_in_a_second_turn_is_one_answer() -> None:
    found = read({"chosen": ASK + " Yes.\n\nAssistant: I think.", "rejected": ASK + " No."})
    assert (found.prompt, found.chosen, found.rejected) == (((U, "Blue?"),), "Yes.\n\nI think.", "No.")
    assert found.num_turns_joined == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": ASK + " Yes.\n\nHuman: Eh", "rejected": ASK + " No."}, rejections.NOT_AN_ANSWER),
        ({"chosen": ASK + " Yes.\n\nHuman:", "rejected": ASK + " No."}, rejections.NOT_AN_ANSWER),
        ({"chosen": ASK + " Yes.", "rejected": "\n\nHuman: Blue?"}, rejections.NOT_AN_ANSWER),
        (pair("\n\nHuman: Blue?", "", "!"), rejections.NOT_HH),
        ({"chosen": ASK + " Yes.", "rejected": "No."}, rejections.NOT_HH),
        (pair("\n\nAssistant: Hello!" + ASK), rejections.BAD_ROLES),
        (pair("\n\nAssistant:"), rejections.EMPTY_PROMPT),
        (pair("\n\nHuman:\n\nAssistant:"), rejections.EMPTY_MESSAGE),
        (pair(ASK + "\n\nHuman: Eh\n\nAssistant:"), rejections.EMPTY_MESSAGE),
        (pair(ASK, ""), rejections.EMPTY_RESPONSE),
        (pair(ASK, " Yes.", "  Yes. "), rejections.IDENTICAL),
        ({"chosen": ASK + " Yes.", "rejected": ASK.replace("Blue", "Red") + " No."}, rejections.PROMPTS_DIFFER),
        (pair("Be brief." + ASK, system="Be long."), rejections.SYSTEM_APART),
    ],
)
def test_what_is_no_conversation_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as refused:
        read(row)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Blue?", "chosen": ASK + " Yes.", "rejected": ASK + " No."},  # answers that are transcripts
        {"prompt": "Sum up:\n\nHuman: a\n\nAssistant: b", "chosen": "Yes.", "rejected": "No."},  # a quotation
        {"prompt": "User: a" + ASK, "chosen": "Yes.", "rejected": "No."},
        pair("Question: Which turn?\n\nHuman: a\n\nAssistant: b\n\nAnswer:"),
        pair("Human: Blue?\nAssistant:"),  # lines without blank ones between them
        {"prompt": [{"role": U, "content": ASK}], "chosen": "Yes.", "rejected": "No."},
    ],
)  # fmt: skip
def test_other_rows_are_read_as_ever(row: dict[str, Any]) -> None:
    assert read(row) == normalise(row)
    assert read(row, "standard") == normalise(row, "standard") if isinstance(row.get("prompt"), str) else True


def test_transcripts_stay_text_unless_messages_are_asked_for() -> None:
    assert normalise(pair(ASK)).prompt == ASK
    assert read(pair(ASK), "hh").prompt == ((U, "Blue?"),)


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_a_format_without_transcripts_contradicts_the_setting(form: Format) -> None:
    with pytest.raises(ValueError, match="transcripts: messages reads HH-RLHF transcripts"):
        TextTask(data="x", format=form, transcripts="messages")


# -------------------------------------------------------------------------------- tokens, and what is said


def test_messages_go_through_the_template_and_end_as_it_does() -> None:
    made = tokenizer("bytes", CHATML)
    tokens = Tokenizer(made, TextTask(data="x", transcripts="messages")).pair(read(pair("Be brief." + ASK)))
    assert made.decode(tokens.prompt_ids[1:]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert made.decode(tokens.chosen_ids) == "Yes.<|im_end|>"


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [pair(f"\n\nHuman: {number}?\n\nAssistant:") for number in range(3)]
PLAIN = {"prompt": "Blue?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("template", [CHATML, GEMMA])
def test_the_first_rows_name_the_setting_to_whom_it_concerns(tmp_path: Path, template: str) -> None:
    made, plain = tokenizer("bytes", template), tokenizer("bytes")
    for rows, count in ((ROWS, "3 of the first 3"), ([*ROWS, PLAIN], "3 of the first 4"), ([PLAIN], "")):
        task = TextTask(data=written(tmp_path, rows))
        notes = transcript_notes(look_at_pairs(task), task, made)
        assert len(notes) == bool(count)
        assert all(note.startswith(count) and "set task.transcripts: messages" in note for note in notes)
        assert transcript_notes(look_at_pairs(task), task, plain) == []
        as_text = task.model_copy(update={"format": "standard"})
        assert transcript_notes(look_at_pairs(as_text), as_text, made) == []


def test_rows_that_the_setting_is_not_about_are_counted(tmp_path: Path) -> None:
    made = tokenizer("bytes", CHATML)
    for rows, num_notes in ((ROWS, 0), ([*ROWS, PLAIN], 1)):
        task = TextTask(data=written(tmp_path, rows), transcripts="messages")
        notes = transcript_notes(look_at_pairs(task), task, made)
        assert [note[:28] for note in notes] == ["3 of the first 4 rows are HH"] * num_notes


@pytest.mark.skipif(not HH_ROWS.exists(), reason=f"{HH_ROWS} is not there")
def test_real_rows_and_a_real_chat_model(tmp_path: Path) -> None:
    """Rows 1 to 100, and 651 to 800, among which one speaker goes on in two."""
    with gzip.open(HH_ROWS) as file:
        lines = b"".join(line for number, line in enumerate(file, 1) if number <= 100 or 650 < number <= 800)
    task = TextTask(data=str(HH_ROWS), transcripts="messages", max_prompt_tokens=2000, max_response_tokens=2000)
    made = Tokenizer(load_tokenizer(smollm2()), task)
    table = prepare_pairs(Chunk(str(HH_ROWS), 1, "lines", lines), task, made, shares=NONE_HELD_OUT)
    with TokenTables(tmp_path) as tables:
        tables.add(table)
        counts = tables.summary(task, NONE_HELD_OUT)
    assert (counts["num_rows"], counts["dropped"]) == (250, {rejections.EMPTY_RESPONSE: 1})
    assert (counts["num_turns_joined"], counts["num_responses_as_written"]) == (2, 0)
    row = table.slice(0, 1).to_pylist()[0]
    text = str(made.tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]))
    assert "<|im_start|>user\n" in text and text.endswith("<|im_end|>") and "Human:" not in text
