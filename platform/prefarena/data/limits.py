"""The effect of a task's limits, judged by the first rows before the rest is tokenised: notes, or an error."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from prefarena.config import TextTask
from prefarena.data.first_rows import FirstRows
from prefarena.data.preparation import COLUMNS, PROMPT_COLUMNS, prepare_pairs, prepare_prompts
from prefarena.data.rejections import PROMPT_TOO_LONG, Rejections
from prefarena.data.sources import Chunk, raw_rows, read_chunks
from prefarena.data.splits import NONE_HELD_OUT
from prefarena.data.tokenization import Tokenizer

_NO_LIMIT = 1 << 30
_FEW_CUT = 0.01  # share of responses that may be cut at a limit that is named as better


@dataclass(frozen=True)
class Limit:
    """A limit in tokens, its setting, and the most that the model's context leaves for it."""

    setting: str
    tokens: int
    room: int

    def better(self, lengths: Sequence[int], most: float) -> str:
        """The smallest power of two that at most a share `most` of the lengths exceed, and what it would keep."""
        limit = self.tokens
        while limit < self.room and _over(lengths, limit) > most * len(lengths):
            limit = 1 << limit.bit_length()
        limit = min(limit, self.room)
        over = _over(lengths, limit)
        if limit <= self.tokens or over == _over(lengths, self.tokens):
            return ""
        kept = "all" if not over else f"{math.floor(1000 * (1 - over / len(lengths))) / 10:g}%"
        context = "; more does not fit the model's context" if limit == self.room else ""
        return f"{self.setting}: {limit} would keep {kept} whole{context}"


def look_at_limits(task: TextTask, first: FirstRows, tokenizer: Tokenizer) -> list[str]:
    """Say what the task's limits do to the first rows, a sentence each; empty where they do nothing.

    Raises UserError where more of these rows are rejected than task.max_rejected_share allows, or where all of them
    have a form that the tokenizer does not take.
    """
    chunks = _first_chunks(task, first)
    rows = _prepared(chunks, task, tokenizer).slice(0, first.num_rows)
    rejections = Rejections()
    for row in rows.select(["file", "row", "reason", "detail"]).to_pylist():
        if row["reason"] is not None:
            rejections.add(row["file"], row["row"], row["reason"], row["detail"])
    rejections.check_first(f"{first.path}, with the tokenizer of {tokenizer.tokenizer.name_or_path}", rows.num_rows)
    prompts, responses = _lengths(chunks, task, tokenizer, first.num_rows)
    longest = tokenizer.tokenizer.model_max_length
    of_prompts = Limit("task.max_prompt_tokens", task.max_prompt_tokens, longest - task.max_response_tokens)
    of_responses = Limit("task.max_response_tokens", task.max_response_tokens, longest - task.max_prompt_tokens)
    better = of_prompts.better(prompts, task.max_rejected_share / 2)
    remedies = [better] if better and PROMPT_TOO_LONG in rejections.reasons else []
    rejections.check(first.path, rows.num_rows, task.max_rejected_share, first=not first.is_whole, remedies=remedies)
    some = f"{first.path}: of {'its' if first.is_whole else 'the first'} {rows.num_rows:,} rows"
    said = []
    if number := _over(prompts, task.max_prompt_tokens):
        fate = "left out" if task.long_prompts == "drop" else "cut at its beginning"
        said.append(
            f"{some}, {number} ({number / rows.num_rows:.1%}) have a prompt of more than {task.max_prompt_tokens} "
            f"tokens, which is {fate} (task.long_prompts: {task.long_prompts}); the longest has {max(prompts):,}"
            f"{better and '; '}{better}"
        )
    if number := _over(responses, task.max_response_tokens):
        better = of_responses.better(responses, _FEW_CUT)
        said.append(
            f"{some}, {number} of {len(responses):,} responses ({number / len(responses):.1%}) have more than "
            f"{task.max_response_tokens} tokens and lose their last ones, so that they do not end; the longest has "
            f"{max(responses):,}{better and '; '}{better}"
        )
    if others := rejections.num_counted - rejections.reasons[PROMPT_TOO_LONG]:
        said.append(
            f"{some}, {others} ({others / rows.num_rows:.1%}) cannot be trained on for reasons other than their length "
            f"(task.max_rejected_share: {task.max_rejected_share:.4g})"
        )
    return said


def lengths_of(task: TextTask, first: FirstRows, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and of each response, of the first rows that can be used, whatever the task's limits."""
    return _lengths(_first_chunks(task, first), task, tokenizer, first.num_rows)


def usable_pairs(task: TextTask, first: FirstRows, tokenizer: Tokenizer) -> tuple[pa.Table, float]:
    """The usable rows among the first, tokenised within the limits.

    Also returns the seconds that reading and tokenising the first rows took.
    """
    started = time.perf_counter()
    rows = _prepared(_first_chunks(task, first), task, tokenizer)
    return _usable(rows, first), time.perf_counter() - started


def usable_prompts(task: TextTask, first: FirstRows, tokenizer: Tokenizer) -> tuple[pa.Table, float]:
    """`usable_pairs` for prompts without answers."""
    started = time.perf_counter()
    chunks = _first_chunks(task, first, PROMPT_COLUMNS)
    rows = pa.concat_tables([prepare_prompts(chunk, task, tokenizer, shares=NONE_HELD_OUT) for chunk in chunks])
    return _usable(rows, first), time.perf_counter() - started


def _usable(rows: pa.Table, first: FirstRows) -> pa.Table:
    rows = rows.slice(0, first.num_rows)
    return rows.filter(pc.is_null(rows["reason"]))


def look_at_prompt_limit(task: TextTask, first: FirstRows, tokenizer: Tokenizer) -> list[str]:
    """Look at the limit of prompts without answers as `look_at_limits` does."""
    chunks = _first_chunks(task, first, PROMPT_COLUMNS)
    rows = pa.concat_tables([prepare_prompts(chunk, task, tokenizer, shares=NONE_HELD_OUT) for chunk in chunks])
    rejections, num_cut = Rejections(), 0
    for row in rows.slice(0, first.num_rows).to_pylist():
        num_cut += bool(row["prompt_cut"])
        if row["reason"] is not None:
            rejections.add(row["file"], row["row"], row["reason"], row["detail"] or "")
    rejections.check(first.path, first.num_rows, task.max_rejected_share, first=not first.is_whole)
    number = num_cut + rejections.reasons[PROMPT_TOO_LONG]
    if not number:
        return []
    fate = "left out" if task.long_prompts == "drop" else "cut at its beginning"
    return [
        f"{first.path}: of {'its' if first.is_whole else 'the first'} {first.num_rows:,} prompts, {number} "
        f"({number / first.num_rows:.1%}) have more than {task.max_prompt_tokens} tokens (task.max_prompt_tokens); "
        f"each of them is {fate} (task.long_prompts: {task.long_prompts})"
    ]


def _first_chunks(task: TextTask, first: FirstRows, columns: tuple[str, ...] = COLUMNS) -> list[Chunk]:
    """The chunks that hold the first rows, and perhaps some more."""
    chunks: list[Chunk] = []
    left = first.num_rows
    for part in first.parts:
        for chunk in read_chunks(part, columns, task.max_row_bytes, left):
            chunks.append(chunk)
            left -= sum(1 for _ in raw_rows(chunk))
        if left <= 0:
            break
    return chunks


def _prepared(chunks: list[Chunk], task: TextTask, tokenizer: Tokenizer) -> pa.Table:
    return pa.concat_tables([prepare_pairs(chunk, task, tokenizer, shares=NONE_HELD_OUT) for chunk in chunks])


def _lengths(chunks: list[Chunk], task: TextTask, tokenizer: Tokenizer, num_rows: int) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and of each response, as if there were no limits."""
    unlimited = task.model_copy(
        update={"max_prompt_tokens": _NO_LIMIT, "max_response_tokens": _NO_LIMIT, "long_prompts": "drop"}
    )
    rows = _prepared(chunks, unlimited, replace(tokenizer, task=unlimited)).slice(0, num_rows)
    prompts, *responses = (
        pc.list_value_length(rows[name].drop_null()).to_pylist()
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return prompts, [length for lengths in responses for length in lengths]


def _over(lengths: Sequence[int], limit: int) -> int:
    return sum(length > limit for length in lengths)
