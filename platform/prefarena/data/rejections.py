"""Rows that cannot be trained on: the reasons, the remedies, the list of them, and how many are too many.

A rejected row is listed with file, row and reason, and the run goes on. When more than a set share of the rows is
rejected the run stops, before any training. A row that repeats an earlier one, or belongs to a dialogue that is tested
on, is listed too, but not counted: nothing is lost with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from prefarena.errors import UserError

# Reasons; what they say is what people read.
NOT_JSON = "not valid JSON"
NOT_AN_OBJECT = "not a JSON object"
NOT_UTF8 = "not UTF-8"
TOO_LARGE = "row too large"
MISSING_COLUMN = "missing column"
WRONG_TYPE = "wrong type"
BAD_UNICODE = "text is not valid Unicode"
NUL_INSIDE = "text holds a NUL character"
EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
EMPTY_MESSAGE = "empty message"
IDENTICAL = "identical responses"
PROMPTS_DIFFER = "prompts differ"
NO_BOUNDARY = "no boundary between prompt and response"
NOT_HH = "not an HH-RLHF transcript"
NOT_AN_ANSWER = "does not end with one assistant message"
BAD_ROLES = "bad roles"
TOOL_CALLS = "tool calls are not supported"
SYSTEM_APART = "the system column has no place"
NOT_MESSAGES = "messages stored as text cannot be read"
LOST_COLUMN = "a column would be lost"
BAD_LABEL = "label is not a probability"
PROMPT_TOO_LONG = "prompt too long"
TEMPLATE_REFUSES = "the chat template refuses it"
NO_ROW = "a token without a row in the model's embedding"
NOT_CONTINUED = "its answer cannot follow the chat template's generation prompt"
END_INSIDE = "response has an end-of-sequence token inside"
IDENTICAL_CUT = IDENTICAL + " after truncation"
OTHER_SPLIT = "its truncated prompt is in another split"
DUPLICATE = "repeats an earlier pair"
REPEATED_PROMPT = "repeats an earlier prompt"
IN_TEST_DATA = "its dialogue is in the test data"

#: What mends a row of each reason.
REMEDIES = {
    NOT_JSON: "write one whole JSON object on each line",
    NOT_AN_OBJECT: "write one whole JSON object on each line",
    NOT_UTF8: "convert the file to UTF-8, for example with iconv",
    TOO_LARGE: "shorten the row, or raise task.max_row_bytes",
    MISSING_COLUMN: "give every row the columns `chosen` and `rejected`, of single responses `completion` and `label`, "
    "of demonstrations `prompt` and `response`, of prompts alone `prompt`",
    WRONG_TYPE: "give text, or lists of messages with text in `content`, and numbers as labels; "
    "rename a column `label` that is something else",
    BAD_UNICODE: "replace lone surrogates by the intended characters",
    NUL_INSIDE: "remove the NUL characters",
    EMPTY_PROMPT: "give a prompt with text in it",
    EMPTY_RESPONSE: "give every row its responses, with text in them",
    EMPTY_MESSAGE: "give every message of the user and the assistant some text",
    IDENTICAL: "leave out pairs whose responses are identical",
    PROMPTS_DIFFER: "make both texts begin with the same prompt",
    NO_BOUNDARY: "give the prompt in a column `prompt`, or mark the answer by `Assistant:` at the start of a line",
    NOT_HH: "write the turns as '\\n\\nHuman: ...\\n\\nAssistant: ...', or set task.format",
    NOT_AN_ANSWER: "end each conversation with exactly one assistant message",
    BAD_ROLES: "let user and assistant alternate, the user first, a system message only at the start",
    TOOL_CALLS: "write the calls into the text of the messages, or leave the row out",
    SYSTEM_APART: "write it into the conversation as its first message, or into the text, and remove the column; for "
    "HH-RLHF transcripts, set task.transcripts: messages",
    NOT_MESSAGES: "write messages as JSON lists, or set task.format: standard if they are meant as plain text",
    LOST_COLUMN: "remove the column if the rows make sense without it, or leave those rows out",
    BAD_LABEL: "give P(chosen preferred), or P(desirable) for a single response, from 0 to 1; rename the column if it "
    "is something else",
    PROMPT_TOO_LONG: "raise task.max_prompt_tokens, or set task.long_prompts: keep_end",
    TEMPLATE_REFUSES: "order the messages as the model's chat template expects, or fix the template",
    NO_ROW: "resize_token_embeddings(len(tokenizer)) and save the model, or remove that token from the text",
    NOT_CONTINUED: "give answers that include the thoughts which it opens, or use a template that does not open any",
    END_INSIDE: "remove the special tokens from the text",
    IDENTICAL_CUT: "raise task.max_response_tokens",
    OTHER_SPLIT: "raise task.max_prompt_tokens",
    DUPLICATE: "nothing needs to be done",
    REPEATED_PROMPT: "nothing needs to be done",
    IN_TEST_DATA: "nothing needs to be done: it would be both trained on and tested on",
}
#: Reasons that lie in a file's form rather than in one row's content: if all first rows have them, so will the rest.
STRUCTURAL = {
    NOT_JSON,
    NOT_AN_OBJECT,
    NOT_UTF8,
    MISSING_COLUMN,
    WRONG_TYPE,
    NO_BOUNDARY,
    NOT_HH,
    NOT_AN_ANSWER,
    BAD_ROLES,
    SYSTEM_APART,
    NOT_MESSAGES,
    LOST_COLUMN,
    TEMPLATE_REFUSES,
    NOT_CONTINUED,
}
#: Rows that are left out and were none to train on: they do not count as lost.
_NOT_COUNTED = (DUPLICATE, REPEATED_PROMPT, IN_TEST_DATA)
_LONGEST_DETAIL = 200  # characters
_NUM_NAMED = 3  # reasons that the message about too many rejected rows names


class Unusable(Exception):
    """A row that cannot be trained on: `reason` is one of this module's constants, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if len(detail) > _LONGEST_DETAIL:
            detail = detail[:_LONGEST_DETAIL] + "…"
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Rejections:
    """The rejected rows of one source: counted, and with a `path` listed there, one JSON object a line."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._list: IO[str] | None = None if path is None else path.open("w", encoding="utf-8")

    def add(self, file: str, row: int, reason: str, detail: str = "") -> None:
        """Count and list one row."""
        self.reasons[reason] += 1
        self._first.setdefault(reason, f"{file}:{row}{f' ({detail})' if detail else ''}")
        if self._list is not None:
            line = {"file": file, "row": row, "reason": reason, "detail": detail, "remedy": REMEDIES[reason]}
            self._list.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._list is not None:
            self._list.close()

    @property
    def num_counted(self) -> int:
        """Rejected rows, without repeats and those that are in the test data."""
        return self.reasons.total() - sum(self.reasons[reason] for reason in _NOT_COUNTED)

    def check(
        self, source: str, num_rows: int, most: float, *, first: bool = False, remedies: Sequence[str] = ()
    ) -> None:
        """Raise UserError where more than the share `most` of `num_rows` rows were rejected.

        first: whether these are only the source's first rows. remedies: what mends most rows, besides each reason's
        own.
        """
        if self.num_counted <= most * num_rows:
            return
        some = f"{'its first ' if first else ''}{num_rows} rows"
        listed = f"; {self.path} lists them all" if self.path else ""
        raise UserError(
            f"{source}: {self.num_counted} of {some} ({self.num_counted / num_rows:.1%}) cannot be trained on, and "
            f"task.max_rejected_share allows {most:.4g} of them: {self._commonest()}{listed}; "
            f"{'; '.join([*remedies, 'fix the rows, or raise task.max_rejected_share'])}"
        )

    def check_first(self, source: str, num_rows: int) -> None:
        """Raise UserError where all of the source's first `num_rows` rows were rejected for their form."""
        if num_rows and sum(self.reasons[reason] for reason in STRUCTURAL) == num_rows:
            raise UserError(f"{source}: none of its first {num_rows} rows can be trained on: {self._commonest()}")

    def _commonest(self) -> str:
        """The commonest reasons that count, each with its number, one example's place and the remedy."""
        counted = [(reason, count) for reason, count in self.reasons.most_common() if reason not in _NOT_COUNTED]
        said = [
            f"{reason} {count}, first at {self._first[reason]} - {REMEDIES[reason]}"
            for reason, count in counted[:_NUM_NAMED]
        ]
        more = sum(count for _, count in counted[_NUM_NAMED:])
        return "; ".join([*said, *([f"other reasons {more}"] if more else [])])
