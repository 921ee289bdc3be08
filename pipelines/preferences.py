"""Raw preference data to token tables: a streaming Ray Data pipeline.

    read (tasks) -> normalise, split, tokenise (actors) -> drop repeats, write (this process)

Rows keep their order, so the same input gives the same tables. Blocks are small and the object store's share is capped,
so memory does not grow with the data; ids already seen are kept on disk.

Splits: a seeded hash of the dialogue's opening (the text up to its first answer) decides between test, judge and
train. So no prompt is in two splits, and neither are two turns of one dialogue.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefarena.config import Model, PretrainedModel, TextTask
from prefarena.data.formats import Pair, Unusable, normalise
from prefarena.data.sources import BrokenRow, Part, RawRow, column_names, find_parts, parse, read_part
from prefarena.data.token_tables import BROKEN, ParquetRows, TokenTables
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError
from prefarena.modeling.load import load_tokenizer
from prefarena.records import PAIRS, PRETRAINING, content_id
from prefarena.stages import write_json

COLUMNS = ("prompt", "chosen", "rejected", "label", "id", "source")

_FIRST_ROWS = 20  # looked at before Ray starts
_BLOCK_BYTES = 4 << 20
_STORE_BYTES = 256 << 20  # object store memory that one pipeline may fill
_READ_BATCH = 256
_TOKENISE_BATCH = 256
_TOKENIZER_ROWS = 100_000  # a tokenizer is learnt from the first training rows

_RAW = pa.schema([("file", pa.string()), ("row", pa.int64()), ("data", pa.binary()), ("broken", pa.string())])
#: What the actors give back. `split` is train, judge or test; for a dropped row `reason` says why, `detail` what.
_DONE = pa.schema(
    [
        *[field for field in PAIRS if field.name != "id"],
        ("id", pa.string()),
        ("split", pa.string()),
        ("prompt_cut", pa.bool_()),
        ("num_responses_cut", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
    ]
)
_PIECES = pa.schema([*PRETRAINING, ("reason", pa.string()), ("detail", pa.string())])


def check_text_task(task: TextTask) -> list[Part]:
    """What there is to read. Raises UserError, before Ray starts, where the first rows show that it cannot be used."""
    parts = _check_source(task.data, task.split, COLUMNS, ("chosen", "rejected"))
    if task.pretraining_text is not None:
        _check_source(task.pretraining_text, task.split, ("text",), ("text",))
    return parts


def prepare_tokenizer(task: TextTask, model: Model, folder: str | Path) -> str:
    """Path of the task's tokenizer: the pretrained model's own, or a BPE learnt from the training split."""
    if isinstance(model, PretrainedModel):
        return model.path
    train_tokenizer(_training_texts(task), model.vocab_size, folder)
    return str(folder)


def prepare_text(
    task: TextTask, tokenizer_path: str | None, model: Model, output: str | Path, num_tokenisers: int | None = None
) -> dict[str, Any]:
    """Write the task's tables under `output`, and return the summary that is also written there as summary.json.

    Tables (parquet folders): train_pairs, judge_pairs, test_pairs (PAIRS), demonstrations (training prompts with their
    chosen answers), prompts (of the training and test splits), pretraining where the task has such text. Every dropped
    row is a line of dropped.jsonl. Without `tokenizer_path` the tokenizer is `prepare_tokenizer`'s, in
    output/tokenizer. `num_tokenisers` is the most actors that tokenise at once; by default one per CPU.

    Raises UserError for a missing or empty source, missing columns, a broken line, a split left empty, or more rows
    dropped than task.max_rejected_share.
    """
    parts = check_text_task(task)
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = tokenizer_path or prepare_tokenizer(task, model, folder / "tokenizer")
    revision = model.revision if isinstance(model, PretrainedModel) and path == model.path else None
    Tokenizer(load_tokenizer(path, revision), task)  # says what is wrong with either, here and not in an actor
    with TokenTables(folder) as tables:
        for table in _stream(parts, COLUMNS, task.max_rows, _Prepare, (task, path, revision), num_tokenisers):
            for row in table.to_pylist():
                tables.add(row)
                if tables.num_rows == task.max_rows:
                    break
            if tables.num_rows == task.max_rows:
                break
    summary = {**tables.summary(task), "tokenizer": path, "rules": _rules(task)}
    if task.pretraining_text is not None:
        summary["num_pretraining"] = _write_pretraining(task, path, revision, folder, num_tokenisers)
    write_json(folder / "summary.json", summary)
    return summary


def split_of(pair: Pair, task: TextTask) -> str:
    """train, judge or test: a seeded hash of the dialogue's opening, so it depends on no other row."""
    digest = hashlib.sha256(f"{task.split_seed}:{pair.opening.strip()}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < task.test_share:
        return "test"
    return "judge" if share < task.test_share + task.judge_share else "train"


# ------------------------------------------------------------------------------------------------ reading


def _check_source(path: str, split: str, columns: tuple[str, ...], needed: tuple[str, ...]) -> list[Part]:
    parts = find_parts(path, split)
    first: list[dict[str, Any]] = []
    try:
        for part in parts:
            first += [parse(raw) for raw in read_part(part, columns, _FIRST_ROWS)]
            if len(first) >= _FIRST_ROWS:
                break
    except BrokenRow as error:
        raise UserError(str(error)) from None
    if not first:
        raise UserError(f"{path}: there are no rows in it")
    missing = [name for name in needed if all(row.get(name) is None for row in first)]
    if missing:
        wanted = " and ".join(map(repr, missing))
        raise UserError(f"{path}: no column {wanted}; its columns are {', '.join(column_names(parts[0])) or 'none'}")
    return parts


def _training_texts(task: TextTask) -> Iterator[str]:
    """The first training rows' texts, each prompt with both answers. Rows that cannot be used are passed over here."""
    count = num_rows = 0
    for part in find_parts(task.data, task.split):
        for raw in read_part(part, COLUMNS):
            num_rows += 1
            if count >= _TOKENIZER_ROWS or (task.max_rows is not None and num_rows > task.max_rows):
                return
            try:
                pair = normalise(parse(raw), task.format)
            except Unusable:
                continue  # the pipeline lists it
            except BrokenRow as error:
                raise UserError(str(error)) from None
            if split_of(pair, task) == "train":
                count += 1
                yield pair.prompt if isinstance(pair.prompt, str) else "\n".join(text for _, text in pair.prompt)
                yield pair.chosen
                yield pair.rejected


def _read(batch: pa.Table, columns: tuple[str, ...], limit: int | None) -> Iterator[pa.Table]:
    """The rows of the parts in a batch, a few at a time; a broken file ends with a row that says so."""
    for fields in batch.to_pylist():
        rows: list[tuple[str, int, bytes, str | None]] = []
        try:
            for raw in read_part(Part(**fields), columns, limit):
                rows.append((raw.file, raw.row, raw.data, None))
                if len(rows) == _READ_BATCH:
                    yield _raw_table(rows)
                    rows = []
        except BrokenRow as error:
            rows.append((fields["path"], 0, b"", str(error)))
        yield _raw_table(rows)


def _raw_table(rows: list[tuple[str, int, bytes, str | None]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(_RAW.names, row, strict=True)) for row in rows], schema=_RAW)


def _stream(
    parts: list[Part], columns: tuple[str, ...], limit: int | None, worker: type, arguments: tuple, most: int | None
) -> Iterator[pa.Table]:
    """The parts' rows, in order, through actors of class `worker`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    if not ray.is_initialized():
        ray.init()
    cpus = int(ray.cluster_resources().get("CPU", 1))
    context = DataContext.get_current().copy()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_STORE_BYTES)
    with DataContext.current(context):
        data = ray.data.from_items([vars(part) for part in parts], override_num_blocks=len(parts))
        # Different CPU shares keep the two steps from being fused: one big file then still feeds every actor.
        raw = data.map_batches(
            functools.partial(_read, columns=columns, limit=limit), batch_size=1, batch_format="pyarrow", num_cpus=0.1
        )
        done = raw.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=_TOKENISE_BATCH,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=max(1, most or cpus)),
            num_cpus=0.9,
        )
    yield from done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


# ---------------------------------------------------------------------------------------------- in the actors


class _Prepare:
    """Raw rows to token pairs or to reasons; errors travel as rows, for the driver to say them in one sentence."""

    def __init__(self, task: TextTask, path: str, revision: str | None) -> None:
        self.task = task
        self.tokenizer = Tokenizer(load_tokenizer(path, revision), task)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._row(row) for row in batch.to_pylist()], schema=_DONE)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        where = {"file": row["file"], "row": row["row"]}
        if row["broken"] is not None:
            return {**where, "reason": BROKEN, "detail": row["broken"]}
        try:
            fields = parse(RawRow(row["file"], row["row"], row["data"]))
            pair = normalise(fields, self.task.format, Path(row["file"]).name)
            tokens = self.tokenizer.pair(pair)
        except BrokenRow as error:
            return {**where, "reason": BROKEN, "detail": str(error)}
        except Unusable as error:
            return {**where, "reason": error.reason, "detail": error.detail}
        done = {"id": pair.id, "label": pair.label, "source": pair.source, "split": split_of(pair, self.task)}
        return {**where, **done, **vars(tokens)}


class _Pieces:
    """Raw rows with a `text` to pieces of token ids."""

    def __init__(self, task: TextTask, path: str, revision: str | None) -> None:
        self.tokenizer = Tokenizer(load_tokenizer(path, revision), task)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([piece for row in batch.to_pylist() for piece in self._rows(row)], schema=_PIECES)

    def _rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        where = f"{row['file']}:{row['row']}"
        if row["broken"] is not None:
            return [{"reason": BROKEN, "detail": row["broken"]}]
        try:
            text = parse(RawRow(row["file"], row["row"], row["data"])).get("text")
        except BrokenRow as error:
            return [{"reason": BROKEN, "detail": str(error)}]
        if not isinstance(text, str):
            return [{"reason": BROKEN, "detail": f"{where}: `text` is {type(text).__name__}, not text"}]
        if not text.strip():
            return []
        pieces = self.tokenizer.text(text)
        return [{"id": content_id(where, text, i), "ids": ids} for i, ids in enumerate(pieces)]


# -------------------------------------------------------------------------------------------------- writing


def _write_pretraining(task: TextTask, path: str, revision: str | None, folder: Path, most: int | None) -> int:
    """Write the pretraining table; the number of its pieces. Raises UserError at a broken line, or if it is empty."""
    rows = ParquetRows(folder / "pretraining", PRETRAINING)
    parts = find_parts(str(task.pretraining_text), task.split)
    try:
        for table in _stream(parts, ("text",), None, _Pieces, (task, path, revision), most):
            for row in table.to_pylist():
                if row["reason"] == BROKEN:
                    raise UserError(row["detail"])
                rows.add({"id": row["id"], "ids": row["ids"]})
    finally:
        rows.close()
    if rows.count == 0:
        raise UserError(f"{task.pretraining_text}: there is no text in it")
    return rows.count


def _rules(task: TextTask) -> dict[str, str]:
    """The rules that the counts are about, in words."""
    prompts = "are dropped" if task.long_prompts == "drop" else "keep their bos and last tokens"
    return {
        "long prompts": f"prompts of more than {task.max_prompt_tokens} tokens {prompts}",
        "long responses": f"responses of more than {task.max_response_tokens} tokens keep their first, without eos",
        "splits": f"by a hash of the dialogue's opening with seed {task.split_seed}",
    }
