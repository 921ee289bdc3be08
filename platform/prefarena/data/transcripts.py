"""Where the prompt ends in a plain text that holds prompt and answer: found by turns, never by a line of the answer.

A turn begins with a label at the start of a line, such as `User:` or `

# Response:`. The first label of the text, where the prompt must be, settles which label asks in it and which ones
answer; lines with other labels are content. The prompt ends behind the first answer label that follows the last asking
one. So neither `Answer: 4` at the end of an answer that was thought through step by step, nor a quiz that an answer
contains, moves any of it into the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Labels that belong together: those that ask, those that answer.
_FAMILIES = (
    (("User", "Human"), ("Assistant", "AI", "Bot")),
    (("Question", "Q"), ("Answer", "A")),
    (("Instruction", "Input"), ("Response",)),
)
_CHAT = 0
_FAMILY = {label: number for number, family in enumerate(_FAMILIES) for labels in family for label in labels}
_ASKING = {label for asking, _ in _FAMILIES for label in asking}
_LABEL = re.compile(rf"^(?:### *)?({'|'.join(_FAMILY)}):", re.MULTILINE)
_NEXT_OPTION = re.compile(r"^B:", re.MULTILINE)


@dataclass(frozen=True)
class _Mark:
    label: str
    start: int
    end: int

    @property
    def asks(self) -> bool:
        return self.label in _ASKING

    @property
    def family(self) -> int:
        return _FAMILY[self.label]


def find_prompt(text: str) -> tuple[str, str] | None:
    """The prompt of a text, its last answer label included, and the text up to its first one; None: there is no label.

    Where text without a label comes before the first answer label, that text is the prompt; only in a chat (`User:`,
    `Assistant:`) may further turns follow.
    """
    marks = _marks(text)
    if not marks:
        return None
    asking, answering = _labels(marks)
    answers = [mark for mark in marks if mark.label in answering]
    if not answers:
        return None
    asked = [mark.start for mark in marks if mark.label in asking and mark.start < answers[-1].start]
    last = asked[-1] if asked else -1
    boundary = next(mark for mark in answers if mark.start > last)
    return text[: boundary.end], text[: answers[0].start]


def first_label(text: str) -> int | None:
    """The position of the first label in a text, whatever it is used for; None if there is none."""
    found = _LABEL.search(text)
    return None if found is None else found.start(1)


def _marks(text: str) -> list[_Mark]:
    """The labels of a text from the first that can be one: an answer's has text before it."""
    marks = [_Mark(found[1], found.start(), found.end()) for found in _LABEL.finditer(text)]
    if not any(mark.label == "Q" for mark in marks):
        ends = [*(mark.start for mark in marks), len(text)][1:]
        marks = [mark for mark, end in zip(marks, ends, strict=True) if not _is_option(mark, text[mark.end : end])]
    while marks and not marks[0].asks and not text[: marks[0].start].strip():
        marks = marks[1:]
    return marks


def _is_option(mark: _Mark, behind: str) -> bool:
    """Whether an `A:` is the first of several options of a question."""
    return mark.label == "A" and _NEXT_OPTION.search(behind) is not None


def _labels(marks: list[_Mark]) -> tuple[set[str], set[str]]:
    """The labels that ask and those that answer in this text, by its first mark."""
    first = marks[0]
    asking, answering = (set(labels) for labels in _FAMILIES[first.family])
    if not first.asks:
        return asking if first.family == _CHAT else set(), answering
    answers = {mark.label for mark in marks if not mark.asks}
    return {first.label}, answers & answering or answers
