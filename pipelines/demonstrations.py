"""Demonstrations for the eta term of a method, where these are neither the data's demonstrations nor its pairs.

They are samples of the reference on the prompts to train on, or the user's own rows. A stage holds `demonstrations/`
(records.DEMONSTRATIONS); no prompt that is tested on is in it.
"""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipelines.annotate import ExactReference
from pipelines.claims import settle
from pipelines.jobs import response_limit
from pipelines.plan import SeedPlan, model_of
from pipelines.progress import stage_line
from pipelines.runner import run_once
from pipelines.sampling import Sampler, generation_counts
from pipelines.streaming import stream
from prefarena.config import Comparison, LanguageTask, PretrainedModel, TextTask
from prefarena.data.preparation import DEMONSTRATION_COLUMNS, prepare_demonstrations
from prefarena.data.rejections import Rejections
from prefarena.data.sources import find_parts
from prefarena.data.tables import read_rows, write_rows
from prefarena.data.token_tables import ParquetRows, Seen, usable
from prefarena.errors import EntryError, UserError
from prefarena.evaluation.enumeration import Responses
from prefarena.generation.interface import Sampling
from prefarena.records import DEMONSTRATIONS, content_id
from prefarena.stage_files import EXACT
from prefarena.stages import Stage, costs_of, write_manifest
from prefarena.tasks.language import EOS_ID, Language
from prefarena.tasks.pairs import reference_samples

#: Where these samples begin in the numbering of requests: they are others than those of any evaluation.
_FIRST_INDEX = 1 << 41


def make_demonstrations(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Finish every stage of demonstrations. Needs Ray; pairs and the reference must be finished."""
    drawn: dict[Path, tuple[Stage, SeedPlan]] = {}
    for plan in plans:
        for source, stage in plan.demonstrations.items():
            if isinstance(plan.task, LanguageTask):
                draw = partial(_draw_from_table, plan, plan.task)
                run_once(console, stage, draw, "samples to be drawn from the reference policy's table")
            elif source == "file":
                read = partial(_read_file, config, plan, plan.task)
                run_once(console, stage, read, "the rows of task.demonstration_data to be read and tokenised")
            else:
                drawn[stage.folder] = (stage, plan)
    settle(console, drawn, partial(_draw, config, console))


def _draw_from_table(plan: SeedPlan, task: LanguageTask, folder: Path) -> None:
    """Draw as many samples of the reference as the data has demonstrations (or a few more), equally many per prompt."""
    started, language = time.perf_counter(), Language(task)
    exact = ExactReference.load(plan.pairs.folder / EXACT)
    listed = Responses.listed(language.vocab_size, task.response_limit, EOS_ID)
    each = -(-task.num_demonstrations // task.num_prompts)
    samples = reference_samples(
        language.prompt_ids, listed.sequences, exact.ref_logps, each, task.seed, purpose="demonstrations-of-reference"
    )
    _finish(folder, samples, started)


def _draw(config: Comparison, console: Console, waiting: list[tuple[Stage, SeedPlan]]) -> None:
    """Draw a response of the reference to each training prompt of a text task."""
    for stage, plan in waiting:
        with (
            stage_line(console, f"{stage.kind} ({stage.label})", "samples of the reference policy"),
            Sampler(config, plan, console) as sampler,
        ):
            folder, started = stage.begin(), time.perf_counter()
            rows = read_rows(plan.tables / "prompts").to_pylist()
            prompts = [row["prompt_ids"] for row in rows if row["split"] == "train"]
            sampling = Sampling(response_limit(plan.task), 1.0, config.evaluation.seed, first_index=_FIRST_INDEX)
            try:
                rollouts = sampler.sample(model_of(plan.reference), stage.key, prompts, sampling)
            except EntryError as error:
                raise UserError(f"samples of the reference cannot be drawn as demonstrations: {error}") from error
            table = [
                {
                    "id": content_id("demonstration", one.prompt_ids, one.response_ids),
                    "prompt_ids": one.prompt_ids,
                    "response_ids": one.response_ids,
                }
                for one in rollouts
            ]
            samples = pa.Table.from_pylist(table, schema=DEMONSTRATIONS)
            _finish(folder, samples, started, **generation_counts(model_of(plan.reference), rollouts))
            sampler.forget(stage.key)


def _finish(folder: Path, rows: pa.Table, started: float, **costs: float) -> None:
    write_rows(rows, folder / "demonstrations" / "part-0.parquet", DEMONSTRATIONS)
    wall = time.perf_counter() - started
    write_manifest(folder, {"data": {"num_demonstrations": rows.num_rows}, "costs": costs_of(wall, **costs)})


# ------------------------------------------------------------------------------------------------- of a file


def _read_file(config: Comparison, plan: SeedPlan, task: TextTask, folder: Path) -> None:
    started = time.perf_counter()
    loaded: tuple[str, str | None] = (str(plan.data.folder / "tokenizer"), None)
    if isinstance(config.model, PretrainedModel):
        loaded = (config.model.path, config.model.revision)
    counts = write_demonstrations(task, loaded, _tested(plan), folder)
    write_manifest(folder, {"data": counts, "costs": costs_of(time.perf_counter() - started)})


def _tested(plan: SeedPlan) -> set[str]:
    """Ids of the prompts that policies are tested on, or would be where some are set aside to tune on."""
    found: set[str] = set()
    for tables in (plan.data.folder, plan.tables):
        prompts = read_rows(tables / "prompts", ["split"])
        found |= set(prompts.filter(pc.equal(prompts["split"], "test"))["id"].to_pylist())
    return found


def write_demonstrations(
    task: TextTask, tokenizer: tuple[str, str | None], tested: set[str], folder: Path, most: int | None = None
) -> dict[str, Any]:
    """Write the rows of `task.demonstration_data` to demonstrations/, and list the rejected ones in dropped.jsonl.

    tokenizer: its path and revision. tested: ids of prompts whose rows are left out; so are repeats. most: actors that
    tokenise at once. Returns counts. Raises UserError, with file and row, where more than the allowed share of the rows
    cannot be used, and where none is left.
    """
    source = str(task.demonstration_data)
    table, rejections = ParquetRows(folder / "demonstrations", DEMONSTRATIONS), Rejections(folder / "dropped.jsonl")
    seen, counts = Seen(folder / ".seen.sqlite"), Counter[str]()
    try:
        parts = find_parts(source, task.split)
        for rows in stream(task, parts, DEMONSTRATION_COLUMNS, None, prepare_demonstrations, tokenizer, most):
            counts["rows"] += rows.num_rows
            rows = usable(rows, "demonstration", tested, seen, rejections)
            counts["truncated"] += sum(rows["is_cut"].to_pylist())
            table.add({name: rows[name] for name in DEMONSTRATIONS.names})
    finally:
        table.close()
        rejections.close()
        seen.close()
    rejections.check(source, counts["rows"], task.max_rejected_share)
    if not table.count:
        raise UserError(f"{source}: none of its {counts['rows']} rows is a demonstration to train on")
    dropped = dict(rejections.reasons.most_common())
    told = {"num_rows": counts["rows"], "num_demonstrations": table.count, "num_truncated": counts["truncated"]}
    return {**told, "num_dropped": sum(dropped.values()), "dropped": dropped}
