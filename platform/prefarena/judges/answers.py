"""Reading a score from a language model's answer: the last verdict in a stated form, or nothing at all.

A number that merely occurs in an answer (a scale, a list item, a model's name, a thought) is no score. Whatever is
not clearly a verdict is *silent*, with the reason, because a score that is wrong without a word ruins a comparison.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_SIGNED = r"[-\u2212+]?\d+(?:[.,]\d+)?"
_NUMBER = re.compile(rf"(?P<number>{_SIGNED})(?:\s*(?:/|out\s+of\b|of\b)\s*(?P<scale>\d+(?:[.,]\d+)?))?", re.IGNORECASE)
_MARKS = r"[*_`\"'\s]*"
_LABEL = re.compile(
    rf"\b(?:score|rating|grade){_MARKS}(?:\([^)\n]*\)|\[[^]\n]*\])?{_MARKS}(?:[:=]|\bis\b){_MARKS}", re.IGNORECASE
)
_SENTENCE = re.compile(
    r"\b(?:give|rate|score|grade)\s+(?:it|this|that|(?:this|the)\s+(?:response|answer))\s+(?:as\s+)?(?:an?\s+)?"
    r"(?=[*_-]*\d)[*_]*",
    re.IGNORECASE,
)
_OTHER = re.compile(r"\b(?:max|maximum|min|minimum|highest|lowest|perfect|possible|best|worst|top)\s+$", re.IGNORECASE)
_DENIAL = re.compile(r"\bnot\b|n['\u2019]t\b|\bnever\b|\bif\b", re.IGNORECASE)
_TAG = r"(?:think|thinking|thought|reasoning)"
_THOUGHT = re.compile(rf"<(?P<tag>{_TAG})>.*?</(?P=tag)>", re.IGNORECASE | re.DOTALL)
_THOUGHT_END = re.compile(rf".*</{_TAG}>", re.IGNORECASE | re.DOTALL)
_THOUGHT_START = re.compile(rf"<{_TAG}>", re.IGNORECASE)
_FENCE = re.compile(r"\A```\w*\s*\n(.*)\n\s*```\Z", re.DOTALL)
_RANGE = re.compile(r"\s*(?:[-\u2013\u2014~]|to\b|or\b)\s*\d", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """A score, or None with the reason why the answer has none."""

    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Form:
    """The form of a score.

    pattern: the user's regular expression, whose first group is the score; None means the forms of docs/judges.md.
    low, high: the range, ends included.
    """

    low: float
    high: float
    pattern: re.Pattern[str] | None = None


def read_response(body: str, form: Form) -> Reading:
    """The score in the body of a chat completion's HTTP response. Never raises, whatever the server sent."""
    answer = answer_in(body)
    return Reading(None, answer.reason) if answer.text is None else read_answer(answer.text, form)


@dataclass(frozen=True)
class Answer:
    """A model's answer, or None with the reason why there is no answer to be read.

    is_completion: whether the server sent a chat completion at all.
    """

    text: str | None
    reason: str = ""
    is_completion: bool = True


def answer_in(body: str) -> Answer:
    """The answer in the body of a chat completion's HTTP response. Never raises, whatever the server sent."""
    try:
        parsed: Any = json.loads(body)
    except (ValueError, RecursionError):
        return Answer(None, "the server's response is not JSON", False)
    choices = parsed.get("choices") if isinstance(parsed, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Answer(None, "the server's response has no choices", False)
    message = choices[0].get("message")
    content = _text(message.get("content")) if isinstance(message, dict) else None
    if choices[0].get("finish_reason") == "length":  # "Score: 1" may be the beginning of "Score: 10"
        return Answer(None, "the answer was cut off at `max_tokens`")
    if content is None or not content.strip():
        return Answer(None, "the answer is empty")
    return Answer(content)


def without_thoughts(answer: str) -> str | None:
    """The part of an answer after its thoughts, without a code block's fence; None where it ends within thoughts."""
    text = _THOUGHT_END.sub("", _THOUGHT.sub("", answer), count=1)  # a template may have opened the thought itself
    if _THOUGHT_START.search(text):
        return None
    text = text.strip()
    fenced = _FENCE.match(text)
    return fenced[1].strip() if fenced else text


def read_answer(answer: str, form: Form) -> Reading:
    """The score that a whole answer gives, in the given form and range."""
    text = without_thoughts(answer)
    if text is None:
        return Reading(None, "the answer ends within its thoughts")
    if form.pattern is not None:
        return _by_pattern(text, form)
    if text.startswith(("{", "[")):
        try:
            return _from_json(json.loads(text), form)
        except (ValueError, RecursionError):
            pass  # prose that begins with a bracket
    labels = [match for match in _LABEL.finditer(text) if not _OTHER.search(text[: match.start()])]
    if labels:
        return _number_at(text, labels[-1].end(), form)
    alone = _whole(text, form)
    if alone is not None:
        return alone
    return _from_sentence(text, form)


def _by_pattern(text: str, form: Form) -> Reading:
    assert form.pattern is not None
    found = [match for match in form.pattern.finditer(text) if match[1] is not None]
    if not found:
        return Reading(None, "the answer does not match `pattern`")
    return _whole(found[-1][1], form) or Reading(None, f"what `pattern` found, {found[-1][1]!r:.40}, is not a number")


def _from_json(parsed: object, form: Form) -> Reading:
    """The field `score` (or `rating`) of a JSON object; a bare number; nothing else."""
    value = parsed
    if isinstance(parsed, dict):
        named = [parsed[key] for key in parsed if str(key).lower() in ("score", "rating")]
        if len(named) != 1:
            return Reading(None, "the JSON of the answer has no single field `score`")
        value = named[0]
    if isinstance(value, str):
        return _whole(value, form) or Reading(None, "the field `score` is no number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Reading(None, "the field `score` is no number")
    return _in_range(value, form)


def _from_sentence(text: str, form: Form) -> Reading:
    """The score of sentences such as 'I would give it 8', if all agree and none is denied or conditional."""
    readings = []
    for match in _SENTENCE.finditer(text):
        before = re.split(r"[.!?\n]\s", text[: match.start()])[-1]
        after = re.split(r"[.!?\n](?:\s|\Z)", text[match.end() :])[0]
        if _DENIAL.search(before) or _DENIAL.search(after):
            return Reading(None, "the answer's verdict is negated or conditional")
        readings.append(_number_at(text, match.end(), form))
    if not readings:
        return Reading(None, "the answer states no score")
    return readings[0] if len(set(readings)) == 1 else Reading(None, "the answer's verdicts contradict each other")


def _whole(text: str, form: Form) -> Reading | None:
    """The reading of a text that is only a number, apart from emphasis and a full stop; None if it is not."""
    bare = text.strip("*_`\"' \t\r\n").rstrip(".").rstrip("*_`\"'")
    match = _NUMBER.fullmatch(bare)
    return _checked(match, form) if match else None


def _number_at(text: str, position: int, form: Form) -> Reading:
    """The number that begins at a position, if it is one number and not a range, a date or the head of a word."""
    match = _NUMBER.match(text, position)
    if match is None:
        return Reading(None, "no number follows the answer's last `Score:`")
    rest = text[match.end() :]
    if _RANGE.match(rest) or re.match(r"[\w%/]|[.,]\d", rest):
        return Reading(None, "the answer's score is not one plain number")
    return _checked(match, form)


def _checked(match: re.Match[str], form: Form) -> Reading:
    number, scale = match["number"], match["scale"]
    if re.search(r",\d{3}\Z", number):
        return Reading(None, f"{number} may be a number in the thousands or a decimal")
    if scale is not None and _float(scale) != form.high:
        return Reading(None, f"the answer's scale ends at {scale:.20}, not at `max_score` {form.high:g}")
    return _in_range(_float(number), form)


def _in_range(value: float, form: Form) -> Reading:
    if not form.low <= value <= form.high:  # NaN fails too
        return Reading(None, f"the score is outside {form.low:g} to {form.high:g} (`min_score`, `max_score`)")
    return Reading(float(value))


def _float(text: str) -> float:
    return float(text.replace("\u2212", "-").replace(",", "."))


def _text(content: object) -> str | None:
    """The text of a message: a string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(part for part in parts if isinstance(part, str))
