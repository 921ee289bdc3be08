"""Which of two responses a language model's answer prefers: the last verdict in a stated form, or nothing at all.

As with scores (`judges/answers.py`), an answer that is not clearly a verdict is *silent*, with the reason.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from prefarena.judges.answers import answer_in, without_thoughts

Winner = Literal["A", "B", "tie"]

_SIDE = r"(?:(?:response|answer|assistant|option|candidate|model|output)\s+)?(?P<side>A|B|tie|draw)"
_OPEN, _CLOSE = r"[*_`\"'(\[\s]*", r"[*_`\"')\]]*"
_LABEL = re.compile(
    r"\b(?:verdict|winner|better\s+(?:response|answer|assistant))[*_`\"'\s]*(?:[:=]|\bis\b)", re.IGNORECASE
)
_BRACKETS = re.compile(r"\[\[(?P<inside>[^\[\]\n]*)\]\]")
_VERDICT = re.compile(_OPEN + _SIDE + r"\b" + _CLOSE, re.IGNORECASE)
#: What may stand behind a verdict: the end of the line or sentence, a remark, or that it is the better one.
_END = re.compile(
    r"[ \t]*(?:$|[\n;}]|[.!,](?:\s|$)|\(|[:\u2013\u2014-]+\s"
    r"|(?:is|was)\s+(?:the\s+)?(?:better|best|preferred|winner|stronger)\b|wins?\b|because\b|since\b)"
)
_DENIAL = re.compile(r"\bnot\b|n['\u2019]t\b|\bnever\b|\bif\b|\bunless\b|\bor\b", re.IGNORECASE)
#: Inside [[…]]: MT-bench's letters, and Arena-Hard's comparisons of A and B.
_MARKS: dict[str, Winner] = {
    "A": "A", "B": "B", "C": "tie", "TIE": "tie", "DRAW": "tie", "A>>B": "A", "A>B": "A", "A=B": "tie", "B=A": "tie",
    "B>A": "B", "B>>A": "B", "A<B": "B", "A<<B": "B", "B<A": "A", "B<<A": "A",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """The response that is preferred, or None with the reason why the answer does not say."""

    winner: Winner | None
    reason: str = ""


def read_verdict_response(body: str, pattern: re.Pattern[str] | None) -> Verdict:
    """The verdict in the body of a chat completion's HTTP response. Never raises, whatever the server sent."""
    answer = answer_in(body)
    return Verdict(None, answer.reason) if answer.text is None else read_verdict(answer.text, pattern)


def read_verdict(answer: str, pattern: re.Pattern[str] | None = None) -> Verdict:
    """The verdict that a whole answer gives; `pattern`: the user's, whose last match's first group is A, B or tie."""
    text = without_thoughts(answer)
    if text is None:
        return Verdict(None, "the answer ends within its thoughts")
    if pattern is not None:
        found = [match for match in pattern.finditer(text) if match[1] is not None]
        if not found:
            return Verdict(None, "the answer does not match `pattern`")
        return _named(found[-1][1]) or Verdict(None, f"what `pattern` found, {found[-1][1]!r:.40}, is not A, B or tie")
    if text.startswith("{"):
        try:
            return _from_json(json.loads(text))
        except (ValueError, RecursionError):
            pass  # prose that begins with a bracket
    marks = [*_BRACKETS.finditer(text), *_LABEL.finditer(text)]
    if not marks:
        return _named(text) or Verdict(None, "the answer states no verdict")
    last = max(marks, key=lambda match: match.start())
    if last.re is _BRACKETS:
        return _named(last["inside"]) or Verdict(None, f"the verdict {last[0]:.40} is not A, B or tie")
    return _behind_label(text, last.end())


def _named(text: str) -> Verdict | None:
    """The verdict of a text that consists of nothing else; None if there is more."""
    bare = text.strip("*_`\"' \t\r\n").rstrip(".").strip("*_`\"'")
    mark = _MARKS.get(re.sub(r"\s", "", bare).upper())
    if mark is not None:
        return Verdict(mark)
    match = re.fullmatch(_SIDE, bare, re.IGNORECASE)
    return Verdict(_winner(match["side"])) if match else None


def _from_json(parsed: object) -> Verdict:
    """The one field `winner` or `verdict` of a JSON object."""
    named = (
        [value for key, value in parsed.items() if str(key).lower() in ("winner", "verdict")]
        if (isinstance(parsed, dict))
        else []
    )
    if len(named) != 1 or not isinstance(named[0], str):
        return Verdict(None, "the JSON of the answer has no single field `winner`")
    return _named(named[0]) or Verdict(None, f"the field `winner` is {named[0]!r:.40}, not A, B or tie")


def _behind_label(text: str, position: int) -> Verdict:
    match = _VERDICT.match(text, position)
    if match is None:
        return Verdict(None, "no A, B or tie follows the answer's last `Verdict:`")
    rest = text[match.end() :]
    end, sentence = _END.match(rest), re.split(r"[.!?\n](?:\s|\Z)", rest)[0]
    if end is None or _DENIAL.search(sentence) or re.match(r"[ \t]*,?[ \t]*(?:and|or|/|\|)", rest):
        return Verdict(None, "the answer's verdict is not one plain A, B or tie")
    return Verdict(_winner(match["side"]))


def _winner(side: str) -> Winner:
    return "tie" if side.lower() in ("tie", "draw") else "A" if side.upper() == "A" else "B"
