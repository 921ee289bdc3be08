"""Raw preference data to token tables: a streaming Ray Data pipeline.

    read chunks (tasks) -> parse, normalise, split, tokenise (actors) -> leave out repeats, write (this process)

What costs time is done in the actors, a chunk at a time; between them and the tables everything stays in Arrow. Rows
keep their order, so the same input gives the same tables. Blocks are small and the object store's share is capped, so
memory does not grow with the data; ids already seen are kept on disk.

Splits: a seeded hash of the dialogue's opening (the text up to its first answer) decides between test, judge and
train. So no prompt is in two splits, and neither are two turns of one dialogue.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipelines.streaming import first_of, stream
from prefarena.config import Model, PretrainedModel, TextTask
from prefarena.data.first_rows import FirstRows, look_at_others, look_at_pairs, look_at_test
from prefarena.data.labels import EVEN, order_notes
from prefarena.data.limits import look_at_limits
from prefarena.data.notes import notes_of, transcript_notes
from prefarena.data.preparation import (
    COLUMNS,
    SINGLE_COLUMNS,
    TEXT_COLUMNS,
    pair_of,
    prepare_pairs,
    prepare_pieces,
    prepare_responses,
)
from prefarena.data.rejections import Rejections, Unusable
from prefarena.data.sources import (
    BrokenFile,
    Part,
    find_parts,
    read_rows_of,
)
from prefarena.data.splits import ALL_TEST, Shares, ignored_judge, leakage_notes, shares_of
from prefarena.data.tables import read_rows
from prefarena.data.token_tables import ParquetRows, Seen, TokenTables, usable
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError
from prefarena.mirror import push
from prefarena.records import PRETRAINING, RESPONSES
from prefarena.stages import write_json

_TOKENIZER_ROWS = 100_000  # a tokenizer is learnt from the first training rows


def check_text_task(task: TextTask, model: Model | None = None, needs_scores: str | None = None) -> list[Part]:
    """Find what there is to read. Raises UserError, before Ray starts, where the first rows show that it is unusable.

    With a pretrained `model`, these rows must also suit its tokenizer and its chat template. needs_scores: what learns
    from the scores of both answers, if anything does.
    """
    first, test = _look(task)
    if needs_scores is not None and first.num_without_scores:
        raise UserError(
            f"{task.data}: {first.num_without_scores} of its first {first.num_rows} rows have no scores of both "
            "answers (numbers in columns such as score_chosen and score_rejected), and "
            f"{needs_scores} learns from them"
        )
    if isinstance(model, PretrainedModel):
        tokenizer = Tokenizer.load(model.path, model.revision, task)
        for looked in [first] if test is None else [first, test]:
            look_at_limits(task, looked, tokenizer)
    return first.parts


def prepare_tokenizer(task: TextTask, model: Model, folder: str | Path, shares: Shares) -> str:
    """Path of the task's tokenizer: the pretrained model's own, or a BPE learnt from the training split."""
    if isinstance(model, PretrainedModel):
        return model.path
    train_tokenizer(_training_texts(task, shares), model.vocab_size, folder)
    return str(folder)


def prepare_text(
    task: TextTask,
    tokenizer_path: str | None,
    model: Model,
    output: str | Path,
    num_tokenisers: int | None = None,
    *,
    learns_judge: bool = True,
    say: Callable[[str], object] = lambda sentence: None,
) -> dict[str, Any]:
    """Write the task's tables under `output`, and return the summary that is also written there as summary.json.

    Tables (parquet folders): train_pairs, judge_pairs, test_pairs (PAIRS), demonstrations (training prompts with their
    chosen answers), prompts (of the training and test splits), responses and pretraining where the task has such rows.
    Every rejected row is a line of dropped.jsonl, or of dropped_test, _unpaired or _pretraining.jsonl. Without
    `tokenizer_path` the tokenizer is `prepare_tokenizer`'s, in output/tokenizer. `num_tokenisers` is the most actors
    that tokenise at once; by default one per CPU. Pairs are set aside for the judge only where one is learned from them
    (`learns_judge`). What the limits do to the first rows is said, by `say`, before the rest is tokenised.

    Raises UserError for a missing or empty source, a file that cannot be read, missing columns, a split left empty, or
    more rows rejected than task.max_rejected_share, of the first rows or of all.
    """
    first, test = _look(task)
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shares = shares_of(task, first.parts, learns_judge)
    path = tokenizer_path or prepare_tokenizer(task, model, folder / "tokenizer", shares)
    if path == str(folder / "tokenizer"):
        push(Path(path))  # the actors that tokenise may be on other nodes
    revision = model.revision if isinstance(model, PretrainedModel) and path == model.path else None
    tokenizer = Tokenizer.load(path, revision, task)
    for looked in [first] if test is None else [first, test]:
        for sentence in look_at_limits(task, looked, tokenizer):
            say(sentence)
    with TokenTables(folder, own_test=test is not None) as tables:
        if test is not None:
            prepare = functools.partial(prepare_pairs, shares=ALL_TEST)
            for rows in stream(task, test.parts, COLUMNS, None, prepare, (path, revision), num_tokenisers):
                tables.add_test(rows)
            tables.check_test(task)
        prepare = functools.partial(prepare_pairs, shares=shares)
        prepared = stream(task, first.parts, COLUMNS, task.max_rows, prepare, (path, revision), num_tokenisers)
        for rows in first_of(prepared, task.max_rows):
            tables.add(rows)
    summary = {**tables.summary(task, shares), "tokenizer": path, "rules": _rules(task, shares)}
    summary["ends"] = tokenizer.ends_in_words()
    notes = [*first.notes, *(test.notes if test else []), *transcript_notes(first, task, tokenizer.tokenizer)]
    notes += [*ignored_judge(task, learns_judge), *order_notes(summary), *leakage_notes(summary)]
    summary["notes"] = [*notes, *notes_of(summary, tokenizer.conversations.form)]
    summary |= write_others(task, (path, revision), folder, num_tokenisers)
    write_json(folder / "summary.json", summary)
    return summary


# ------------------------------------------------------------------------------------------------ reading


def _look(task: TextTask) -> tuple[FirstRows, FirstRows | None]:
    """Look at the pairs, the separate test set if there is one, single responses and pretraining text."""
    first = look_at_pairs(task)
    test = look_at_test(task, first)
    look_at_others(task)
    return first, test


def _training_texts(task: TextTask, shares: Shares) -> Iterator[str]:
    """The first training rows' texts, each prompt with both answers. Rows that cannot be used are passed over here."""
    count = num_rows = 0
    for part in find_parts(task.data, task.split):
        for _, row in _readable(part, task):
            num_rows += 1
            if count >= _TOKENIZER_ROWS or (task.max_rows is not None and num_rows > task.max_rows):
                return
            try:
                pair = pair_of(row, task)
            except Unusable:
                continue  # the pipeline lists it
            if shares.split_of(pair) == "train":
                count += 1
                yield pair.prompt if isinstance(pair.prompt, str) else "\n".join(text for _, text in pair.prompt)
                yield pair.chosen
                yield pair.rejected


def _readable(part: Part, task: TextTask) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    try:
        yield from read_rows_of(part, COLUMNS, task.max_row_bytes)
    except BrokenFile as error:
        raise UserError(str(error)) from None


# -------------------------------------------------------------------------------------------------- writing


def write_others(task: TextTask, loaded: tuple[str, str | None], folder: Path, most: int | None) -> dict[str, Any]:
    """The tables of single responses and of pretraining text, where the task has them, and what a summary says of them.

    loaded: the tokenizer's path and revision. most: actors that tokenise at once.
    """
    told: dict[str, Any] = {}
    if task.unpaired_data is not None:
        told["unpaired"] = _write_singles(task, task.unpaired_data, loaded, folder, most)
    if task.pretraining_text is not None:
        told["num_pretraining"] = _write_pretraining(task, *loaded, folder, most)
    return told


def _write_singles(
    task: TextTask, source: str, tokenizer: tuple[str, str | None], folder: Path, most: int | None
) -> dict[str, Any]:
    """Write the table of single responses; counts. Raises UserError as `prepare_text` does, and without both kinds.

    Rows whose prompt is one that is tested on are left out, and so are repeats.
    """
    prompts = read_rows(folder / "prompts", ["split"])
    tested = set(prompts.filter(pc.equal(prompts["split"], "test"))["id"].to_pylist())
    table, rejections = ParquetRows(folder / "responses", RESPONSES), Rejections(folder / "dropped_unpaired.jsonl")
    seen, counts = Seen(folder / ".seen_unpaired.sqlite"), Counter[str]()
    try:
        for rows in stream(
            task, find_parts(source, task.split), SINGLE_COLUMNS, None, prepare_responses, tokenizer, most
        ):
            counts["rows"] += rows.num_rows
            rows = usable(rows, "single", tested, seen, rejections)
            counts["desirable"] += sum(label > EVEN for label in rows["label"].to_pylist())
            counts["undesirable"] += sum(label < EVEN for label in rows["label"].to_pylist())
            counts["truncated"] += sum(rows["is_cut"].to_pylist())
            table.add({name: rows[name] for name in RESPONSES.names})
    finally:
        table.close()
        rejections.close()
        seen.close()
    rejections.check(source, counts["rows"], task.max_rejected_share)
    for kind in ("desirable", "undesirable"):
        if not counts[kind]:
            raise UserError(
                f"{source}: none of its {table.count} responses to train on is {kind}: `label` is true or 1 of a "
                "desirable response, false or 0 of another one, and both are needed"
            )
    dropped = dict(rejections.reasons.most_common())
    return {**{f"num_{name}": counts[name] for name in ("rows", "desirable", "undesirable", "truncated")},
            "num_responses": table.count, "num_dropped": sum(dropped.values()), "dropped": dropped}  # fmt: skip


def _write_pretraining(task: TextTask, path: str, revision: str | None, folder: Path, most: int | None) -> int:
    """Write the pretraining table; the number of its pieces. Raises UserError as `prepare_text` does."""
    table = ParquetRows(folder / "pretraining", PRETRAINING)
    rejections, num_texts, source = Rejections(folder / "dropped_pretraining.jsonl"), 0, str(task.pretraining_text)
    parts = find_parts(source, task.split)
    try:
        for rows in stream(task, parts, TEXT_COLUMNS, None, prepare_pieces, (path, revision), most):
            whole = pc.is_null(rows["reason"])
            for row in rows.filter(pc.invert(whole)).to_pylist():
                rejections.add(row["file"], row["row"], row["reason"], row["detail"])
            num_texts += pc.sum(pc.equal(rows["piece"], 0)).as_py() or 0
            pieces = rows.filter(whole)
            table.add({name: pieces[name] for name in PRETRAINING.names})
    finally:
        table.close()
        rejections.close()
    rejections.check(source, num_texts + rejections.num_counted, task.max_rejected_share)
    if table.count == 0:
        raise UserError(f"{source}: there is no text in it")
    return table.count


def _rules(task: TextTask, shares: Shares) -> dict[str, str]:
    """The rules that the counts are about, in words."""
    prompts = "are dropped" if task.long_prompts == "drop" else "keep their bos and last tokens"
    tested = f"{shares.test:.2%} are held out to test on"
    if task.test_source is not None:
        tested = f"those to test on are of {task.test_source[0]} (split {task.test_source[1]})"
    return {
        "long prompts": f"prompts of more than {task.max_prompt_tokens} tokens {prompts}",
        "long responses": f"responses of more than {task.max_response_tokens} tokens keep their first, not their end",
        "splits": f"by a hash of the dialogue's opening with seed {task.split_seed}; {tested}, and "
        f"{shares.judge:.2%} are held out for the judge",
    }
