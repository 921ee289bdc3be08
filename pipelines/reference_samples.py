"""Samples of the reference on training prompts of a text task: what learned rewards are normalised on."""

from __future__ import annotations

import time
from functools import partial

import pyarrow as pa
from rich.console import Console

from pipelines.claims import settle
from pipelines.engine import tried_generator
from pipelines.jobs import response_limit
from pipelines.plan import SeedPlan, model_of
from pipelines.progress import stage_line
from pipelines.sampling import generation_counts
from prefarena.config import Comparison, LanguageTask
from prefarena.data.tables import read_rows, write_rows
from prefarena.generation.interface import Sampling
from prefarena.records import DEMONSTRATIONS, Rollout, content_id
from prefarena.stages import Stage, costs_of, write_manifest


def draw_reference_samples(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Write every unfinished stage of samples, `reference_samples/` as records.DEMONSTRATIONS. Needs Ray and vLLM.

    The enumerable language draws its own from its exact table, with its pairs.
    """
    wanted = {
        plan.samples.folder: (plan.samples, plan)
        for plan in plans
        if plan.samples and not isinstance(plan.task, LanguageTask)
    }
    settle(console, wanted, partial(_draw, config, console))


def _draw(config: Comparison, console: Console, waiting: list[tuple[Stage, SeedPlan]]) -> None:
    settings = config.evaluation
    with tried_generator(config, waiting[0][1], console) as generator:
        for stage, plan in waiting:
            with stage_line(console, f"{stage.kind} ({stage.label})", "samples of the reference policy"):
                folder, started = stage.begin(), time.perf_counter()
                generator.load_checkpoint(model_of(plan.reference), stage.key)
                prompts = training_prompts(plan, settings.num_reference_samples)
                sampling = Sampling(response_limit(plan.task), 1.0, settings.seed)
                rollouts = generator.generate(prompts, sampling, stage.key)
                write_rows(_table(rollouts), folder / "reference_samples" / "part-0.parquet", DEMONSTRATIONS)
                wall = time.perf_counter() - started
                counts = generation_counts(model_of(plan.reference), rollouts)
                write_manifest(folder, {"num_samples": len(rollouts), "costs": costs_of(wall, **counts)})


def training_prompts(plan: SeedPlan, number: int) -> list[list[int]]:
    """The first `number` training prompts in the order of their ids, which are hashes; fewer are gone round again."""
    rows = read_rows(plan.data.folder / "prompts").to_pylist()
    prompts = [row["prompt_ids"] for row in rows if row["split"] == "train"]
    return [prompts[index % len(prompts)] for index in range(number)]


def _table(rollouts: list[Rollout]) -> pa.Table:
    rows = [
        {
            "id": content_id("sample", place, rollout.prompt_ids, rollout.response_ids),
            "prompt_ids": rollout.prompt_ids,
            "response_ids": rollout.response_ids,
        }
        for place, rollout in enumerate(rollouts)
    ]
    return pa.Table.from_pylist(rows, schema=DEMONSTRATIONS)
