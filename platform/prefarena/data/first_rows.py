"""A look at a source's first rows before anything is started: whether they are usable, and what is not read."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefarena.config import TextTask
from prefarena.data.fields import LOST, SYSTEM, is_empty
from prefarena.data.files import listed
from prefarena.data.formats import Pair
from prefarena.data.labels import SCORES, check_labels
from prefarena.data.preparation import (
    COLUMNS,
    DEMONSTRATION_COLUMNS,
    PROMPT_COLUMNS,
    SINGLE_COLUMNS,
    TEXT_COLUMNS,
    demonstration_of,
    pair_of,
    prompt_of,
    single_of,
    text_of,
)
from prefarena.data.rejections import Rejections, Unusable
from prefarena.data.renaming import PROMPTS, renaming
from prefarena.data.sharegpt import CONVERSATION, has_conversation
from prefarena.data.sources import BrokenFile, Part, read_rows_of, survey, table_schema
from prefarena.data.turns import holds_transcripts
from prefarena.errors import UserError

NUM_FIRST_ROWS = 1000
#: The settings that path and split come from.
DATA, TEXT = ("task.data", "task.split"), ("task.pretraining_text", "task.split")
SINGLE = ("task.unpaired_data", "task.split")
DEMONSTRATION = ("task.demonstration_data", "task.split")
_ANSWERS = ("chosen", "rejected")
_ANY_TYPE = ("source", "tools", "chat_template_kwargs", *SCORES, *PROMPTS, CONVERSATION)


@dataclass(frozen=True)
class FirstRows:
    """The data to read, and notes on it, a sentence each, and whether some of the rows are HH transcripts.

    forms: messages, or plain text. is_whole: there are no more rows than these. num_without_scores: pairs without
    scores of both answers.
    """

    path: str
    parts: list[Part]
    notes: list[str]
    num_rows: int
    num_transcripts: int
    forms: frozenset[str]
    is_whole: bool
    num_without_scores: int = 0


def look_at_pairs(task: TextTask) -> FirstRows:
    """The first rows of the task's pairs. Raises UserError if they show that the pairs cannot be used."""
    return _look(task, (task.data, task.split), DATA, COLUMNS, _ANSWERS, functools.partial(pair_of, task=task))


def prompts_alone(task: TextTask) -> bool:
    """Whether the task's rows are prompts without answers, which drawn pairs alone can use.

    Raises UserError where there is nothing to read.
    """
    if task.pairs is None:
        return False
    try:
        for part in survey(task.data, task.split, DATA).parts:
            schema = table_schema(part)
            if schema is not None:
                return not set(_ANSWERS) & set(schema.names)
            for _, row in read_rows_of(part, COLUMNS, task.max_row_bytes, NUM_FIRST_ROWS):
                if isinstance(row, dict):
                    return all(row.get(name) is None for name in _ANSWERS)
    except BrokenFile as error:
        raise UserError(str(error)) from None
    return False  # nothing can be read, which is said where pairs are looked for


def look_at_prompts(task: TextTask) -> FirstRows:
    """The first rows of prompts without answers. Raises UserError like `look_at_pairs`."""
    return _look(task, (task.data, task.split), DATA, PROMPT_COLUMNS, (), functools.partial(prompt_of, task=task))


def look_at_test_prompts(task: TextTask, first: FirstRows) -> FirstRows | None:
    """The first rows of the test prompts, if they have their own source. Raises UserError like `look_at_test`."""
    return _look_at_test(task, first, PROMPT_COLUMNS, (), functools.partial(prompt_of, task=task))


def look_at_test(task: TextTask, first: FirstRows) -> FirstRows | None:
    """The first rows of the task's own test set, if it has one; `first` is what training reads.

    Raises UserError as `look_at_pairs` does, and where the two have rows in common, or rows of different forms.
    """
    return _look_at_test(task, first, COLUMNS, _ANSWERS, functools.partial(pair_of, task=task))


def _look_at_test(
    task: TextTask,
    first: FirstRows,
    columns: tuple[str, ...],
    needed: tuple[str, ...],
    examine: Callable[[dict[str, Any] | Unusable], Any],
) -> FirstRows | None:
    if task.test_source is None:
        return None
    path, setting = task.test_source[0], "task.test_data" if task.test_data else "task.test_split"
    every = task.model_copy(update={"max_rows": None})
    names = ("task.test_data" if task.test_data else "task.data", "task.test_split")
    found = _look(every, task.test_source, names, columns, needed, examine)
    if both := [part.path for part in found.parts if part in first.parts]:
        raise UserError(f"{setting}: {both[0]} is also all that task.data trains on; name other rows in task.test_data")
    if found.forms and first.forms and not found.forms & first.forms:
        raise UserError(
            f"{path}: its first rows to test on are {_listed(found.forms)}, and those to train on are "
            f"{_listed(first.forms)}; convert them to one form"
        )
    return found


def _listed(forms: frozenset[str]) -> str:
    return " and ".join(sorted(forms))


def look_at_text(task: TextTask, path: str) -> FirstRows:
    """The first rows of pretraining text. Raises UserError like `look_at_pairs`."""
    return _look(task, (path, task.split), TEXT, TEXT_COLUMNS, TEXT_COLUMNS, text_of)


def look_at_others(task: TextTask) -> None:
    """Look at single responses, demonstrations and pretraining text, where the task has them."""
    if task.unpaired_data is not None:
        look_at_singles(task, task.unpaired_data)
    if task.demonstration_data is not None:
        look_at_demonstrations(task, task.demonstration_data)
    if task.pretraining_text is not None:
        look_at_text(task, task.pretraining_text)


def look_at_singles(task: TextTask, path: str) -> FirstRows:
    """The first rows of single responses. Raises UserError like `look_at_pairs`."""
    every, needed = task.model_copy(update={"max_rows": None}), ("completion", "label")
    return _look(every, (path, task.split), SINGLE, SINGLE_COLUMNS, needed, functools.partial(single_of, task=task))


def look_at_demonstrations(task: TextTask, path: str) -> FirstRows:
    """The first rows of the user's own demonstrations. Raises UserError like `look_at_pairs`."""
    every, examine = task.model_copy(update={"max_rows": None}), functools.partial(demonstration_of, task=task)
    return _look(every, (path, task.split), DEMONSTRATION, DEMONSTRATION_COLUMNS, (), examine)


def _look(
    task: TextTask,
    source: tuple[str, str],
    settings: tuple[str, str],
    columns: tuple[str, ...],
    needed: tuple[str, ...],
    examine: Callable[[dict[str, Any] | Unusable], Any],
) -> FirstRows:
    """The first rows at the source, a path and a split that stand in `settings`.

    `examine` makes a pair of a row, or raises Unusable at one that cannot be used.
    """
    path, split = source
    found = survey(path, split, settings)
    parts = found.parts
    forms: set[str] = set()
    rejections, num_rows, num_transcripts, num_unused, num_without_scores = Rejections(), 0, 0, 0, 0
    present: Counter[str] = Counter()
    ignored: dict[str, None] = {}
    labels: list[Any] = []
    wanted = min(NUM_FIRST_ROWS, task.max_rows or NUM_FIRST_ROWS)
    try:
        for part in parts if parts[0].kind in ("parquet", "csv") else parts[:1]:
            ignored |= dict.fromkeys(_check_columns(part, columns, needed))
        for part in parts:
            for number, row in read_rows_of(part, columns, task.max_row_bytes, wanted - num_rows):
                num_rows += 1
                if isinstance(row, dict):
                    present.update(name for name, value in row.items() if value is not None)
                    labels.append(row.get("label"))
                    num_transcripts += holds_transcripts(row, task.format)
                    num_unused += not is_empty(row.get(CONVERSATION)) and not has_conversation(row)
                try:
                    pair = examine(row)
                    if isinstance(pair, Pair):
                        forms.add("plain text" if pair.messages is None else "messages")
                        num_without_scores += pair.scores is None
                except Unusable as error:
                    rejections.add(part.path, number, error.reason, error.detail)
            if num_rows >= wanted:
                break
    except BrokenFile as error:
        raise UserError(str(error)) from None
    if not num_rows:
        raise UserError(f"{path}: there are no rows in it")
    missing = [name for name in needed if name not in present]
    if missing and present:
        raise UserError(_missing_columns(path, missing, sorted(present)))
    if "label" in columns and "label" not in needed:
        check_labels(path, [label for label in labels if label is not None])
    is_whole = num_rows < NUM_FIRST_ROWS or num_rows == task.max_rows
    if is_whole:
        rejections.check(path, num_rows, task.max_rejected_share)
    rejections.check_first(path, num_rows)
    rejections.check(path, num_rows, task.max_rejected_share, first=True)
    ignored |= dict.fromkeys(name for name in present if name not in columns)
    ignored |= dict.fromkeys([CONVERSATION] if num_unused else [])
    notes = [*found.notes, *_ignored(path, sorted(ignored))]
    forms_found = frozenset(forms)
    return FirstRows(path, parts, notes, num_rows, num_transcripts, forms_found, is_whole, num_without_scores)


def _ignored(path: str, columns: Sequence[str]) -> list[str]:
    return [f"{path}: columns that are not used: {listed(columns)}"] if columns else []


def _check_columns(part: Part, columns: tuple[str, ...], needed: tuple[str, ...]) -> list[str]:
    """The table's columns that are not used, none where it is no table.

    Raises UserError where it lacks a column that is needed, or has one of a type that no row could have, or one that
    must not be lost.
    """
    schema = table_schema(part)
    if schema is None:
        return []
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise UserError(_missing_columns(part.path, missing, schema.names))
    for name in set(columns) & set(schema.names):
        kind = schema.field(name).type
        number = name == "label"
        if number and name in needed and pa.types.is_boolean(kind):
            continue
        if name not in _ANY_TYPE and not (_is_number(kind) if number else _is_text(kind, only=name in SYSTEM)):
            wanted = "a number" if number else "text" if name in SYSTEM else "text, or a list of messages"
            or_rename = ", or rename it if it is something else" if name in ("label", *SYSTEM) else ""
            raise UserError(f"{part.path}: its column {name!r} is {kind}, not {wanted}; convert it{or_rename}")
    lost = [name for name in schema.names if name in LOST and not pa.types.is_null(schema.field(name).type)]
    if lost and "text" not in columns:
        raise UserError(
            f"{part.path}: its column {lost[0]!r} would be lost: {LOST[lost[0]]} are not read; remove the column "
            "where the rows make sense without it"
        )
    return [name for name in schema.names if name not in columns]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _is_text(kind: pa.DataType, only: bool = False) -> bool:
    """Whether a column is text, or, unless it must be text `only`, messages."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type, only)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    messages = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)
    names = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    one = names >= {"role", "content"} or names >= {"from", "value"}
    return text or ((messages or one) and not only) or pa.types.is_null(kind)


def _missing_columns(path: str, missing: list[str], present: list[str]) -> str:
    wanted = " and ".join(map(repr, missing))
    columns = ", ".join(present) or "none"
    return f"{path}: no column {wanted}; its columns are {columns}; rename or add what is missing{renaming(present)}"
