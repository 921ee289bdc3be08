"""Turns what a row holds besides prompt and answers, and other ways to write these, into the columns that are read.

Nothing that a model would have been given is left out in silence. A `system` column becomes the conversation's first
message; messages that were stored as text, as exports from tables do, become messages again; columns that mean
something and cannot be used refuse the row.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from prefarena.data.rejections import LOST_COLUMN, NOT_MESSAGES, SYSTEM_APART, WRONG_TYPE, Unusable
from prefarena.data.renaming import with_prompt
from prefarena.data.sharegpt import CONVERSATION, with_roles

Row = dict[str, Any]

_TEXTS = ("prompt", CONVERSATION, "chosen", "rejected")
#: Columns that a model would have been given, and that no row can be trained on without.
LOST = {
    "images": "pictures",
    "image": "pictures",
    "videos": "films",
    "video": "films",
    "audios": "sound",
    "audio": "sound",
    "documents": "documents",
    "history": "earlier turns",
}
SYSTEM = ("system", "system_prompt")
_NUMPY = re.compile(r"\}\s*\n\s*\{")  # how numpy writes an array of dicts: a line end, and no comma


def with_fields(row: Row, form: str) -> Row:
    """Bring all that matters in a row into prompt, chosen and rejected. Raises Unusable where that is impossible."""
    for name, what in LOST.items():
        if not is_empty(row.get(name)):
            raise Unusable(LOST_COLUMN, f"{name}: {what} are not read")
    if form in ("auto", "conversational"):
        row = with_roles(_unpacked(with_prompt(row)))
    return _with_system(row, form)


def is_empty(value: Any) -> bool:
    """Whether a column says nothing in a row."""
    return value is None or value == "" or (isinstance(value, (list, dict)) and len(value) == 0)


# ------------------------------------------------------------------------------------------ messages as text


def _unpacked(row: Row) -> Row:
    """Return the row with messages that were stored as text turned back into messages."""
    found = {name: _messages_in(row.get(name)) for name in _TEXTS}
    messages = {name: value for name, value in found.items() if value is not None}
    if not messages:
        return row
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), str) and name not in messages and len(messages.keys() & {"chosen", "rejected"}):
            raise Unusable(NOT_MESSAGES, f"{name} is plain text, but another column holds messages stored as text")
    return {**row, **messages}


def _messages_in(value: Any) -> list[Any] | None:
    """The messages in a text; None if it is other text. Raises Unusable for messages that cannot be read."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    if not text.startswith(("[", "{")) or not text.endswith(("]", "}")):
        return None
    if not re.match(r"""\[?\s*\{\s*["'](role|content|from|value)["']\s*:""", text):
        return None
    for read in (json.loads, ast.literal_eval, lambda written: ast.literal_eval(_NUMPY.sub("}, {", written))):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        messages = found if isinstance(found, list) else [found]
        return messages if all(isinstance(message, dict) for message in messages) else None
    raise Unusable(NOT_MESSAGES, f"neither JSON nor Python: {text[:60]}")


# ---------------------------------------------------------------------------------------------- system column


def _with_system(row: Row, form: str) -> Row:
    """Return the row with its system column as the first message of its conversation."""
    columns = [name for name in SYSTEM if row.get(name) is not None]
    if not columns:
        return row
    system = row[columns[0]]
    if not isinstance(system, str):
        raise Unusable(WRONG_TYPE, f"{columns[0]} is {type(system).__name__}, not text")
    if any(row[name] != system for name in columns):
        raise Unusable(SYSTEM_APART, f"{' and '.join(columns)} differ")
    row = _as_conversation(row, system, form)
    if not system.strip():
        return row
    if isinstance(row.get("prompt"), list):
        return {**row, "prompt": _led(system, row["prompt"])}
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        return {**row, **{name: _led(system, row[name]) for name in ("chosen", "rejected")}}
    raise Unusable(SYSTEM_APART, "the row is plain text")


def _as_conversation(row: Row, system: str, form: str) -> Row:
    """Turn a plain prompt and answers with a system column into messages, which have a place for it."""
    if form not in ("auto", "conversational") or not isinstance(row.get("prompt"), str):
        return row
    answers = {}
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), str):
            answers[name] = [{"role": "assistant", "content": row[name]}]
        elif isinstance(row.get(name), list) and len(row[name]) != 1:
            return row
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def _led(system: str, messages: Sequence[Any]) -> list[Any]:
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise Unusable(SYSTEM_APART, "the conversation has a different system message")
    return list(messages)
