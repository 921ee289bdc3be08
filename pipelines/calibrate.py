"""The short timed run behind an estimate for this machine: micro-batches, responses, reading and writing a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.jobs import max_length
from prefarena.cluster.needs import trainings
from prefarena.cluster.session import ray_session
from prefarena.config import Comparison, EvaluationJudge, LanguageTask, Optimisation, PretrainedModel
from prefarena.data.tables import write_rows
from prefarena.errors import JudgeError, UserError
from prefarena.estimate.beside_ray import beside_ray
from prefarena.estimate.calibration import Bench, Timed, keep_training, time_listing, time_scoring, time_training
from prefarena.estimate.company import company
from prefarena.estimate.lengths import Data
from prefarena.estimate.memory import Held
from prefarena.estimate.speeds import Curve, Measured
from prefarena.estimate.stages import Planned
from prefarena.estimate.trainings import Workload
from prefarena.estimate.work import Judging, Listing, Manner, Passes, Sampling, StageWork, Writing
from prefarena.generation.interface import Sampling as Sampler
from prefarena.judges.spec import JudgeSpec, load_judge
from prefarena.modeling.checks import quietly
from prefarena.modeling.load import load_policy, load_tokenizer, new_policy, new_reward_model, save_policy
from prefarena.records import PAIRS, Rollout
from prefarena.settings.optimisation import LearnerSettings
from prefarena.tasks.language import Language

#: Seconds that one timed pass, and one timed call of the engine, may take.
_PASS_S, _CALL_S = 6.0, 15.0
#: For what nobody can know about a future run: other load on the machine, responses of other lengths.
_LEAST_MARGIN = 0.25
#: Measured on two cores: Ray Data's actors import torch and transformers, and read a model.
_START_S = 4.0
_FEW = 8  # responses in the smaller call
_ROWS = 1000  # rows of the table that is written
_BUSY = 0.9  # share of a CPU below which the user is told


@dataclass(frozen=True)
class Calibrated:
    """responses: lengths of the model's answers in tokens, if they were seen; empty if other models will answer."""

    measured: Measured
    responses: tuple[int, ...]


def calibrate(
    config: Comparison,
    workload: Workload,
    stages: list[Planned],
    memory: dict[str, Held],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    say: Callable[[str], object],
) -> Calibrated:
    """Time what `stages` are made of; files go to `folder`. Starts Ray and an engine where the comparison generates."""
    model_folder, reading, writing = _files(config, tokenizer, folder)
    vocab_size = int(workload.settings.get_text_config(decoder=True).vocab_size)
    bench = Bench(
        workload.data.pairs, vocab_size, max_length(config.task), folder, config.resources.device,
        int(config.resources.cpus_per_worker), _PASS_S,
    )  # fmt: skip
    parts = [part for one in stages for _, part in (*one.work.parts, *one.work.alongside)]
    training, forward, steps, spreads, had = {}, {}, {}, [0.0], 1.0
    for manner, (settings, most) in _manners(config, workload.data, memory, stages).items():
        beside = f", {manner.processes} processes at a time" if manner.processes > 1 else ""
        say(f"timing training passes in {manner.precision}{beside} …")
        timed = _time(model_folder, settings, workload, most, bench, manner.processes)
        training[manner], forward[manner], steps[manner] = timed.training, timed.forward, timed.step
        spreads.append(timed.spread)
        had = min(had, timed.had)
    for manner in {part.manner for part in parts if isinstance(part, Passes)} - set(forward):
        say(f"timing scoring passes in {manner.precision} …")
        counts = workload.counts(manner.lora)
        forward[manner] = time_scoring(load_policy(model_folder), manner, counts, 64, bench)
    listing: dict[str, float] = {}
    if any(isinstance(part, Listing) for part in parts) and isinstance(config.task, LanguageTask):
        say("timing how long it takes to list every response …")
        listing = time_listing(load_policy(model_folder), new_reward_model(model_folder, 0), Language(config.task))
    engine: _Engine | None = None
    if calls := [part for part in parts if isinstance(part, Sampling)]:
        say("starting an engine, and timing a few responses …")
        # Timed by the clock, which includes other work on this machine: as much as there was a moment ago.
        engine = _time_engine(config, workload, calls, model_folder).times(had)
    judging: dict[EvaluationJudge, float] = {}
    for judge in {part.judge: None for part in parts if isinstance(part, Judging)}:
        say(f"timing the judge of kind {judge.kind} …")
        judging[judge] = had * _time_judge(judge, model_folder, config, engine.rollouts if engine else [])
    if had < _BUSY:
        say(f"this machine is busy: passes got {had:.0%} of a CPU; the seconds shown are those of an idle machine")
    margin = max(_LEAST_MARGIN, float(np.median(spreads)))
    measured = Measured(
        training, forward, steps, engine.sampling if engine else None, engine.sending if engine else 0.0,
        engine.loading if engine else 0.0, listing, reading, writing, judging,
        _time_row(folder) if any(isinstance(part, Writing) for part in parts) else 0.0,
        {"pool": _START_S, "engine": engine.starting if engine else 0.0}, margin,
    )  # fmt: skip
    known = engine is not None and isinstance(config.model, PretrainedModel) and not config.reference.train
    return Calibrated(measured, tuple(len(one.response_ids) for one in engine.rollouts) if known and engine else ())


def _files(config: Comparison, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[str, float, float]:
    """The model's folder, and the seconds that reading and writing it take."""
    if isinstance(config.model, PretrainedModel):
        made: PreTrainedModel = load_policy(config.model.path, config.model.revision)
    else:
        made = new_policy(config.model, tokenizer, max_length(config.task), config.reference.seed)
    started = time.perf_counter()
    with quietly():
        save_policy(made, tokenizer, folder / "model")
    writing = time.perf_counter() - started
    del made
    started = time.perf_counter()
    load_policy(folder / "model")
    return str(folder / "model"), time.perf_counter() - started, writing


def _manners(
    config: Comparison, data: Data, memory: dict[str, Held], stages: list[Planned]
) -> dict[Manner, tuple[LearnerSettings, int]]:
    """The ways that training runs compute, each with the settings of one such run and the pairs in its largest pass."""
    found: dict[Manner, tuple[LearnerSettings, int]] = {}
    of_stages = {one.work.memory: _manner(one.work) for one in stages if one.work.memory is not None}
    size = data.pairs.mean_prompt + 2 * data.pairs.mean_response
    for training in trainings(config):
        settings, held = training.settings, memory[training.where].size
        rows = held / 2 if training.on_policy else held / size
        share = settings.batch_size // config.resources.num_workers if isinstance(settings, Optimisation) else rows
        most = max(1, round(min(rows, share)))
        manner = of_stages[training.where]
        before = found.get(manner)
        found[manner] = (settings, max(most, before[1] if before else 0))
    return found


def _manner(work: StageWork) -> Manner:
    """How a training run's passes compute."""
    return next(part.manner for _, part in work.parts if isinstance(part, Passes) and part.backward)


def _time(folder: str, settings: LearnerSettings, workload: Workload, most: int, bench: Bench, processes: int) -> Timed:
    """Time training with these settings in one of so many processes; on-policy methods are timed on pairs, too."""
    names = LearnerSettings.model_fields
    plain = Optimisation(**{name: getattr(settings, name) for name in names})
    fills = bench.counts_own_time and processes >= workload.num_cpus
    ray = beside_ray(processes // workload.workers) if fills else nullcontext(lambda: 0.0)
    with ray as in_use, company(processes - 1, partial(keep_training, folder, plain, most, bench)):
        in_use()  # so far, it was for Ray's start
        timed = time_training(load_policy(folder), plain, workload.counts(settings.lora), most, bench)
        return timed.on(workload.num_cpus - in_use(), processes)


@dataclass(frozen=True)
class _Engine:
    """Seconds of calls by their tokens, of the start, of sending weights and of loading them; and the answers."""

    sampling: Curve
    starting: float
    sending: float
    loading: float
    rollouts: list[Rollout]

    def times(self, factor: float) -> _Engine:
        """The same with all seconds multiplied."""
        seconds = (factor * self.starting, factor * self.sending, factor * self.loading)
        return _Engine(self.sampling.times(factor), *seconds, self.rollouts)


def _time_engine(config: Comparison, workload: Workload, calls: list[Sampling], folder: str) -> _Engine:
    """Time the engine on the data's own prompts, since the length of an answer depends on the prompt."""
    from prefarena.generation.fleet import Generators

    model, prompts = load_policy(folder), workload.data.some_prompts
    most = max(_FEW, round(max(call.sequences for call in calls) / config.generation.num_actors))
    ids = [list(prompts[at % len(prompts)]) for at in range(most)]
    with ray_session():
        started = time.perf_counter()
        generators = Generators.start(
            folder, config.generation.model_copy(update={"num_actors": 1}), max_model_len=max_length(config.task),
            use_gpu=config.resources.use_gpu, names=("prefarena-estimate",), seed=0,
        )  # fmt: skip
        starting = time.perf_counter() - started
        try:
            generators.load_checkpoint(folder, "estimate@0")  # the first one is compared whole
            loading = _seconds(lambda: generators.load_checkpoint(folder, "estimate@1"))
            sending = _seconds(lambda: generators.sync(model.state_dict().items(), "estimate@2"))

            def sample(number: int, times: int = 2) -> tuple[float, float, list[Rollout]]:
                took: list[float] = []
                rollouts: list[Rollout] = []
                for at in range(times):
                    sampler = Sampler(workload.response_limit, 1.0, at)
                    started = time.perf_counter()
                    rollouts = generators.generate(ids[:number], sampler, "estimate@2")
                    took.append(time.perf_counter() - started)
                tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in rollouts)
                return float(tokens), min(took), rollouts

            sample(2, 1)
            tokens, seconds, rollouts = sample(_FEW)
            points = [(tokens, seconds)]
            larger = min(most, int(_FEW * max(1.0, _CALL_S / seconds)))
            if larger > _FEW:
                tokens, seconds, rollouts = sample(larger)
                points.append((tokens, seconds))
        finally:
            generators.stop()
    return _Engine(Curve(tuple(points)), starting, sending, loading, rollouts)


def _time_judge(judge: EvaluationJudge, folder: str, config: Comparison, rollouts: list[Rollout]) -> float:
    """Seconds to score a response, timed on the engine's own. Raises UserError if the judge cannot be used."""
    spec = JudgeSpec(judge, None, folder, arithmetic=config.scored_in, may_be_silent=True)
    scorer = load_judge(spec, config.evaluation.batch_size, config.resources.device)
    prompts, responses = [one.prompt_ids for one in rollouts], [one.response_ids for one in rollouts]
    try:
        scorer.score(prompts[:1], responses[:1])  # what is done only once
        return _seconds(lambda: scorer.score(prompts, responses)) / len(rollouts)
    except JudgeError as error:
        raise UserError(str(error)) from None


def _time_row(folder: Path) -> float:
    """Seconds to write a pair."""
    ids = list(range(32))
    row = {"id": "0" * 16, "prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "label": 1.0, "source": ""}
    table = [row | {"score_chosen": None, "score_rejected": None}] * _ROWS

    def write() -> None:
        write_rows(pa.Table.from_pylist(table, PAIRS), folder / "rows" / "part-0.parquet", PAIRS)

    return _seconds(write) / _ROWS


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def tokenizer_of(config: Comparison, folder: Path, trained: str | None) -> PreTrainedTokenizerBase:
    """The language's own tokenizer, the pretrained model's, or the one in `trained`, made for a new model."""
    if isinstance(config.task, LanguageTask):
        return Language(config.task).tokenizer()
    if isinstance(config.model, PretrainedModel):
        return load_tokenizer(config.model.path, config.model.revision)
    return load_tokenizer(trained or folder)
