"""What will it cost? `prefarena estimate`: time, memory, tokens, FLOPs and money of every stage, before it runs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.ability_counts import count_asked
from pipelines.asked_for import learns_judge
from pipelines.calibrate import Calibrated, calibrate, tokenizer_of
from pipelines.checks import check_input
from pipelines.console import new_console
from pipelines.estimate_tables import beside_table, entry_table, shown, stage_table
from pipelines.estimate_tune import first_trials, of_trials, with_trials
from pipelines.init_config import Hardware
from pipelines.jobs import longest, response_limit
from pipelines.memory import model_settings
from pipelines.preferences import prepare_tokenizer
from prefarena.cluster.needs import Lengths
from prefarena.config import Comparison, LanguageTask, PretrainedModel, load_config
from prefarena.data.counting import count_rows
from prefarena.data.first_rows import NUM_FIRST_ROWS, look_at_pairs, look_at_prompts, prompts_alone
from prefarena.data.splits import shares_of
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.estimate.hardware import Cards, parse_cards
from prefarena.estimate.lengths import Data, of_language, of_text
from prefarena.estimate.memory import Held, held_by_trainings
from prefarena.estimate.result import Estimated, device_hours, estimate, together
from prefarena.estimate.speeds import OnCards, ThisMachine
from prefarena.estimate.stages import not_estimated, planned
from prefarena.estimate.trainings import Workload
from prefarena.modeling.memory import MemoryNeed
from prefarena.report.results import load_results

#: Where the tokenizer of a new model of text is.
TOKENIZER = "tokenizer"
_TUNED = (
    "Trials of later batches are assumed to do the same work as those of the first batch, which are known, and the "
    "winners the work of the settings as they are now."
)


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate. Returns the exit status."""
    if arguments.tune and arguments.beside:
        raise UserError("--beside shows what a comparison took, but --tune is about trials; leave one of them out")
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
        estimator = Estimator(cards, Path(folder), lambda sentence: console.print(sentence, markup=False))
        stages = (estimator.of_tuning if arguments.tune else estimator.of)(config)
    console.print(stage_table(stages, arguments.price).rich())
    console.print(entry_table(stages, arguments.price).rich())
    if results is not None:
        console.print(beside_table(stages, results).rich())
    console.print(f"In total, with evaluations: {shown(device_hours(together(stages)))} device-hours.", markup=False)
    if arguments.tune:
        console.print(_TUNED, markup=False)
    for sentence in not_estimated(config, elsewhere=cards is not None):
        console.print(f"Not included: {sentence}.", markup=False)
    return 0


class Estimator:
    """Estimates comparisons on these cards or, after a short timed run, on this machine."""

    def __init__(self, cards: Cards | None, folder: Path, say: Callable[[str], object]) -> None:
        """folder: for files that come and go."""
        self._cards, self._folder, self._say = cards, folder, say
        self._needs: dict[Any, MemoryNeed | None] = {}

    def of(self, config: Comparison) -> list[Estimated]:
        """Every stage of the comparison."""
        workload = self._workload(config)
        return self._stages(workload, self._calibrated(workload))

    def of_tuning(self, config: Comparison) -> list[Estimated]:
        """Every stage of what `prefarena tune` does: of all trials, and of the comparison of the winners."""
        workload = self._workload(config)
        trials = first_trials(config, workload)
        tried = self._workload(of_trials(config, trials))
        entries = (*tried.config.entries, *config.entries)
        both = replace(tried, config=tried.config.model_copy(update={"entries": entries}))
        calibrated = self._calibrated(both)
        return with_trials(config, trials, self._stages(tried, calibrated), self._stages(workload, calibrated))

    def _workload(self, config: Comparison) -> Workload:
        data, trained_tokenizer = _data(config, self._folder)
        settings = model_settings(config)
        assert settings is not None  # `check_input` has told
        if trained_tokenizer is not None:
            settings.vocab_size = len(tokenizer_of(config, self._folder, trained_tokenizer))
        if config.evaluation.abilities is not None:
            length = int(settings.get_text_config(decoder=True).max_position_embeddings)
            tokenizer = tokenizer_of(config, self._folder, trained_tokenizer)
            data = replace(data, abilities=count_asked(config.evaluation.abilities, tokenizer, length))
        return Workload(config, settings, data, {}, response_limit(config.task))

    def _calibrated(self, workload: Workload) -> Calibrated | None:
        """How long the parts of the workload take on this machine; None if the estimate is for other hardware."""
        if self._cards is not None:
            return None
        config, (sized, memory) = workload.config, self._sized(workload)
        made = self._folder / TOKENIZER
        tokenizer = tokenizer_of(config, self._folder, str(made) if made.is_dir() else None)
        return calibrate(config, sized, planned(sized), memory, tokenizer, self._folder, self._say)

    def _stages(self, workload: Workload, calibrated: Calibrated | None) -> list[Estimated]:
        if calibrated is not None and calibrated.responses:
            # As long as the model's own answers, rather than as the data's, or as the limit.
            workload = replace(workload, data=workload.data.answered(calibrated.responses))
        workload, memory = self._sized(workload)
        if self._cards is not None:
            return estimate(planned(workload), OnCards(self._cards, workload.config), memory)
        assert calibrated is not None
        speeds = ThisMachine(calibrated.measured, workload.config.generation.num_actors)
        return estimate(planned(workload), speeds, memory)

    def _sized(self, workload: Workload) -> tuple[Workload, dict[str, Held]]:
        """The workload with the pass sizes that training runs will choose, and the memory that they need for them."""
        config, cards = workload.config, self._cards
        gib, most = cards.card.gib if cards else None, Lengths(*longest(config.task))
        lengths, number = workload.in_passes, workload.in_one_pass
        memory = held_by_trainings(config, workload.settings, most, lengths, number, self._needs, card_gib=gib)
        return replace(workload, sizes={where: held.size for where, held in memory.items()}), memory


def _data(config: Comparison, folder: Path) -> tuple[Data, str | None]:
    """What there will be to train on, and the path of the tokenizer if a new model needs one."""
    task = config.task
    if isinstance(task, LanguageTask):
        return of_language(task), None
    alone, learns = prompts_alone(task), learns_judge(config)
    first = look_at_prompts(task) if alone else look_at_pairs(task)
    shares = shares_of(task, first.parts, learns)
    trained = None
    if isinstance(config.model, PretrainedModel):
        tokenizer = Tokenizer.load(config.model.path, config.model.revision, task)
    else:
        few = task.model_copy(update={"max_rows": min(task.max_rows or NUM_FIRST_ROWS, NUM_FIRST_ROWS)})
        trained = prepare_tokenizer(few, config.model, folder / TOKENIZER, shares)
        tokenizer = Tokenizer.load(trained, None, task)
    num_rows = count_rows(first.parts, task.max_row_bytes, task.max_rows)
    return of_text(config, task, first, tokenizer, num_rows, shares, answers=not alone), trained


def on_cards(config: Comparison, cards: Cards) -> tuple[Comparison, str]:
    """The comparison laid out for these cards, and a note on how: unchanged if it asks for GPUs, else as `init` would.

    Raises UserError if it asks for more GPUs than there are.
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
    told = f"on {cards}: {hardware.num_workers} train and {engines['num_actors']} generate, the way `init` lays it out"
    return laid_out, told if cards.number > 1 else f"on {cards}, which training and the engine share"
