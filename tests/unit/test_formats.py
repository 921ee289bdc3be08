"""Recognising and normalising preference rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prefarena.data import rejections
from prefarena.data.formats import normalise, recognise
from prefarena.data.rejections import Unusable

Q = "\n\nHuman: Why is the sky blue?\n\nAssistant:"
USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "Blue?"), ("assistant", "Yes."), ("assistant", "No.")))


def reason(row: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(Unusable) as caught:
        normalise(row, **settings)
    return caught.value.reason


def test_hh_opening_shared_by_both_answers_stays_with_the_answers() -> None:
    pair = normalise({"chosen": Q + " I think it scatters.", "rejected": Q + " I think it is paint."})
    assert (pair.prompt, pair.chosen, pair.rejected) == (Q, " I think it scatters.", " I think it is paint.")


def test_hh_prompt_is_the_whole_dialogue_and_its_opening_the_first_turn() -> None:
    dialogue = Q + " Guess.\n\nHuman: No.\n\nAssistant:"
    pair = normalise({"chosen": dialogue + " Light\u2028scatters.", "rejected": dialogue + " Eh."})
    assert pair.prompt == dialogue
    assert pair.chosen == " Light\u2028scatters."
    assert pair.opening == "\n\nHuman: Why is the sky blue?"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"prompt": "Blue?", "chosen": " Yes.", "rejected": " No."}, "Blue?", " Yes."),
        ({"chosen": "Q: Blue?\nA: It is.", "rejected": "Q: Blue?\nA: It is not."}, "Q: Blue?\nA:", " It is."),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, (("user", "Blue?"),), "Yes."),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, (("user", "Blue?"),), "Yes."),
        ({"prompt": "Blue?", "chosen": [USER, YES], "rejected": [USER, NO]}, (("user", "Blue?"),), "Yes."),
    ],
)
def test_trl_formats(row: dict[str, Any], prompt: Any, chosen: str) -> None:
    pair = normalise(row)
    assert (pair.prompt, pair.chosen, pair.label) == (prompt, chosen, 1.0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": Q + " a", "rejected": Q.replace("sky", "sea") + " b"}, rejections.PROMPTS_DIFFER),
        ({"chosen": Q + " a", "rejected": Q + " a "}, rejections.IDENTICAL),
        ({"chosen": Q + " a", "rejected": Q}, rejections.EMPTY_RESPONSE),
        ({"chosen": Q + " a\n\nHuman: b", "rejected": Q + " c"}, rejections.NOT_AN_ANSWER),
        ({"chosen": Q + " a", "rejected": "b"}, rejections.NOT_HH),
        ({"prompt": " \n", "chosen": "a", "rejected": "b"}, rejections.EMPTY_PROMPT),
        ({"prompt": "p", "chosen": "a"}, rejections.MISSING_COLUMN),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, rejections.WRONG_TYPE),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, rejections.WRONG_TYPE),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, rejections.NO_BOUNDARY),
        ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, rejections.BAD_UNICODE),
        ({"chosen": [USER], "rejected": [USER, NO]}, rejections.NOT_AN_ANSWER),
        ({"chosen": [YES], "rejected": [NO]}, rejections.EMPTY_PROMPT),
        ({"chosen": [USER, YES, YES], "rejected": [USER, YES, NO]}, rejections.BAD_ROLES),
        ({"prompt": [{"role": "robot", "content": "x"}], "chosen": [YES], "rejected": [NO]}, rejections.BAD_ROLES),
        ({"prompt": [{"role": "user", "content": None}], "chosen": [YES], "rejected": [NO]}, rejections.WRONG_TYPE),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": math.nan}, rejections.BAD_LABEL),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 1.5}, rejections.BAD_LABEL),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": True}, rejections.WRONG_TYPE),
    ],
)
def test_rows_that_cannot_be_trained_on_say_why(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


def test_a_stated_format_overrides_what_the_row_looks_like() -> None:
    row = {"chosen": "plain", "rejected": "text"}
    assert recognise(row) == "standard"
    assert reason(row, form="hh") == rejections.NOT_HH
    assert reason(row, form="conversational") == rejections.WRONG_TYPE


def test_id_follows_content() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert normalise(row).id == normalise({**row, "source": "elsewhere"}).id
    assert normalise(row).id != normalise({**row, "chosen": "b", "rejected": "a"}).id
