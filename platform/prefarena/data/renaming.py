"""Well-known data sets with other columns: which hold the prompt, and how to write the rest as chosen and rejected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

#: Columns in which data sets have the prompt of `chosen` and `rejected`.
PROMPTS = ("question", "instruction", "input")
_TWO = "write a row's better answer as `chosen` and the other as `rejected`: "
_KNOWN = [
    (
        {"response_0", "response_1", "better_response_id"},
        "PKU-SafeRLHF",
        _TWO + "`response_0` where better_response_id is 0, else `response_1`",
    ),
    (
        {"context", "response1", "response2", "overall_preference"},
        "HelpSteer3",
        "rename `context` to `prompt`; " + _TWO + "`response1` where overall_preference < 0, `response2` where > 0",
    ),
    (
        {"history", "human_ref_A", "human_ref_B", "labels"},
        "SHP",
        "rename `history` to `prompt`, remove `labels`; "
        + _TWO
        + "`human_ref_A` where labels is 1, else `human_ref_B`",
    ),
    ({"prompt", "answers"}, "Nectar", _TWO + "of `answers`, which are ranked, one of a better (lower) rank"),
    (
        {"conversation_a", "conversation_b", "winner"},
        "Chatbot Arena",
        _TWO + "`conversation_a` where winner is model_a, `conversation_b` where it is model_b; leave ties out",
    ),
]


def renaming(present: Collection[str]) -> str:
    """Advice on the columns of a known data set, as the end of a sentence; empty for others."""
    return next((f"; these are {name}'s: {what}" for columns, name, what in _KNOWN if columns <= set(present)), "")


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt in `prompt`: `question`, `input`, or Alpaca's `instruction` with its `input`."""
    found = [row.get(name) for name in PROMPTS]
    texts = [value for value in found if isinstance(value, str) and value.strip()]
    plain = isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)
    if row.get("prompt") is not None or not texts or not plain or str(row["chosen"]).startswith("\n\nHuman:"):
        return row
    return {**row, "prompt": "\n\n".join(texts)}
