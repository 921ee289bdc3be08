"""Turning a chunk of raw rows into token ids or rejections: the work of the pipeline's actors, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefarena.config import TextTask
from prefarena.data.fields import SYSTEM
from prefarena.data.formats import (
    Pair,
    normalise,
    normalise_demonstration,
    normalise_prompt,
    normalise_single,
    valid_text,
)
from prefarena.data.labels import SCORES
from prefarena.data.rejections import NO_ROW, WRONG_TYPE, Unusable
from prefarena.data.renaming import PROMPTS
from prefarena.data.sharegpt import CONVERSATION
from prefarena.data.sources import Chunk, rows_of
from prefarena.data.splits import Shares
from prefarena.data.tokenization import Tokenizer, TokenPair, TokenPrompt
from prefarena.records import PAIR_SCORES, PAIRS, PRETRAINING, RESPONSES, content_id

#: From a row, the task and the name of its source to what it holds; raises Unusable.
Read = Callable[[dict[str, Any] | Unusable, TextTask, str], Pair]

#: What is read of a table of pairs.
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "label",
    "source",
    *SYSTEM,
    "tools",
    "chat_template_kwargs",
    *SCORES,
    *PROMPTS,
    CONVERSATION,
)
TEXT_COLUMNS = ("text",)
#: What is read of a table of prompts without answers.
PROMPT_COLUMNS = ("prompt", "source", *SYSTEM, "tools", "chat_template_kwargs", *PROMPTS)
#: What is read of a table of single responses.
SINGLE_COLUMNS = ("prompt", "completion", "label", "source", *SYSTEM, "tools", "chat_template_kwargs", *PROMPTS)
#: What is read of a table of demonstrations.
DEMONSTRATION_COLUMNS = (
    "prompt",
    "response",
    "completion",
    "source",
    *SYSTEM,
    "tools",
    "chat_template_kwargs",
    *PROMPTS,
)

_REJECTED = [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
#: `split` is train, judge or test; for a rejected row `reason` says why, `detail` what, and other columns are null.
PREPARED_PAIRS = pa.schema(
    [
        *_REJECTED,
        *PAIRS,
        ("split", pa.string()),
        ("opening_id", pa.string()),
        ("prompt_id", pa.string()),
        ("demonstration_id", pa.string()),
        ("scores_contradict", pa.bool_()),
        ("num_turns_joined", pa.int32()),
        ("prompt_cut", pa.bool_()),
        ("num_responses_cut", pa.int32()),
        ("num_responses_apart", pa.int32()),
        ("num_responses_as_written", pa.int32()),
    ]
)
PREPARED_RESPONSES = pa.schema([*_REJECTED, *RESPONSES, ("prompt_id", pa.string()), ("is_cut", pa.bool_())])
PREPARED_PROMPTS = pa.schema(
    [
        *_REJECTED,
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("split", pa.string()),
        ("opening_id", pa.string()),
        ("prompt_cut", pa.bool_()),
    ]
)
PREPARED_PIECES = pa.schema([*_REJECTED, ("piece", pa.int32()), *PRETRAINING])


def prepare_pairs(chunk: Chunk, task: TextTask, tokenizer: Tokenizer, *, shares: Shares) -> pa.Table:
    """One row of PREPARED_PAIRS for each row of the chunk, in order."""
    source = Path(chunk.file).name
    found = [(number, _try(pair_of, row, task, source)) for number, row in rows_of(chunk, task.max_row_bytes)]
    tokens = iter(tokenizer.pairs([pair for _, pair in found if isinstance(pair, Pair)]))
    columns: dict[str, list[Any]] = {name: [] for name in PREPARED_PAIRS.names}
    for number, pair in found:
        row = _prepared(pair, _embedded(next(tokens), tokenizer), shares) if isinstance(pair, Pair) else _rejected(pair)
        row |= {"file": chunk.file, "row": number}
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.Table.from_pydict(columns, schema=PREPARED_PAIRS)


def prepare_responses(chunk: Chunk, task: TextTask, tokenizer: Tokenizer) -> pa.Table:
    """One row of PREPARED_RESPONSES for each row of the chunk, in order."""
    return _prepare_responses(chunk, task, tokenizer, single_of)


def prepare_demonstrations(chunk: Chunk, task: TextTask, tokenizer: Tokenizer) -> pa.Table:
    """One row of PREPARED_RESPONSES for each row of the chunk, in order; each as desirable as can be."""
    return _prepare_responses(chunk, task, tokenizer, demonstration_of)


def _prepare_responses(chunk: Chunk, task: TextTask, tokenizer: Tokenizer, read: Read) -> pa.Table:
    source = Path(chunk.file).name
    found = [(number, _try(read, row, task, source)) for number, row in rows_of(chunk, task.max_row_bytes)]
    tokens = iter(tokenizer.pairs([pair for _, pair in found if isinstance(pair, Pair)]))
    rows = []
    for number, pair in found:
        row = _single(pair, _embedded(next(tokens), tokenizer)) if isinstance(pair, Pair) else _rejected(pair)
        rows.append({**row, "file": chunk.file, "row": number})
    return pa.Table.from_pylist(rows, schema=PREPARED_RESPONSES)


def prepare_prompts(chunk: Chunk, task: TextTask, tokenizer: Tokenizer, *, shares: Shares) -> pa.Table:
    """One row of PREPARED_PROMPTS for each row of the chunk, in order."""
    source = Path(chunk.file).name
    found = [(number, _try(prompt_of, row, task, source)) for number, row in rows_of(chunk, task.max_row_bytes)]
    tokens = iter(tokenizer.prompts([pair for _, pair in found if isinstance(pair, Pair)]))
    rows = []
    for number, pair in found:
        row = _prompt(pair, next(tokens), tokenizer, shares) if isinstance(pair, Pair) else _rejected(pair)
        rows.append({**row, "file": chunk.file, "row": number})
    return pa.Table.from_pylist(rows, schema=PREPARED_PROMPTS)


def prepare_pieces(chunk: Chunk, task: TextTask, tokenizer: Tokenizer) -> pa.Table:
    """Rows of PREPARED_PIECES: each text's pieces, numbered from 0, or one row for a rejected text."""
    rows: list[dict[str, Any]] = []
    for number, row in rows_of(chunk, task.max_row_bytes):
        where = {"file": chunk.file, "row": number}
        try:
            text = text_of(row)
        except Unusable as error:
            rows.append({**where, **_rejected(error)})
            continue
        if text.strip():
            place, pieces = f"{chunk.file}:{number}", tokenizer.text(text)
            if (lost := _without_row(tokenizer, *pieces)) is not None:
                rows.append({**where, **_rejected(lost)})
                continue
            rows += [
                {**where, "piece": i, "id": content_id(place, text, i), "ids": ids} for i, ids in enumerate(pieces)
            ]
    return pa.Table.from_pylist(rows, schema=PREPARED_PIECES)


def pair_of(row: dict[str, Any] | Unusable, task: TextTask, source: str = "") -> Pair:
    """The pair that a row holds. Raises Unusable where it holds none, or was itself found to be unusable."""
    if isinstance(row, Unusable):
        raise row
    return normalise(row, task.format, source, task.transcripts)


def single_of(row: dict[str, Any] | Unusable, task: TextTask, source: str = "") -> Pair:
    """The single response that a row holds. Raises Unusable as `pair_of` does."""
    if isinstance(row, Unusable):
        raise row
    return normalise_single(row, task.format, source)


def demonstration_of(row: dict[str, Any] | Unusable, task: TextTask, source: str = "") -> Pair:
    """The response that a row of demonstrations holds. Raises Unusable as `pair_of` does."""
    if isinstance(row, Unusable):
        raise row
    return normalise_demonstration(row, task.format, source)


def prompt_of(row: dict[str, Any] | Unusable, task: TextTask, source: str = "") -> Pair:
    """The prompt that a row holds, without answers. Raises Unusable as `pair_of` does."""
    if isinstance(row, Unusable):
        raise row
    return normalise_prompt(row, task.format, source)


def text_of(row: dict[str, Any] | Unusable) -> str:
    """The text of a row of pretraining text. Raises Unusable as `pair_of` does."""
    if isinstance(row, Unusable):
        raise row
    text = row.get("text")
    if not isinstance(text, str):
        raise Unusable(WRONG_TYPE, f"text is {type(text).__name__}, not text")
    return valid_text(text, "text")


def _try(read: Read, row: dict[str, Any] | Unusable, task: TextTask, source: str) -> Pair | Unusable:
    try:
        return read(row, task, source)
    except Unusable as error:
        return error


def _embedded(tokens: TokenPair | Unusable, tokenizer: Tokenizer) -> TokenPair | Unusable:
    if isinstance(tokens, Unusable):
        return tokens
    return _without_row(tokenizer, tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids) or tokens


def _without_row(tokenizer: Tokenizer, *sequences: list[int]) -> Unusable | None:
    """The reason for rejecting a row whose tokens the model lacks; None where it has them all."""
    lost = tokenizer.unembedded and {token for ids in sequences for token in ids} & tokenizer.unembedded
    return Unusable(NO_ROW, repr(tokenizer.tokenizer.convert_ids_to_tokens(min(lost)))) if lost else None


def _rejected(error: Unusable) -> dict[str, Any]:
    return {"reason": error.reason, "detail": error.detail}


def _single(pair: Pair, tokens: TokenPair | Unusable) -> dict[str, Any]:
    if isinstance(tokens, Unusable):
        return _rejected(tokens)
    return {
        "id": content_id("single", pair.id, pair.label),
        "label": pair.label,
        "source": pair.source,
        "prompt_ids": tokens.prompt_ids,
        "response_ids": tokens.chosen_ids,
        "prompt_id": content_id(tokens.prompt_ids),
        "is_cut": tokens.prompt_cut or tokens.num_responses_cut > 0,
    }


def _prompt(pair: Pair, tokens: TokenPrompt | Unusable, tokenizer: Tokenizer, shares: Shares) -> dict[str, Any]:
    if not isinstance(tokens, Unusable):
        tokens = _without_row(tokenizer, tokens.prompt_ids) or tokens
    if isinstance(tokens, Unusable):
        return _rejected(tokens)
    return {
        "id": content_id(tokens.prompt_ids),
        "split": shares.split_of(pair),
        "opening_id": content_id(pair.opening.strip()),
        **vars(tokens),
    }


def _prepared(pair: Pair, tokens: TokenPair | Unusable, shares: Shares) -> dict[str, Any]:
    if isinstance(tokens, Unusable):
        return _rejected(tokens)
    split = shares.split_of(pair)
    demonstration = content_id(tokens.prompt_ids, tokens.chosen_ids) if split == "train" else None
    return {
        "id": pair.id,
        "label": pair.label,
        "source": pair.source,
        **dict(zip(PAIR_SCORES, pair.scores or (None, None), strict=True)),
        "scores_contradict": pair.scores_contradict,
        "num_turns_joined": pair.num_turns_joined,
        "split": split,
        "opening_id": content_id(pair.opening.strip()),
        "prompt_id": content_id(tokens.prompt_ids),
        "demonstration_id": demonstration,
        **vars(tokens),
    }
