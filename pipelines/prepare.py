"""Everything that entries share: data, base model, reference policy, pairs, reference log-probs, judge."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipelines.annotate import annotate_language
from pipelines.asked_for import learns_judge
from pipelines.demonstrations import make_demonstrations
from pipelines.drawn_pairs import make_drawn_pairs
from pipelines.engine import try_engine
from pipelines.jobs import judge_job, max_length, reference_job
from pipelines.pair_scores import check_pair_scores
from pipelines.plan import SeedPlan, model_of
from pipelines.preferences import prepare_text
from pipelines.prompts import prepare_prompt_rows
from pipelines.reference import add_reference_logps
from pipelines.reference_samples import draw_reference_samples
from pipelines.responses import add_responses
from pipelines.runner import require, run, run_once
from pipelines.shared_lengths import add_shared_logps
from pipelines.validation import RESPONSES, set_aside
from prefarena.cluster.waiting import Failed, get_within, outcomes_within
from prefarena.config import Comparison, LanguageTask, PretrainedModel, ScratchModel, TextTask
from prefarena.data.first_rows import prompts_alone
from prefarena.data.tables import write_rows
from prefarena.errors import UserError
from prefarena.mirror import mirror_of, root_of, workspace
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.folders import whole_folder
from prefarena.modeling.load import base_model, load_tokenizer, new_policy, save_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.records import DEMONSTRATIONS, PROMPTS
from prefarena.stage_files import MODEL
from prefarena.stages import costs_of, write_manifest
from prefarena.tasks.language import Language


def prepare(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Run the shared stages that are not finished. Needs Ray."""
    said: set[Path] = set()
    for plan in plans:
        write_data = partial(_write_data, config, plan.task, console)
        run_once(console, plan.data, write_data, "the rows to be read and tokenised")
        if plan.data.folder not in said:
            said.add(plan.data.folder)
            for note in plan.data.manifest()["data"].get("notes", []):
                console.print(f"data: {escape(note)}")
        run_once(console, plan.base, partial(_write_base, config, plan), "a process that makes the model ready")
        for note in plan.base.manifest()["notes"]:
            console.print(f"the model trains on a slower path: {note}")
    try_engine(config, plans, console)
    if config.reference.train:
        run(config.resources, [reference_job(config, plan) for plan in plans], config, console)
        require([plan.reference for plan in plans])
    if any(plan.drawn for plan in plans):
        _learn_judges(config, plans, console)  # which may label pairs
        for plan in plans:
            if plan.behaviour is not None:
                write_other = partial(_write_behaviour, config, plan)
                run_once(console, plan.behaviour, write_other, "a process that makes the model ready")
    make_drawn_pairs(config, plans, console)
    for plan in plans:
        if isinstance(plan.task, TextTask) and plan.undivided is not None:
            divide = partial(_set_aside, plan, plan.task)
            run_once(console, plan.pairs, divide, "prompts to be set aside to tune on")
        if isinstance(plan.task, LanguageTask):
            drawn = "pairs to be drawn from the reference policy and labelled"
            run_once(console, plan.pairs, partial(_write_pairs, config, plan.task, plan), drawn)
    check_pair_scores(config, plans)
    make_demonstrations(config, plans, console)
    for plan in plans:
        scored = "scoring processes to start, and to score every pair by the reference policy"
        for arithmetic, stage in plan.scored.items():
            run_once(console, stage, partial(_write_logps, config, plan, arithmetic), scored)
        for arithmetic, stage in plan.shared_lengths.items():
            run_once(console, stage, partial(_write_shared_logps, config, plan, arithmetic), scored)
        for arithmetic, stage in plan.responses.items():
            run_once(console, stage, partial(_write_responses, config, plan, arithmetic), scored)
    _learn_judges(config, plans, console)


def _learn_judges(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Finish what learned rewards are normalised on, and the judge where it is a learned one."""
    draw_reference_samples(config, plans, console)
    run(config.resources, [judge_job(config, plan, plan.judge) for plan in plans if plan.judge], config, console)
    require([plan.judge for plan in plans if plan.judge])


def _write_data(config: Comparison, task: LanguageTask | TextTask, console: Console, folder: Path) -> None:
    started = time.perf_counter()
    if isinstance(task, LanguageTask):
        language = Language(task)
        language.save_tokenizer(folder / "tokenizer")
        write_rows(language.prompts(), folder / "prompts" / "part-0.parquet", PROMPTS)
        demonstrations = language.sample_demonstrations()
        write_rows(demonstrations, folder / "demonstrations" / "part-0.parquet", DEMONSTRATIONS)
        counts = {"num_demonstrations": demonstrations.num_rows}
    else:

        def say(sentence: str) -> None:
            console.print(f"data: {escape(sentence)}")

        if isinstance(config.model, PretrainedModel) and prompts_alone(task):
            counts = prepare_prompt_rows(task, config.model, folder, say=say)
        else:
            counts = prepare_text(task, None, config.model, folder, learns_judge=learns_judge(config), say=say)
    write_manifest(folder, {"data": counts, "costs": costs_of(time.perf_counter() - started)})


def _write_base(config: Comparison, plan: SeedPlan, folder: Path) -> None:
    _write_model(config, plan, config.model, "the base model", folder)


def _write_behaviour(config: Comparison, plan: SeedPlan, folder: Path) -> None:
    if not isinstance(plan.task, TextTask) or plan.task.pairs is None or plan.task.pairs.policy is None:
        raise TypeError("pairs come from the reference here")
    _write_model(config, plan, plan.task.pairs.policy, "the model of task.pairs.policy", folder)


def _write_model(
    config: Comparison, plan: SeedPlan, settings: PretrainedModel | ScratchModel, what: str, folder: Path
) -> None:
    import ray
    import ray.exceptions

    tokenizer = plan.data.folder / "tokenizer"
    task = ray.remote(num_cpus=1)(write_base)
    running = task.remote(settings, str(tokenizer), max_length(plan.task), config.reference.seed, folder)
    try:
        [outcome] = outcomes_within([running], config.resources.task_timeout_s, f"{what} to be made ready")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # one sentence, without the task's traceback
            raise UserError(str(error.cause)) from None
        raise
    if isinstance(outcome, Failed):
        raise UserError(f"{what} cannot be made ready: {outcome.reason}")


def write_base(
    settings: PretrainedModel | ScratchModel, tokenizer_path: str, length: int, seed: int, folder: Path
) -> None:
    """Write the base model and the manifest to `folder`. Runs in a Ray task, so that the driver holds no model.

    A model that is a whole folder of its own is referred to; one from the hub, an adapter merged into its base, and
    every model where `output` is on object storage, are written.
    tokenizer_path: of a model from scratch. length: most tokens of a prompt and its response.
    """
    started = time.perf_counter()
    workspace(folder)
    if isinstance(settings, PretrainedModel):
        tokenizer = load_tokenizer(settings.path, settings.revision)
        model = base_model(settings, length)
    else:
        tokenizer = load_tokenizer(tokenizer_path)
        model = new_policy(settings, tokenizer, length, seed)
    whole = whole_folder(settings.path) if isinstance(settings, PretrainedModel) else None
    if whole is not None and mirror_of(folder) is None:
        (folder / MODEL).symlink_to(whole, target_is_directory=True)
    else:
        save_policy(model, tokenizer, folder / MODEL)
    notes = LogProbs(model, length).notes
    costs = costs_of(time.perf_counter() - started)
    write_manifest(folder, {"num_parameters": model.num_parameters(), "notes": notes, "costs": costs})


def _write_pairs(config: Comparison, task: LanguageTask, plan: SeedPlan, folder: Path) -> None:
    import ray

    annotate = ray.remote(num_cpus=1)(annotate_language)
    running = [annotate.remote(task, model_of(plan.reference), folder)]
    get_within(running, config.resources.task_timeout_s, "pairs to be drawn from the reference policy and labelled")


def _set_aside(plan: SeedPlan, task: TextTask, folder: Path) -> None:
    if plan.undivided is None:
        raise TypeError("nothing is set aside of this task")
    singles = plan.data.folder / RESPONSES if task.unpaired_data is not None else None
    set_aside(task, plan.undivided.folder, singles, folder)


def _write_logps(config: Comparison, plan: SeedPlan, arithmetic: Arithmetic, folder: Path) -> None:
    add_reference_logps(
        plan.pairs.folder,
        model_of(plan.reference),
        folder,
        arithmetic=arithmetic,
        scored_in=config.scored_in,
        **_scoring(config, plan),
    )


def _write_shared_logps(config: Comparison, plan: SeedPlan, arithmetic: Arithmetic, folder: Path) -> None:
    scored, reference = plan.scored[arithmetic].folder, model_of(plan.reference)
    add_shared_logps(scored, reference, folder, arithmetic=arithmetic, **_scoring(config, plan))


def _write_responses(config: Comparison, plan: SeedPlan, arithmetic: Arithmetic, folder: Path) -> None:
    reference = model_of(plan.reference)
    add_responses(plan.pairs.folder, plan.singles, reference, folder, arithmetic=arithmetic, **_scoring(config, plan))


def _scoring(config: Comparison, plan: SeedPlan) -> dict[str, Any]:
    """The settings for scores by the reference policy, and the folder in which finished ones are kept."""
    cache = root_of(config.output, config.resources.cache_dir) / "reference_logps"
    return {"cache": cache, "resources": config.resources, "max_length": max_length(plan.task)}
