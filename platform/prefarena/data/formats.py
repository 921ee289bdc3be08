"""Converting the usual formats of preference rows to one form. Pure functions: a row in, a pair or a reason out.

Recognised: TRL's preference formats (standard and conversational, explicit and implicit prompt) and raw HH-RLHF
transcripts. The prompt boundary follows turns, never the longest common character prefix: that would move the words
with which two answers both begin out of the loss and into the prompt.

- Standard, explicit: `prompt`, `chosen`, `rejected` are strings and stay as they are.
- Standard, implicit: `chosen` and `rejected` hold the prompt too. It ends with the answer label of the last turn, such
  as `Assistant:` at the start of a line (`data/transcripts.py`). Without one there is no boundary to rely on, and the
  row is dropped.
- HH: each transcript's prompt is everything up to and including its last "\\n\\nAssistant:"; the response is everything
  after it, its leading space included, so that prompt + response is the transcript again. With `transcripts` as
  "messages" they are conversations (`data/turns.py`).
- Conversational, explicit: `prompt` is a list of messages; each answer is one assistant message, its text, or the whole
  conversation, which then begins with the prompt.
- Conversational, implicit: each list's last message is the answer, those before it are the prompt.

In a conversation user and assistant alternate, the user first. A system (or developer) message may stand before them,
and results of tools (`tool`) behind an assistant's message. Only a system message and a tool's result may be blank.

Whichever way two prompts are found, they must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefarena.data.fields import is_empty, with_fields
from prefarena.data.labels import EVEN, scores_of
from prefarena.data.rejections import (
    BAD_LABEL,
    BAD_ROLES,
    BAD_UNICODE,
    EMPTY_MESSAGE,
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    IDENTICAL,
    LOST_COLUMN,
    MISSING_COLUMN,
    NO_BOUNDARY,
    NOT_AN_ANSWER,
    NOT_HH,
    NUL_INSIDE,
    PROMPTS_DIFFER,
    TOOL_CALLS,
    WRONG_TYPE,
    Unusable,
)
from prefarena.data.renaming import PROMPTS
from prefarena.data.template_inputs import written_inputs
from prefarena.data.transcripts import find_prompt
from prefarena.data.turns import as_messages
from prefarena.records import content_id

Message = dict[str, str]
Format = Literal["auto", "standard", "conversational", "hh"]
Transcripts = Literal["text", "messages"]

#: Stands for the answers of a row that is a prompt alone.
NO_ANSWER = "."
_LEADING = ("system", "developer")
#: The roles behind which a message of each role may stand; "" is the start of the conversation.
_BEFORE = {
    "system": ("",),
    "developer": ("",),
    "user": ("", *_LEADING, "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
#: Where a message may hold the thoughts before its content.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers; all three are strings, or the prompt is messages and the answers are assistant texts.

    `label` is P(chosen > rejected); scores: those that the row gives chosen and rejected. `opening` is the text up to
    the first answer: dialogues that go on from the same opening belong together when data is split. num_turns_joined:
    turns of a transcript that go on with the one before them. inputs: what the chat template gets in addition to the
    messages (`template_inputs.written_inputs`). A single response is a pair whose answers are both it.
    """

    prompt: str | tuple[tuple[str, str], ...]  # messages are (role, content)
    chosen: str
    rejected: str
    label: float
    source: str
    opening: str
    scores: tuple[float, float] | None = None
    num_turns_joined: int = 0
    inputs: str = ""

    @property
    def messages(self) -> list[Message] | None:
        """The prompt as messages; None where it is plain text."""
        if isinstance(self.prompt, str):
            return None
        return [{"role": role, "content": content} for role, content in self.prompt]

    @property
    def scores_contradict(self) -> bool:
        """Whether the label calls `chosen` the better answer, and its score is the lower one."""
        return self.label >= EVEN and self.scores is not None and self.scores[0] < self.scores[1]

    @property
    def is_single(self) -> bool:
        """Whether it is one response, of which `label` says how desirable it is."""
        return self.chosen == self.rejected

    @property
    def id(self) -> str:
        return content_id(self.prompt, self.chosen, self.rejected, *([self.inputs] if self.inputs else []))


def recognise(row: dict[str, Any]) -> Literal["standard", "conversational", "hh"]:
    """The format of a row that has `chosen` and `rejected`."""
    answers = [row.get("chosen"), row.get("rejected")]
    if isinstance(row.get("prompt"), list) or any(isinstance(answer, list) for answer in answers):
        return "conversational"
    whole = row.get("prompt") is None
    if whole and any(isinstance(answer, str) and answer.startswith(_HUMAN) for answer in answers):
        return "hh"
    return "standard"


def normalise(row: dict[str, Any], form: Format = "auto", source: str = "", transcripts: Transcripts = "text") -> Pair:
    """The pair that a row holds. Raises Unusable with the reason where it holds none."""
    pair = _read(row, form, source, transcripts)
    if pair.chosen.strip() == pair.rejected.strip():
        raise Unusable(IDENTICAL)
    return pair


def normalise_single(row: dict[str, Any], form: Format = "auto", source: str = "") -> Pair:
    """The single response that a row of `prompt`, `completion` and `label` holds (TRL's unpaired preferences).

    Raises Unusable as `normalise` does.
    """
    for column in ("completion", "label"):
        if row.get(column) is None:
            raise Unusable(MISSING_COLUMN, column)
    label = float(row["label"]) if isinstance(row["label"], bool) else row["label"]
    answers = {"chosen": row["completion"], "rejected": row["completion"]}
    return _read({**row, **answers, "label": label}, form, source, "text")


def normalise_demonstration(row: dict[str, Any], form: Format = "auto", source: str = "") -> Pair:
    """The response that a row of `prompt` and `response` (or `completion`) holds, which somebody would have given.

    Raises Unusable as `normalise` does.
    """
    response = row.get("completion") if row.get("response") is None else row["response"]
    if response is None:
        raise Unusable(MISSING_COLUMN, "response")
    answers = {"chosen": response, "rejected": response, "label": None}
    return _read({**row, **answers}, "standard" if form == "hh" else form, source, "text")


def normalise_prompt(row: dict[str, Any], form: Format = "auto", source: str = "") -> Pair:
    """The prompt of a row that has no answers, as a pair whose answers are both `NO_ANSWER`.

    Raises Unusable as `normalise` does.
    """
    if all(is_empty(row.get(name)) for name in ("prompt", *PROMPTS)):
        raise Unusable(MISSING_COLUMN, "prompt")
    answer = [{"role": "assistant", "content": NO_ANSWER}] if form == "conversational" else NO_ANSWER
    answers = {"chosen": answer, "rejected": answer, "label": None}
    return _read({**row, **answers}, "standard" if form == "hh" else form, source, "text")


def _read(row: dict[str, Any], form: Format, source: str, transcripts: Transcripts) -> Pair:
    num_joined = 0
    if transcripts == "messages":
        row, num_joined = as_messages(row, form)
        form = "conversational" if form == "hh" and isinstance(row.get("chosen"), list) else form
    row = with_fields(row, form)
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise Unusable(MISSING_COLUMN, column)
    inputs = written_inputs(row)
    kind = recognise(row) if form == "auto" else form
    if kind == "conversational":
        prompt, chosen, rejected, opening = _conversational(row)
    elif kind == "hh":
        prompt, chosen, rejected, opening = _hh(_text(row, "chosen"), _text(row, "rejected"))
    else:
        prompt, chosen, rejected, opening = _standard(row)
    if inputs and isinstance(prompt, str):
        raise Unusable(LOST_COLUMN, "tools or chat_template_kwargs with plain text, which goes through no template")
    if not opening.strip():
        raise Unusable(EMPTY_PROMPT)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise Unusable(EMPTY_RESPONSE, name)
    if isinstance(row.get("source"), str):
        source = _text(row, "source")
    label = _label(row.get("label"))
    return Pair(prompt, chosen, rejected, label, source, opening, scores_of(row), num_joined, inputs)


_Parts = tuple[str | tuple[tuple[str, str], ...], str, str, str]


def _standard(row: dict[str, Any]) -> _Parts:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if row.get("prompt") is not None:
        prompt = _text(row, "prompt")
        return prompt, chosen, rejected, prompt
    if not chosen.strip() or not rejected.strip():
        raise Unusable(EMPTY_RESPONSE)
    found = [find_prompt(text) for text in (chosen, rejected)]
    if found[0] is None or found[1] is None:
        raise Unusable(NO_BOUNDARY, "there is no `prompt` column and no answer label such as `Assistant:`")
    if found[0][0] != found[1][0]:
        raise Unusable(PROMPTS_DIFFER)
    prompt, opening = found[0]
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :], opening


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
    prompt = row.get("prompt")
    if isinstance(prompt, list) and all(isinstance(row[name], str) for name in ("chosen", "rejected")):
        row = {**row, **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1][0] != "assistant":
            raise Unusable(NOT_AN_ANSWER, name)
    explicit = _messages(row, "prompt") if isinstance(prompt, list) else ()
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        explicit = (("user", _text(row, "prompt")),)
    elif prompt is not None and not isinstance(prompt, (str, list)):
        raise Unusable(WRONG_TYPE, f"prompt is {type(prompt).__name__}")
    if isinstance(prompt, list) and chosen[:-1] == rejected[:-1] == explicit:
        chosen, rejected = chosen[-1:], rejected[-1:]  # whole conversations, which begin with the prompt
    if explicit and (len(chosen) > 1 or len(rejected) > 1):
        raise Unusable(NOT_AN_ANSWER, "an answer to an explicit prompt must be one message, or continue that prompt")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable(PROMPTS_DIFFER)
    messages = explicit or chosen[:-1]
    _check_turns(messages)
    opening = next(content for role, content in messages if role == "user")
    return messages, chosen[-1][1], rejected[-1][1], opening


def _check_turns(messages: tuple[tuple[str, str], ...]) -> None:
    """Raise Unusable unless the messages are a prompt: turns in order, with text, up to the one to be answered."""
    if all(role in _LEADING for role, _ in messages):
        raise Unusable(EMPTY_PROMPT, "there is no user message")
    before = ""
    for number, (role, content) in enumerate(messages, start=1):
        if before not in _BEFORE[role]:
            place = f"after one of {before}" if before else "at the start"
            raise Unusable(BAD_ROLES, f"message {number} is from {role}, {place}")
        if role in ("user", "assistant") and not content.strip():
            raise Unusable(EMPTY_MESSAGE, f"message {number}, of {role}")
        before = role
    if before not in ("user", "tool"):
        raise Unusable(BAD_ROLES, f"the prompt ends with a message of {before}")


def _messages(row: dict[str, Any], column: str) -> tuple[tuple[str, str], ...]:
    value = row[column]
    if not isinstance(value, list):
        raise Unusable(WRONG_TYPE, f"{column} is {type(value).__name__}, not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise Unusable(WRONG_TYPE, f"{column} holds {type(message).__name__} where a message must be")
        role, content = message.get("role"), message.get("content")
        if message.get("tool_calls"):
            raise Unusable(TOOL_CALLS, column)
        for name in THOUGHTS:
            if not is_empty(message.get(name)):
                raise Unusable(LOST_COLUMN, f"{name} of a message in {column}")
        if not isinstance(content, str):
            raise Unusable(WRONG_TYPE, f"{column} holds a message without text in `content`")
        if not isinstance(role, str) or role not in _BEFORE:
            raise Unusable(BAD_ROLES, f"{column} holds a message of {role!r}")
        messages.append((role, valid_text(content, column)))
    return tuple(messages)


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise Unusable(WRONG_TYPE, f"{column} is {type(value).__name__}, not text")
    return valid_text(value, column)


def valid_text(text: str, column: str) -> str:
    """The text of a column. Raises Unusable where a tokenizer could not read it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write and no tokenizer can read
        raise Unusable(BAD_UNICODE, column) from None
    if "\0" in text:
        raise Unusable(NUL_INSIDE, column)
    return text


def _label(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unusable(WRONG_TYPE, f"label is {type(value).__name__}, not a number")
    if not 0 <= value <= 1:  # which holds for nan, too
        raise Unusable(BAD_LABEL, str(value))
    return float(value)
