"""Preference rows as people have them, brought to one form. Pure functions: a row in, a pair or a reason out.

Recognised: TRL's preference formats (standard and conversational, explicit and implicit prompt) and raw HH-RLHF
transcripts. The prompt boundary follows turns, never the longest common character prefix: that would move the words
with which two answers both begin out of the loss and into the prompt.

- Standard, explicit: `prompt`, `chosen`, `rejected` are strings and stay as they are.
- Standard, implicit: `chosen` and `rejected` hold the prompt too. It ends with the last line start that reads
  `Assistant:`, `AI:`, `Bot:`, `Answer:`, `A:`, `Response:` or `### Response:`. Without one there is no boundary to
  rely on, and the row is dropped.
- HH: each transcript's prompt is everything up to and including its last "\\n\\nAssistant:"; the response is everything
  after it, its leading space included, so that prompt + response is the transcript again.
- Conversational, explicit: `prompt` is a list of messages; each answer is one assistant message.
- Conversational, implicit: each list's last message is the answer, those before it are the prompt.

Whichever way two prompts are found, they must be equal.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from prefarena.records import content_id

Message = dict[str, str]
Format = Literal["auto", "standard", "conversational", "hh"]

_ROLES = {"system", "developer", "user", "assistant", "tool"}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ANSWER_MARK = re.compile(r"^(?:### *)?(?:Assistant|AI|Bot|Answer|A|Response):", re.MULTILINE)

# Reasons for which rows are dropped; what they say is what people read.
MISSING_COLUMN = "missing column"
WRONG_TYPE = "wrong type"
BAD_UNICODE = "text is not valid Unicode"
EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
IDENTICAL = "identical responses"
PROMPTS_DIFFER = "prompts differ"
NO_BOUNDARY = "no boundary between prompt and response"
NOT_HH = "not an HH-RLHF transcript"
NOT_AN_ANSWER = "does not end with one assistant message"
BAD_ROLES = "bad roles"
BAD_LABEL = "label is not a probability"


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers; all three are strings, or the prompt is messages and the answers are assistant texts.

    `label` is P(chosen > rejected). `opening` is the text up to the first answer: dialogues that go on from the same
    opening belong together when data is split.
    """

    prompt: str | tuple[tuple[str, str], ...]  # messages are (role, content)
    chosen: str
    rejected: str
    label: float
    source: str
    opening: str

    @property
    def messages(self) -> list[Message] | None:
        """The prompt as messages; None where it is plain text."""
        if isinstance(self.prompt, str):
            return None
        return [{"role": role, "content": content} for role, content in self.prompt]

    @property
    def id(self) -> str:
        return content_id(self.prompt, self.chosen, self.rejected)


class Unusable(Exception):
    """A row that cannot be trained on: `reason` is one of this module's constants, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def recognise(row: dict[str, Any]) -> Literal["standard", "conversational", "hh"]:
    """The format of a row that has `chosen` and `rejected`."""
    answers = [row.get("chosen"), row.get("rejected")]
    if any(isinstance(answer, list) for answer in answers):
        return "conversational"
    whole = row.get("prompt") is None
    if whole and any(isinstance(answer, str) and answer.startswith(_HUMAN) for answer in answers):
        return "hh"
    return "standard"


def normalise(row: dict[str, Any], form: Format = "auto", source: str = "") -> Pair:
    """The pair that a row holds. Raises Unusable with the reason where it holds none."""
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise Unusable(MISSING_COLUMN, column)
    kind = recognise(row) if form == "auto" else form
    if kind == "conversational":
        prompt, chosen, rejected, opening = _conversational(row)
    elif kind == "hh":
        prompt, chosen, rejected, opening = _hh(_text(row, "chosen"), _text(row, "rejected"))
    else:
        prompt, chosen, rejected, opening = _standard(row)
    if not opening.strip():
        raise Unusable(EMPTY_PROMPT)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise Unusable(EMPTY_RESPONSE, name)
    if chosen.strip() == rejected.strip():
        raise Unusable(IDENTICAL)
    given = row.get("source")
    return Pair(
        prompt, chosen, rejected, _label(row.get("label")), given if isinstance(given, str) else source, opening
    )


_Parts = tuple[str | tuple[tuple[str, str], ...], str, str, str]


def _standard(row: dict[str, Any]) -> _Parts:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if row.get("prompt") is not None:
        prompt = _text(row, "prompt")
        return prompt, chosen, rejected, prompt
    if not chosen.strip() or not rejected.strip():
        raise Unusable(EMPTY_RESPONSE)
    prompts = []
    for text in (chosen, rejected):
        marks = list(_ANSWER_MARK.finditer(text))
        if not marks or not text[: marks[-1].start()].strip():
            raise Unusable(NO_BOUNDARY, "there is no `prompt` column and no answer mark such as `Assistant:`")
        prompts.append(text[: marks[-1].end()])
    if prompts[0] != prompts[1]:
        raise Unusable(PROMPTS_DIFFER)
    prompt = prompts[0]
    first = next(mark for mark in _ANSWER_MARK.finditer(prompt) if prompt[: mark.start()].strip())
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :], prompt[: first.start()]


def _hh(chosen: str, rejected: str) -> _Parts:
    prompts = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        head, mark, answer = text.rpartition(_ASSISTANT)
        if not mark or not text.startswith(_HUMAN):
            raise Unusable(NOT_HH, name)
        if _HUMAN in answer:
            raise Unusable(NOT_AN_ANSWER, f"{name} ends with a human turn")
        prompts.append(head + mark)
    if prompts[0] != prompts[1]:
        raise Unusable(PROMPTS_DIFFER)
    size = len(prompts[0])
    return prompts[0], chosen[size:], rejected[size:], chosen.partition(_ASSISTANT)[0]


def _conversational(row: dict[str, Any]) -> _Parts:
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    prompt = row.get("prompt")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1][0] != "assistant":
            raise Unusable(NOT_AN_ANSWER, name)
    explicit = _messages(row, "prompt") if isinstance(prompt, list) else ()
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        explicit = (("user", _text(row, "prompt")),)
    elif prompt is not None and not isinstance(prompt, (str, list)):
        raise Unusable(WRONG_TYPE, f"prompt is {type(prompt).__name__}")
    if explicit and (len(chosen) > 1 or len(rejected) > 1):
        raise Unusable(NOT_AN_ANSWER, "an answer to an explicit prompt is one message")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable(PROMPTS_DIFFER)
    messages = explicit or chosen[:-1]
    if not any(role == "user" and content.strip() for role, content in messages):
        raise Unusable(EMPTY_PROMPT)
    if messages[-1][0] not in ("user", "tool"):
        raise Unusable(BAD_ROLES, f"the prompt ends with a message of {messages[-1][0]}")
    first = next(i for i, (role, _) in enumerate(messages) if role == "user")
    return messages, chosen[-1][1], rejected[-1][1], messages[first][1] or messages[-1][1]


def _messages(row: dict[str, Any], column: str) -> tuple[tuple[str, str], ...]:
    value = row[column]
    if not isinstance(value, list):
        raise Unusable(WRONG_TYPE, f"{column} is {type(value).__name__}, not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Unusable(WRONG_TYPE, f"{column} holds a message without text in `content`")
        if message.get("role") not in _ROLES:
            raise Unusable(BAD_ROLES, f"{column} holds a message of {message.get('role')!r}")
        messages.append((str(message["role"]), _valid(message["content"], column)))
    return tuple(messages)


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise Unusable(WRONG_TYPE, f"{column} is {type(value).__name__}, not text")
    return _valid(value, column)


def _valid(text: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write and no tokenizer can read
        raise Unusable(BAD_UNICODE, column) from None
    return text


def _label(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unusable(WRONG_TYPE, f"label is {type(value).__name__}, not a number")
    if math.isnan(value) or not 0 <= value <= 1:
        raise Unusable(BAD_LABEL, str(value))
    return float(value)
