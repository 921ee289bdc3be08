"""HH-RLHF transcripts as messages, for models that have a chat template.

A turn begins with `Human:` or `Assistant:` at the start of the text or behind a blank line. A turn behind one of the
same speaker goes on with that one's message. Text before the first turn is the system's message. Whether the messages
are a conversation, with turns in order and none of them blank, is checked like that of any other messages.
"""

from __future__ import annotations

import re
from typing import Any

from prefarena.data.rejections import NOT_HH, Unusable
from prefarena.data.transcripts import first_label

Row = dict[str, Any]
Messages = list[dict[str, str]]

_ANSWERS = ("chosen", "rejected")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
_SYSTEM = re.compile(r"\A\s*System:")
_ANSWER = re.compile(r"\A\s*Assistant:")
_OPEN = re.compile(r"\r?\n\r?\nAssistant:\s*\Z")  # where a prompt's answer begins


def holds_transcripts(row: Row, form: str) -> bool:
    """Whether a row is made of HH-RLHF transcripts: of two whole ones, or of a prompt in that form with two answers."""
    texts = [text for name in _ANSWERS if isinstance(text := row.get(name), str)]
    if form not in ("auto", "hh") or len(texts) < len(_ANSWERS):
        return False
    prompt = row.get("prompt")
    if prompt is None:
        return any(_has_turns(text) and "Assistant" in _TURN.split(text)[1::2] for text in texts)
    if not isinstance(prompt, str) or not _has_turns(prompt):
        return False
    return bool(_OPEN.search(prompt)) or all(_ANSWER.search(text) for text in texts)


def as_messages(row: Row, form: str) -> tuple[Row, int]:
    """The row with its transcripts as messages, and how many turns were joined to the one before them.

    A row without transcripts stays as it is. Raises Unusable where only one of two answers is a transcript.
    """
    if not holds_transcripts(row, form):
        return row, 0
    if row.get("prompt") is None:
        for name in _ANSWERS:
            if not _has_turns(row[name]):
                raise Unusable(NOT_HH, name)
        chosen, rejected = (_messages(row[name]) for name in _ANSWERS)
        return {**row, "chosen": chosen[0], "rejected": rejected[0]}, max(chosen[1], rejected[1])
    prompt = str(row["prompt"])
    messages, num_joined = _messages(_OPEN.sub("", prompt))
    answers = {name: _answer(row[name], prompt.strip()) for name in _ANSWERS}
    return {**row, "prompt": messages, **answers}, num_joined


def _has_turns(text: str) -> bool:
    """Whether the first label of a text opens a turn of these; text without labels may come before it."""
    found = _TURN.search(text)
    return found is not None and first_label(text) == found.start(1)


def _messages(text: str) -> tuple[Messages, int]:
    """The messages of a transcript, and how many turns were joined to the one before them."""
    before, *turns = _TURN.split(text)
    system = _SYSTEM.sub("", before).strip()
    messages = [{"role": "system", "content": system}] if system else []
    num_joined = 0
    for label, content in zip(turns[::2], turns[1::2], strict=True):
        role, content = _ROLES[label], content.strip()
        if messages and messages[-1]["role"] == role:
            num_joined += 1
            content = "\n\n".join(part for part in (messages.pop()["content"], content) if part)
        messages.append({"role": role, "content": content})
    return messages, num_joined


def _answer(text: str, prompt: str) -> Messages:
    """An answer to a prompt in a separate column: its text, or the whole conversation if it begins with the prompt."""
    if text.strip().startswith(prompt):
        return _messages(text)[0]
    return [{"role": "assistant", "content": _ANSWER.sub("", text).strip()}]
