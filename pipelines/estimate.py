"""What will it cost? `prefarena estimate`: time, memory, tokens, FLOPs and money of every stage, before it runs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.addresses import learns_judge
from pipelines.calibrate import calibrate, tokenizer_of
from pipelines.checks import check_input
from pipelines.console import new_console
from pipelines.estimate_tables import beside_table, entry_table, stage_table
from pipelines.init_config import Hardware
from pipelines.jobs import longest, response_limit
from pipelines.memory import model_settings
from pipelines.preferences import prepare_tokenizer
from prefarena.cluster.needs import Lengths
from prefarena.config import Comparison, LanguageTask, PretrainedModel, load_config
from prefarena.data.counting import count_rows
from prefarena.data.first_rows import NUM_FIRST_ROWS, look_at_pairs, prompts_alone
from prefarena.data.splits import shares_of
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.estimate.hardware import Cards, parse_cards
from prefarena.estimate.lengths import Data, of_language, of_text
from prefarena.estimate.memory import held_by_trainings
from prefarena.estimate.result import Estimated, estimate
from prefarena.estimate.speeds import OnCards, Speeds, ThisMachine
from prefarena.estimate.stages import not_estimated, planned
from prefarena.estimate.trainings import Workload
from prefarena.report.results import load_results


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate. Returns the exit status."""
    if arguments.price is not None and arguments.price < 0:
        raise UserError(f"--price: an hour cannot cost {arguments.price:g}; give what one device costs for an hour")
    cards = parse_cards(arguments.gpus) if arguments.gpus else None
    config = load_config(arguments.config, arguments.set)
    console = new_console()
    results = load_results(arguments.beside) if arguments.beside else None
    console.print("looking at the settings, the data and the models …")
    check_input(config)
    if cards is not None:
        config, told = on_cards(config, cards)
        console.print(told, markup=False)
    with tempfile.TemporaryDirectory(prefix="prefarena-estimate-") as folder:
        stages = estimated(config, cards, Path(folder), lambda sentence: console.print(sentence, markup=False))
    console.print(stage_table(stages, arguments.price).rich())
    console.print(entry_table(stages, arguments.price).rich())
    if results is not None:
        console.print(beside_table(stages, results).rich())
    for sentence in not_estimated(config):
        console.print(f"Not in it: {sentence}.", markup=False)
    return 0


def estimated(config: Comparison, cards: Cards | None, folder: Path, say: Callable[[str], object]) -> list[Estimated]:
    """Every stage of the comparison, on these cards or, after a short timed run, on this machine."""
    data, trained_tokenizer = _data(config, folder)
    settings = model_settings(config)
    assert settings is not None  # `check_input` has told
    if trained_tokenizer is not None:
        settings.vocab_size = len(tokenizer_of(config, folder, trained_tokenizer))
    workload = Workload(config, settings, data, {}, response_limit(config.task))
    gib = cards.card.gib if cards else None
    memory = held_by_trainings(config, settings, Lengths(*longest(config.task)), workload.in_passes, card_gib=gib)
    workload = replace(workload, sizes={where: held.size for where, held in memory.items()})
    stages, speeds = planned(workload), OnCards(cards, config) if cards else None
    if speeds is None:
        tokenizer = tokenizer_of(config, folder, trained_tokenizer)
        calibrated = calibrate(config, workload, stages, memory, tokenizer, folder, say)
        speeds_here: Speeds = ThisMachine(calibrated.measured, config.generation.num_actors)
        if calibrated.response is not None:  # what it answers, rather than what the data answer
            stages = planned(replace(workload, data=_answering(data, calibrated.response)))
        return estimate(stages, speeds_here, memory)
    return estimate(stages, speeds, memory)


def _data(config: Comparison, folder: Path) -> tuple[Data, str | None]:
    """What there will be to train on; and the path of the tokenizer, where a new model needs one."""
    task = config.task
    if isinstance(task, LanguageTask):
        return of_language(task), None
    if task.pairs is not None or prompts_alone(task):
        raise UserError("task.pairs: the cost of drawn pairs is not estimated; remove the setting to see the rest")
    first, learns = look_at_pairs(task), learns_judge(config)
    shares = shares_of(task, first.parts, learns)
    trained = None
    if isinstance(config.model, PretrainedModel):
        tokenizer = Tokenizer.load(config.model.path, config.model.revision, task)
    else:
        few = task.model_copy(update={"max_rows": min(task.max_rows or NUM_FIRST_ROWS, NUM_FIRST_ROWS)})
        trained = prepare_tokenizer(few, config.model, folder / "tokenizer", shares)
        tokenizer = Tokenizer.load(trained, None, task)
    num_rows = count_rows(first.parts, task.max_row_bytes, task.max_rows)
    return of_text(config, task, first, tokenizer, num_rows, shares), trained


def _answering(data: Data, response: float) -> Data:
    """Prompts whose responses have so many tokens."""
    prompts = data.prompts
    own = np.full_like(prompts.responses, max(1, round(response)))
    return replace(data, prompts=replace(prompts, responses=own))


def on_cards(config: Comparison, cards: Cards) -> tuple[Comparison, str]:
    """The comparison laid out for so many cards, and how: as it is where it asks for GPUs, else as `init` does it.

    Raises UserError where it asks for more than there are.
    """
    resources, generation = config.resources, config.generation
    if resources.use_gpu:
        workers = resources.num_workers * resources.gpus_per_worker
        asked = workers + generation.num_actors * generation.tensor_parallel * generation.gpus
        if asked > cards.number + 1e-9:
            raise UserError(
                f"--gpus: the comparison asks for {asked:g} GPUs (resources.num_workers, generation.num_actors), and "
                f"{cards} has {cards.number}; give more, or lower these settings"
            )
        return config, f"on {cards}, laid out as the config says"
    hardware = Hardware(cards.number, cards.card.gib, 1)
    found = {"use_gpu": True, "num_workers": hardware.num_workers}
    engines = {"num_actors": max(1, cards.number - hardware.num_workers)}
    if cards.number == 1:
        shared, engine = {"gpus_per_worker": 0.5}, {"gpus": 0.5, "gpu_memory_utilization": 0.45, "weight_sync": "ipc"}
    else:
        shared, engine = {}, {"gpu_memory_utilization": 0.85, "weight_sync": "nccl"}
    laid_out = config.model_copy(
        update={
            "resources": resources.model_copy(update={**found, **shared}),
            "generation": generation.model_copy(update={**engines, **engine}),
        }
    )
    told = f"on {cards}: {hardware.num_workers} to train, {engines['num_actors']} to generate, as `init` lays it out"
    return laid_out, told if cards.number > 1 else f"on {cards}, which training and the engine share"
