"""Single labelled responses as people have them: what a row becomes, and what is no such row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from templates import CHATML, tokenizer

from pipelines.plan import make_plan
from prefarena.config import TextTask, parse_config
from prefarena.data import rejections
from prefarena.data.first_rows import look_at_singles
from prefarena.data.formats import normalise, normalise_single
from prefarena.data.rejections import Unusable
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "label"),
    [
        ({"prompt": "Why?", "completion": " So.", "label": True}, "Why?", " So.", 1.0),
        ({"prompt": "Why?", "completion": " So.", "label": 0}, "Why?", " So.", 0.0),
        ({"prompt": "Why?", "completion": " So.", "label": 0.25}, "Why?", " So.", 0.25),
        ({"prompt": [USER], "completion": [ANSWER], "label": False}, (("user", "Why?"),), "So.", 0.0),
        ({"question": "Why?", "completion": "So.", "label": True}, "Why?", "So.", 1.0),
        ({"prompt": "Why?", "completion": [ANSWER], "label": True, "system": "Be brief."},
         (("system", "Be brief."), ("user", "Why?")), "So.", 1.0),
    ],
    ids=["text", "whole number", "probability", "messages", "question", "system"],
)  # fmt: skip
def test_a_row_is_one_response_with_its_label(row: dict[str, Any], prompt: Any, answer: str, label: float) -> None:
    found = normalise_single(row)
    assert (found.prompt, found.chosen, found.label) == (prompt, answer, label) and found.is_single


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "completion": "So."}, rejections.MISSING_COLUMN),
        ({"prompt": "Why?", "label": True}, rejections.MISSING_COLUMN),
        ({"prompt": "Why?", "completion": "So.", "label": "yes"}, rejections.WRONG_TYPE),
        ({"prompt": "Why?", "completion": "So.", "label": 5}, rejections.BAD_LABEL),
        ({"prompt": "Why?", "completion": " ", "label": True}, rejections.EMPTY_RESPONSE),
        ({"prompt": " ", "completion": "So.", "label": True}, rejections.EMPTY_PROMPT),
        ({"prompt": [USER, ANSWER], "completion": [ANSWER], "label": True}, rejections.BAD_ROLES),
        ({"completion": "So.", "label": True}, rejections.NO_BOUNDARY),
    ],
)
def test_what_is_no_such_row_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as found:
        normalise_single(row)
    assert found.value.reason == reason


def test_a_pair_of_equal_answers_is_still_none() -> None:
    with pytest.raises(Unusable, match=rejections.IDENTICAL):
        normalise({"prompt": "Why?", "chosen": "So.", "rejected": "So. "})


@pytest.mark.parametrize("form", ["text", "messages"])
def test_tokens_are_those_of_the_same_answer_in_a_pair(form: str) -> None:
    tokens = Tokenizer(tokenizer("bytes", CHATML), TextTask(data="x", max_response_tokens=6))
    prompt: Any = [USER] if form == "messages" else "Why?"
    for answer in ("So.", "So it is, and so it will be for ever and ever."):
        pair = tokens.pair(normalise({"prompt": prompt, "chosen": answer, "rejected": "Not so."}))
        single = tokens.pair(normalise_single({"prompt": prompt, "completion": answer, "label": True}))
        assert single.prompt_ids == pair.prompt_ids and single.chosen_ids == pair.chosen_ids == single.rejected_ids


def test_columns_are_looked_at_before_any_work(tmp_path: Path) -> None:
    labels: list[Any] = [True, False, 1, 0.5]
    for place, values in enumerate((labels[:2], labels[2:3], labels[3:])):
        path = tmp_path / f"{place}.parquet"
        table = {"prompt": ["a"] * len(values), "completion": ["b"] * len(values), "label": values}
        pq.write_table(pa.table(table), path)
        assert look_at_singles(TextTask(data="x"), str(path)).num_rows == len(values)
    for name, columns, says in (
        (
            "words",
            {"prompt": ["a"], "completion": ["b"], "label": ["good"]},
            "its column 'label' is string, not a number",
        ),
        ("pairs", {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, "completion"),
    ):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=says):
            look_at_singles(TextTask(data="x"), str(tmp_path / f"{name}.parquet"))


def test_they_are_in_the_address_of_the_data_where_they_are_given(tmp_path: Path) -> None:
    def key(**settings: Any) -> str:
        task = {"kind": "text", "data": str(tmp_path / "none.jsonl"), **settings}
        config = parse_config({"task": task, "entries": [{"name": "kto", "method": {"kind": "kto"}}]})
        (plan,) = make_plan(config)
        assert plan.responses["float32"] in plan.shared() and plan.trained[0].training is not None
        return plan.data.key

    assert key() == key(unpaired_data=None) != key(unpaired_data="singles.jsonl")
