"""Prompts without answers to a token table: what the rows of a text task hold whose pairs are drawn from a policy.

They take the way of pairs (preferences.py): the same files, the same limits and rejections, and the same split by a
hash of the dialogue's opening.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.preferences import check_text_task, write_others
from pipelines.streaming import first_of, stream
from prefarena.config import Model, PretrainedModel, TextTask
from prefarena.data.first_rows import (
    FirstRows,
    look_at_others,
    look_at_prompts,
    look_at_test_prompts,
    prompts_alone,
)
from prefarena.data.limits import look_at_prompt_limit
from prefarena.data.preparation import PROMPT_COLUMNS, prepare_prompts
from prefarena.data.rejections import IN_TEST_DATA, OTHER_SPLIT, REPEATED_PROMPT, Rejections
from prefarena.data.splits import ALL_TEST, leakage_notes, shares_of
from prefarena.data.token_tables import ParquetRows, Seen
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.records import PROMPTS
from prefarena.stages import write_json


def check_rows(task: TextTask, model: Model, needs_answers: str | None, needs_scores: str | None) -> None:
    """Raise UserError, before Ray starts, where the task's first rows show that they cannot be used.

    needs_answers, needs_scores: what of the configuration needs rows with answers, or with scores of both answers;
    None: nothing does.
    """
    if not prompts_alone(task):
        check_text_task(task, model, needs_scores)
        return
    needs_answers = needs_answers if isinstance(model, PretrainedModel) else "model.kind: scratch"
    if needs_answers is not None:
        raise UserError(
            f"{task.data}: its rows are prompts without answers, but {needs_answers} learns from answers; provide "
            f"rows with `chosen` and `rejected`, or change that setting"
        )
    first, test = _look(task)
    if isinstance(model, PretrainedModel):
        tokenizer = Tokenizer.load(model.path, model.revision, task)
        for looked in [first] if test is None else [first, test]:
            look_at_prompt_limit(task, looked, tokenizer)


def prepare_prompt_rows(
    task: TextTask,
    model: PretrainedModel,
    output: str | Path,
    num_tokenisers: int | None = None,
    *,
    say: Callable[[str], object] = lambda sentence: None,
) -> dict[str, Any]:
    """Write the table `prompts` under `output`, and return the summary that is also written there as summary.json.

    Rejected rows are lines of dropped.jsonl and dropped_test.jsonl. Raises UserError as `prepare_text` does.
    """
    first, test = _look(task)
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shares = shares_of(task, first.parts, learns_judge=False)
    loaded = (model.path, model.revision)
    tokenizer = Tokenizer.load(*loaded, task)
    for looked in [first] if test is None else [first, test]:
        for sentence in look_at_prompt_limit(task, looked, tokenizer):
            say(sentence)
    with PromptTable(folder, own_test=test is not None) as table:
        if test is not None:
            prepare = functools.partial(prepare_prompts, shares=ALL_TEST)
            for rows in stream(task, test.parts, PROMPT_COLUMNS, None, prepare, loaded, num_tokenisers):
                table.add(rows, table.test_rejections)
        prepare, num_rows = functools.partial(prepare_prompts, shares=shares), 0
        prepared = stream(task, first.parts, PROMPT_COLUMNS, task.max_rows, prepare, loaded, num_tokenisers)
        for rows in first_of(prepared, task.max_rows):
            table.add(rows, table.rejections)
            num_rows += rows.num_rows
    summary = table.summary(task, num_rows) | {"tokenizer": model.path, "ends": tokenizer.ends_in_words()}
    summary["notes"] = [*first.notes, *(test.notes if test else []), *leakage_notes(summary)]
    summary |= write_others(task, loaded, folder, num_tokenisers)
    write_json(folder / "summary.json", summary)
    return summary


def _look(task: TextTask) -> tuple[FirstRows, FirstRows | None]:
    first = look_at_prompts(task)
    test = look_at_test_prompts(task, first)
    look_at_others(task)
    return first, test


class PromptTable:
    """The table of prompts under `folder`, each of them once. Use as a context manager; rows to test on come first."""

    def __init__(self, folder: Path, own_test: bool) -> None:
        self._folder, self._own_test = folder, own_test
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> PromptTable:
        self._table = ParquetRows(self._folder / "prompts", PROMPTS)
        self.rejections = Rejections(self._folder / "dropped.jsonl")
        self.test_rejections = Rejections(self._folder / "dropped_test.jsonl" if self._own_test else None)
        self._seen = Seen(self._folder / ".seen.sqlite")
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self.rejections.close()
        self.test_rejections.close()
        self._seen.close()

    def add(self, rows: pa.Table, rejections: Rejections) -> None:
        """Write PREPARED_PROMPTS, or list them as rejected."""
        kept = []
        for i, row in enumerate(rows.drop_columns("prompt_ids").to_pylist()):
            reason = row["reason"] or self._refused(row)
            if reason is not None:
                rejections.add(row["file"], row["row"], reason, row["detail"] or "")
                continue
            kept.append(i)
            self._counts[row["split"]] += 1
            self._counts["cut"] += row["prompt_cut"]
        rows = rows.take(kept)
        covered = pa.array([split == "train" for split in rows["split"].to_pylist()], pa.bool_())
        self._table.add({**{name: rows[name] for name in ("id", "prompt_ids", "split")}, "covered": covered})

    def _refused(self, row: dict[str, Any]) -> str | None:
        """The reason for leaving out a prompt that could be read; None if it is kept."""
        if row["split"] == "test":
            self._seen.first("opening", row["opening_id"])
        elif self._own_test and ("opening", row["opening_id"]) in self._seen:
            return IN_TEST_DATA
        before = self._seen.first("prompt", row["id"], row["split"])
        if before is None:
            return None
        return REPEATED_PROMPT if before == row["split"] else OTHER_SPLIT  # two long prompts with the same end

    def summary(self, task: TextTask, num_rows: int) -> dict[str, Any]:
        """Return the counts. Raises UserError where a split is empty, or too many rows were rejected."""
        self.rejections.check(task.data, num_rows, task.max_rejected_share)
        tested = self._counts["test"] + self.test_rejections.num_counted
        self.test_rejections.check(task.test_source[0] if task.test_source else "", tested, task.max_rejected_share)
        for split in ("train", "test"):
            if not self._counts[split]:
                raise UserError(
                    f"{task.data}: no {split} prompts are left of {num_rows} rows; provide more data, or change the "
                    f"shares"
                )
        dropped = dict((self.rejections.reasons + self.test_rejections.reasons).most_common())
        return {
            "num_rows": num_rows,
            "num_train_prompts": self._counts["train"],
            "num_test_prompts": self._counts["test"],
            "num_truncated_prompts": self._counts["cut"],
            "num_dropped": sum(dropped.values()),
            "dropped": dropped,
        }
