"""Pairs of a text task that no file holds: drawn from a policy by the generation actors, labelled by judges.

    prompts ─▶ drawn (num_samples responses to each) ─▶ pairs (judged, ordered) ─▶ what pairs of a file are for

Two stages, so that other labels need no new samples. Of `pairs` of a file, with `task.covered_share` below 1, a stage
`pairs` keeps those of the covered prompts.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape

from pipelines.claims import settle
from pipelines.jobs import judge_spec, response_limit
from pipelines.labelling import Questions, ask, scoring_flops
from pipelines.plan import SeedPlan, model_of
from pipelines.progress import stage_line
from pipelines.runner import run_once
from pipelines.sampling import Sampler, generation_counts
from prefarena.config import Comparison, DrawnPairs, PairwiseJudge, RewardModel, TextTask
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import EntryError, UserError
from prefarena.generation.interface import Sampling
from prefarena.mirror import bring, root_of
from prefarena.records import DEMONSTRATIONS, DRAWN, PAIRS, PROMPTS, content_id
from prefarena.stages import Stage, costs_of, write_json, write_manifest
from prefarena.tasks.annotation import (
    Answered,
    Contest,
    all_places,
    answered,
    choose_covered,
    contests_of_scores,
    make_pairs,
)

_SAMPLES = "samples"


def make_drawn_pairs(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Finish the stages of drawn pairs of a text task, and of pairs without those of prompts that get none. Needs Ray.

    Policy and judges must be finished. Notes on the pairs are printed here, once.
    """
    drawn = {plan.drawn.folder: (plan.drawn, plan) for plan in plans if plan.drawn is not None}
    settle(console, drawn, partial(_draw, config, console))
    said: set[Path] = set()
    for plan in plans:
        stage = plan.made_pairs
        if not isinstance(plan.task, TextTask) or stage == plan.data:
            continue
        make, waiting_for = partial(_keep_covered, plan, plan.task), "pairs of the covered prompts"
        if plan.task.pairs is not None:
            make = partial(_label, config, plan, plan.task, plan.task.pairs)
            waiting_for = "processes of the judge to start, and to order the responses"
        run_once(console, stage, make, waiting_for)
        if stage.folder not in said:
            said.add(stage.folder)
            for note in stage.manifest()["data"]["notes"]:
                console.print(f"pairs: {escape(note)}")


# ---------------------------------------------------------------------------------------------------- drawing


def _draw(config: Comparison, console: Console, waiting: list[tuple[Stage, SeedPlan]]) -> None:
    for stage, plan in waiting:
        pairs, behaviour = _settings_of(plan), plan.behaviour or plan.reference
        with (
            stage_line(console, f"{stage.kind} ({stage.label})", "responses of which pairs are made"),
            Sampler(config, plan, console, made_from=model_of(behaviour)) as sampler,
        ):
            folder, started = stage.begin(), time.perf_counter()
            rows = read_rows(plan.data.folder / "prompts").to_pylist()
            asked = [(row, place) for row in rows for place in range(pairs.num_samples)]
            sampling = Sampling(response_limit(plan.task), pairs.temperature, pairs.seed)
            prompts = [row["prompt_ids"] for row, _ in asked]
            try:
                rollouts = sampler.sample(model_of(behaviour), stage.key, prompts, sampling)
            except EntryError as error:
                raise UserError(f"the responses of task.pairs cannot be drawn: {error}") from error
            table = [
                {
                    "id": content_id("drawn", row["id"], place),
                    "prompt_id": row["id"],
                    "place": place,
                    "prompt_ids": row["prompt_ids"],
                    "response_ids": rollout.response_ids,
                }
                for (row, place), rollout in zip(asked, rollouts, strict=True)
            ]
            write_rows(pa.Table.from_pylist(table, schema=DRAWN), folder / _SAMPLES / "part-0.parquet", DRAWN)
            costs = costs_of(time.perf_counter() - started, **generation_counts(model_of(behaviour), rollouts))
            counts = {"num_prompts": len(rows), "num_samples": len(rollouts)}
            counts["num_ended"] = sum(rollout.finished for rollout in rollouts)
            write_manifest(folder, {"data": counts, "costs": costs})
            sampler.forget(stage.key)


def _settings_of(plan: SeedPlan) -> DrawnPairs:
    if not isinstance(plan.task, TextTask) or plan.task.pairs is None:
        raise TypeError("the pairs of this task are not drawn")
    return plan.task.pairs


# --------------------------------------------------------------------------------------------------- labelling


def _label(config: Comparison, plan: SeedPlan, task: TextTask, pairs: DrawnPairs, folder: Path) -> None:
    """Write train_pairs/, test_pairs/, prompts/, demonstrations/, summary.json and the manifest to `folder`."""
    if plan.drawn is None:
        raise TypeError("drawn pairs have a stage of their responses")
    started = time.perf_counter()
    samples, all_prompts = read_rows(plan.drawn.folder / _SAMPLES), read_rows(plan.data.folder / "prompts")
    prompts = answered(samples, all_prompts, task.covered_share, pairs)
    kept = root_of(config.output, config.resources.cache_dir) / "rollouts" / plan.made_pairs.key
    contests, costs = _judge_all(config, plan, pairs, prompts, kept)
    tables, counts = make_pairs(prompts, contests, pairs)
    for split, table in tables.items():
        if not table.num_rows:
            raise UserError(
                f"task.pairs: no {split} pairs are left of {len(prompts)} prompts ({counts['ties']} ties); draw more "
                f"samples, or use a judge that distinguishes more responses"
            )
        write_rows(table, folder / f"{split}_pairs" / "part-0.parquet", PAIRS)
    _write_prompts(all_prompts, tables["train"], folder)
    _write_demonstrations(plan, samples, all_prompts, folder)
    summary = _summary(pairs, prompts, tables, counts, _covered(all_prompts, tables["train"]))
    write_json(folder / "summary.json", summary)
    wall = time.perf_counter() - started
    contents: dict[str, Any] = {
        "data": summary,
        "judges": [judge.model_dump(mode="json") for judge in pairs.judges(config.judge)],
    }
    contents["costs"] = costs_of(wall, **costs)
    write_manifest(folder, contents)
    if kept.is_dir():
        shutil.rmtree(kept)


def _judge_all(
    config: Comparison, plan: SeedPlan, pairs: DrawnPairs, prompts: list[Answered], kept: Path
) -> tuple[list[list[Contest]], Counter[str]]:
    """The contests of each prompt, by its annotator, and what they cost. Raises UserError as `_check_silence`."""
    contests: list[list[Contest]] = [[] for _ in prompts]
    costs: Counter[str] = Counter()
    for number, judge in enumerate(pairs.judges(config.judge)):
        own = [i for i, prompt in enumerate(prompts) if prompt.annotator == number]
        is_pairwise = isinstance(judge, PairwiseJudge)
        spec = judge_spec(plan, judge, plan.judge, may_be_silent=True)
        questions = _questions([prompts[i] for i in own], is_pairwise)
        values, paid = ask(questions, spec, config.resources, config.evaluation.batch_size, kept)
        costs += paid
        costs["num_labels"] += len(values)
        if isinstance(judge, RewardModel) and spec.path is not None:
            costs["num_flops"] += scoring_flops(questions, spec.path)
        costs["num_silent"] += _check_silence(values, pairs, judge.kind)
        start = 0
        for i in own:
            places = all_places(prompts[i])
            stop = start + (len(places) if is_pairwise else len(prompts[i].responses))
            its, start = values[start:stop], stop
            if is_pairwise:
                contests[i] = [Contest(*two, chance=float(v)) for two, v in zip(places, its, strict=True)]
            else:
                contests[i] = contests_of_scores(prompts[i], its, pairs)
    return contests, costs


def _questions(prompts: list[Answered], is_pairwise: bool) -> Questions:
    if is_pairwise:
        asked = [(prompt, i, j) for prompt in prompts for i, j in all_places(prompt)]
        first, second = [prompt.responses[i] for prompt, i, _ in asked], [prompt.responses[j] for prompt, _, j in asked]
        return Questions([prompt.prompt_ids for prompt, _, _ in asked], first, second)
    rows = [(prompt.prompt_ids, response) for prompt in prompts for response in prompt.responses]
    return Questions([prompt for prompt, _ in rows], [response for _, response in rows])


def _check_silence(values: np.ndarray, pairs: DrawnPairs, kind: str) -> int:
    """Count the values that are missing. Raises UserError where they are more than the settings allow."""
    number = int(np.isnan(values).sum())
    if number > pairs.max_silent_share * len(values):
        raise UserError(
            f"task.pairs: the judge `{kind}` gave {number} of {len(values)} rows no usable score, more than "
            f"max_silent_share {pairs.max_silent_share:g} allows; fix the judge or raise that share"
        )
    return number


def _summary(
    pairs: DrawnPairs, prompts: list[Answered], tables: dict[str, pa.Table], counts: Counter[str], num_covered: int
) -> dict[str, Any]:
    by_annotator = Counter(prompt.annotator for prompt in prompts)
    found = {f"num_{split}_pairs": table.num_rows for split, table in tables.items()}
    found |= {"num_covered_prompts": num_covered}
    found |= {"num_without_pairs": sum(prompt.split == "train" for prompt in prompts) - num_covered}
    found |= {"num_repeated": sum(prompt.num_repeated for prompt in prompts)}
    found |= {"num_ties": counts["ties"], "num_flipped": counts["flipped"]}
    who = [by_annotator[number] for number in range(len(pairs.annotators))]
    notes = [
        f"{found['num_train_pairs']:,} training pairs from {num_covered:,} prompts, and {found['num_test_pairs']:,} "
        f"test pairs; {found['num_repeated']:,} repeated responses and {found['num_ties']:,} ties were left out"
    ]
    if found["num_without_pairs"]:
        notes.append(f"{found['num_without_pairs']:,} prompts that should have pairs ended up with none")
    if found["num_flipped"]:
        notes.append(
            f"{found['num_flipped']:,} of the training pairs have chosen and rejected exchanged (task.pairs.flip_share)"
        )
    return {**found, "num_prompts_by_annotator": who, "notes": notes}


def _covered(prompts: pa.Table, train_pairs: pa.Table) -> int:
    return int(pc.sum(_is_covered(prompts, train_pairs)).as_py())


def _is_covered(prompts: pa.Table, train_pairs: pa.Table) -> pa.Array:
    """For each training prompt, whether it has a training pair."""
    with_pairs = {tuple(ids) for ids in train_pairs["prompt_ids"].to_pylist()}
    rows = prompts.select(["prompt_ids", "split"]).to_pylist()
    return pa.array([row["split"] == "train" and tuple(row["prompt_ids"]) in with_pairs for row in rows], pa.bool_())


def _write_prompts(prompts: pa.Table, train_pairs: pa.Table, folder: Path) -> None:
    place = prompts.schema.get_field_index("covered")
    table = prompts.set_column(place, "covered", _is_covered(prompts, train_pairs))
    write_rows(table, folder / "prompts" / "part-0.parquet", PROMPTS)


def _write_demonstrations(plan: SeedPlan, samples: pa.Table, prompts: pa.Table, folder: Path) -> None:
    """Write the data's answers where it has any; else the policy's own answers to the prompts to train on."""
    answers = plan.data.folder / "demonstrations"
    bring(answers)
    if answers.is_dir():
        table = read_rows(answers)
    else:
        train = prompts.filter(pc.equal(prompts["split"], "train"))["id"]
        rows = samples.filter(pc.is_in(samples["prompt_id"], train.combine_chunks())).to_pylist()
        own = {content_id(row["prompt_ids"], row["response_ids"]): row for row in rows}
        table = pa.Table.from_pylist([{**row, "id": name} for name, row in own.items()], schema=DEMONSTRATIONS)
    write_rows(table, folder / "demonstrations" / "part-0.parquet", DEMONSTRATIONS)


# ----------------------------------------------------------------------------------------------------- coverage


def _keep_covered(plan: SeedPlan, task: TextTask, folder: Path) -> None:
    """Write the tables of `data` without the training pairs of prompts that are not covered."""
    started, source = time.perf_counter(), plan.data.folder
    prompts, pairs = read_rows(source / "prompts"), read_rows(source / "train_pairs")
    train = prompts.filter(pc.equal(prompts["split"], "train"))
    covered = choose_covered(train["id"].to_pylist(), task.covered_share, task.split_seed)
    kept = [content_id(ids) in covered for ids in pairs["prompt_ids"].to_pylist()]
    table = pairs.filter(pa.array(kept, pa.bool_()))
    write_rows(table, folder / "train_pairs" / "part-0.parquet", PAIRS)
    _write_prompts(prompts, table, folder)
    for name, schema in (("test_pairs", PAIRS), ("demonstrations", DEMONSTRATIONS)):
        write_rows(read_rows(source / name), folder / name / "part-0.parquet", schema)
    summary: dict[str, Any] = {"num_train_pairs": table.num_rows, "num_covered_prompts": len(covered)}
    summary["notes"] = [
        f"{table.num_rows:,} of {pairs.num_rows:,} pairs are used for training: those of {len(covered):,} of "
        f"{train.num_rows:,} "
        "prompts (task.covered_share)"
    ]
    wall = time.perf_counter() - started
    write_manifest(folder, {"data": summary, "costs": costs_of(wall)})
