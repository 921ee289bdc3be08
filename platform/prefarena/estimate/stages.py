"""The work of every stage of a comparison, under the names in the report's table of costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prefarena.config import (
    BestOfN,
    Comparison,
    Entry,
    EvaluationJudge,
    LanguageTask,
    OffPolicyMethod,
    OnPolicyMethod,
    Pairwise,
    PairwiseJudge,
    RewardModel,
    TextTask,
    reward_of,
)
from prefarena.estimate.lengths import Asked
from prefarena.estimate.trainings import Named, Workload
from prefarena.estimate.work import Files, Listing, Raw, Sending, StageWork, Start, Writing
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.passes import NOTHING, Pass
from prefarena.settings.unpaired import Unpaired

#: The samples that an evaluation draws in one call.
_PART_ROLLOUTS = 256
#: In which training pairs are scored where no entry learns from them.
_LEAST_PRECISION: Arithmetic = "float32"


@dataclass(frozen=True)
class Planned:
    """A stage of an entry, for each of the comparison's seeds; `entry` is None for a stage that all entries share.

    times: how often it is done in the comparison.
    """

    stage: str
    entry: str | None
    work: StageWork
    times: int = 1

    @property
    def is_evaluation(self) -> bool:
        """Whether the stage measures a policy, which is not part of its method's cost."""
        return self.stage.startswith("eval")


def planned(workload: Workload) -> list[Planned]:
    """All stages, shared ones first."""
    return [*_shared(workload), *(one for entry in workload.config.entries for one in _of_entry(workload, entry))]


def not_estimated(config: Comparison, *, elsewhere: bool) -> list[str]:
    """What the estimate leaves out, one phrase each. elsewhere: it is for named hardware, where nothing is timed."""
    found, task = list[str](), config.task
    judges: list[EvaluationJudge] = _rewards(config)
    if isinstance(task, TextTask):
        judges += [config.judge, *(task.pairs.judges(config.judge) if task.pairs else [])]
    own = {"function", "classifier"}
    kinds = {judge.kind for judge in judges}
    if unknown := kinds & ({"endpoint", "pairwise"} | (own if elsewhere else set())):
        found.append(
            f"the time of judges of kind {' and '.join(sorted(unknown))}, which is not known and counts as zero"
        )
    if kinds & own and not isinstance(task, TextTask):
        found.append("scoring all responses of the language by a function or a classifier")
    if isinstance(task, TextTask) and task.pairs is not None:
        if task.pairs.policy is not None:
            found.append(
                "how task.pairs.policy differs from the comparison's model: it is taken to be as large and as wordy"
            )
        found.append("that repeated responses and ties make no pairs: there may be fewer pairs than are counted here")
    found.append("the start of Ray and of workers, which belongs to no stage: about half a minute per command, on CPUs")
    return found


def _rewards(config: Comparison) -> list[EvaluationJudge]:
    return [keyed[1] for entry in config.entries if (keyed := reward_of(entry.method)) is not None]


def _shared(workload: Workload) -> Iterator[Planned]:
    config, data, size = workload.config, workload.data, workload.plain.parameters
    task, seeds = config.task, len(config.seeds) if config.seeds_vary == "task" else 1
    language = isinstance(task, LanguageTask)
    raw = Raw(data.row_seconds * data.num_raw, 1)
    yield Planned("data", None, StageWork((("rows", raw), *([] if language else [("start", Start())]))), seeds)
    written = 1 if config.model.kind == "scratch" else 0
    yield Planned("base", None, StageWork((("files", Files(1 - written, written, size)),)), seeds)
    if config.reference.train:
        training = config.reference.training
        rows = data.demonstrations
        if config.reference.loss_on == "all":
            # Every token but the first is scored: a prompt of one token, and the rest as its response.
            rows = type(rows)(rows.number, 0 * rows.prompts + 1, rows.responses + rows.prompts[:, None] - 1)
        work = workload.on_table([("demonstrations", rows)], training, "reference.training")
        yield Planned("reference", None, work, seeds)
    if isinstance(task, LanguageTask):
        yield Planned("pairs", None, StageWork((("listing", Listing("reference", task.num_prompts)),)), seeds)
    else:
        yield from _pairs(workload, task)
    yield from _reference_scores(workload)
    if not language:
        yield from _text_shared(workload)
    yield Planned("evaluation (reference)", None, _evaluation(workload, None), seeds)
    if data.abilities is not None:
        yield Planned("evaluation (abilities)", None, _abilities(workload, data.abilities), seeds)


def _reference_scores(workload: Workload) -> Iterator[Planned]:
    """The stages of the reference's log-probs: one for each arithmetic that entries train in.

    Training pairs are scored in that arithmetic, test pairs in that of evaluations, each kind by a pool of its own.
    """
    config, data = workload.config, workload.data
    methods = [one.method for one in config.entries if isinstance(one.method, OffPolicyMethod)]
    pairwise = {one.training.precision for one in methods if not isinstance(one, Unpaired)}
    for precision in sorted(pairwise) or [_LEAST_PRECISION]:
        both = [(data.pairs.passed(), precision), (data.test_pairs.passed(), config.scored_in)]
        yield Planned("logps", None, _scoring(workload, both))
    for precision in sorted({one.training.precision for one in methods if isinstance(one, Unpaired)}):
        # Each of the two responses is scored beside one to another prompt, which is about as long as its own.
        yield Planned("responses", None, _scoring(workload, [(data.pairs.passed().times(2), precision)]))
    shared = {one.training.precision for one in methods if isinstance(one, Pairwise) and one.needs_shared}
    for precision in sorted(shared):
        yield Planned("shared_logps", None, _scoring(workload, [(data.pairs.cut_to_shorter().passed(), precision)]))


def _scoring(workload: Workload, tables: Iterable[tuple[Pass, Arithmetic]]) -> StageWork:
    """Tables of pairs that are scored by Ray Data's actors, a pool for each arithmetic."""
    by_arithmetic: dict[Arithmetic, Pass] = {}
    for through, arithmetic in tables:
        by_arithmetic[arithmetic] = by_arithmetic.get(arithmetic, NOTHING).plus(through)
    parts: list[Named] = []
    for arithmetic, through in by_arithmetic.items():
        parts += [("start", Start()), ("passes", workload.scored(through, arithmetic=arithmetic))]
    return StageWork(tuple(parts))


def _pairs(workload: Workload, task: TextTask) -> Iterator[Planned]:
    """The stages of pairs that are not simply the data's: they are drawn and labelled, or some are left out."""
    config, data, settings = workload.config, workload.data, task.pairs
    written = ("writing", Writing(data.pairs.number + data.test_pairs.number))
    if settings is not None and data.drawn is not None:
        if settings.policy is not None:
            yield Planned("behaviour", None, StageWork((("files", Files(1, 0, workload.plain.parameters)),)))
        calls = math.ceil(data.drawn.number / _PART_ROLLOUTS)
        parts: list[Named] = [("start", Start("engine")), ("sync", _loading(workload))]
        parts.append(("generate", workload.sampling(calls, data.drawn.number / calls)))
        yield Planned("drawn", None, StageWork(tuple(parts), generated=data.drawn.passed().scored))
        parts, judges = [], settings.judges(config.judge)
        for judge in judges:  # each orders the responses to its share of the prompts, in a pool of its own
            number = data.num_labelled / len(judges)
            labelled = data.drawn.passed().times(number / data.drawn.number)
            scoring = workload.judging(judge, labelled, number, _num_scorers(config))
            parts += [("start", Start()), *(("labels", part) for part in scoring)]
        yield Planned("pairs", None, StageWork((*parts, written)))
    elif task.covered_share < 1:
        yield Planned("pairs", None, StageWork((written,)))
    if task.validation_share is not None:
        yield Planned("validation", None, StageWork((written,)))


def _num_scorers(config: Comparison) -> int:
    return config.resources.scoring.num_actors or config.resources.num_workers


def _text_shared(workload: Workload) -> Iterator[Planned]:
    config, settings = workload.config, workload.config.evaluation
    judged = isinstance(config.judge, RewardModel)
    number = settings.num_reference_samples
    if judged or any(isinstance(reward, RewardModel) for reward in _rewards(config)):
        parts = (("sync", _loading(workload)), ("generate", workload.sampling(1, number)))
        generated = number * workload.data.prompts.mean_response
        yield Planned("reference_samples", None, StageWork(parts, generated=generated))
    if isinstance(config.judge, RewardModel):
        work = workload.reward_model(config.judge, workload.data.judge, "judge.training", number, shared=True)
        yield Planned("judge", None, work)
    if settings.frontier_samples:
        sequences = settings.num_prompts * settings.frontier_samples
        parts_of = [("sync", _loading(workload)), *_samples(workload, sequences)]
        generated = sequences * workload.data.prompts.mean_response
        yield Planned("evaluation (frontier)", None, StageWork(tuple(parts_of), generated=generated))


def _of_entry(workload: Workload, entry: Entry) -> Iterator[Planned]:
    config, method, where = workload.config, entry.method, f"entries.{entry.name}.method"
    seeds, language = len(config.seeds), isinstance(config.task, LanguageTask)
    key, reward = reward_of(method) or ("", None)
    if isinstance(reward, RewardModel):
        samples = 64 * workload.data.prompts.number if language else config.evaluation.num_reference_samples
        work = workload.reward_model(reward, workload.data.pairs, f"{where}.{key}.training", samples)
        yield Planned("reward model", entry.name, work, seeds)
    if isinstance(method, OffPolicyMethod):
        yield Planned("training", entry.name, workload.off_policy(method, f"{where}.training"), seeds)
    elif isinstance(method, OnPolicyMethod):
        yield Planned("training", entry.name, workload.on_policy(method, f"{where}.training"), seeds)
    if isinstance(config.task, LanguageTask) and isinstance(reward, RewardModel) and key == "reward":
        work = StageWork((("listing", Listing("scores", config.task.num_prompts)),))
        yield Planned("evaluation (scores of all responses)", entry.name, work, seeds)
    yield Planned("evaluation", entry.name, _evaluation(workload, entry), seeds)
    if workload.data.abilities is not None and not isinstance(method, BestOfN):  # that one has no policy of its own
        yield Planned("evaluation (abilities)", entry.name, _abilities(workload, workload.data.abilities), seeds)
    num_snapshots = getattr(getattr(method, "training", None), "num_snapshots", 0)
    if num_snapshots and not language and not isinstance(config.judge, PairwiseJudge):
        yield Planned("evaluation (snapshots)", entry.name, _snapshot(workload, entry), seeds * num_snapshots)
    if not language and isinstance(config.judge, PairwiseJudge):
        yield Planned("evaluation (pairs)", entry.name, StageWork(()), seeds)


def _evaluation(workload: Workload, entry: Entry | None) -> StageWork:
    """The evaluation of an entry or of the reference."""
    config, settings = workload.config, workload.config.evaluation
    method = None if entry is None else entry.method
    if isinstance(config.task, LanguageTask):
        policies = 1 + getattr(getattr(method, "training", None), "num_snapshots", 0)
        if isinstance(method, BestOfN):
            return StageWork(())
        return StageWork((("listing", Listing("policy", policies * config.task.num_prompts)),))
    starts: list[Named] = [("start", Start("engine"))] if entry is None else []  # it is sampled first
    best_of = method.n if isinstance(method, BestOfN) else 1
    held_out = sequences = settings.num_prompts * settings.samples_per_prompt
    if config.task.kind == "text" and config.task.covered_share < 1:
        others = settings.num_prompts if settings.num_coverage_prompts is None else settings.num_coverage_prompts
        sequences += 2 * others * settings.samples_per_prompt
    drawn = sequences * best_of
    parts = [*starts, ("sync", _loading(workload)), *_samples(workload, drawn, judged=sequences)]
    generated = drawn * workload.data.prompts.mean_response
    if isinstance(method, BestOfN):
        every = workload.data.prompts.single().taking(drawn).passed()
        parts += [("reward", part) for part in workload.judging(method.reward, every, drawn)]
        return StageWork(tuple(parts), generated=generated)
    samples = workload.data.prompts.single().taking(sequences).passed()
    pairs = workload.data.test_responses.passed()
    size = settings.batch_size * (samples.tokens / sequences)
    # Along samples of both, an entry's log-probs come with its divergences.
    own = samples.times(held_out / sequences) if entry is None else NOTHING
    parts.append(("log-probs", workload.scored(own.plus(pairs), size=size)))
    parts.append(("files", Files(2, 0, workload.plain.parameters)))
    if entry is not None:
        parts += _by_proxy(workload, entry, sequences + held_out)  # held-out samples of the reference, too
        parts.append(("divergences", workload.scored(samples.times(4))))
    return StageWork(tuple(parts), generated=generated)


def _by_proxy(workload: Workload, entry: Entry, number: int) -> list[Named]:
    """So many samples scored by the reward that an entry learned from, where evaluations do so."""
    proxy = workload.config.proxy_of(entry.method)
    if proxy is None:
        return []
    scored = workload.data.prompts.single().taking(number).passed()
    return [("proxy", part) for part in workload.judging(proxy, scored, number)]


def _snapshot(workload: Workload, entry: Entry) -> StageWork:
    """The evaluation of a text policy on the way: its samples on held-out prompts, and divergences along them."""
    settings, prompts = workload.config.evaluation, workload.data.prompts
    sequences = settings.num_prompts * settings.samples_per_prompt
    samples = prompts.single().taking(sequences).passed()
    files = Files(2, 0, workload.plain.parameters)
    along = workload.scored(samples.times(2))
    parts = [("sync", _loading(workload)), *_samples(workload, sequences), *_by_proxy(workload, entry, sequences)]
    parts += [("files", files), ("divergences", along)]
    return StageWork(tuple(parts), generated=sequences * prompts.mean_response)


def _abilities(workload: Workload, asked: Asked) -> StageWork:
    """lm-eval's tasks on one policy, or on the reference."""
    parts: list[Named] = [("files", Files(1, 0, workload.plain.parameters))]
    generated, scored = 0.0, asked.scored
    if scored.number:
        size = workload.config.evaluation.batch_size * (scored.mean_prompt + scored.mean_response)
        parts.append(("log-probs", workload.scored(scored.passed(), size=size)))
    if asked.answered.number:
        number, limit = asked.answered.number, asked.answered.longest[1]
        parts += [("sync", _loading(workload)), ("generate", workload.answering(asked.answered, limit, 1, number))]
        generated = asked.answered.passed().scored
    return StageWork(tuple(parts), generated=generated)


def _samples(workload: Workload, sequences: int, *, judged: int | None = None) -> list[Named]:
    """Responses drawn in parts and judged: all of them, or a given number."""
    calls = math.ceil(sequences / _PART_ROLLOUTS)
    parts: list[Named] = [("generate", workload.sampling(calls, sequences / calls))]
    number = sequences if judged is None else judged
    drawn = workload.data.prompts.single().taking(number).passed()
    return [*parts, *(("judge", part) for part in workload.judging(workload.config.judge, drawn, number))]


def _loading(workload: Workload) -> Sending:
    return Sending(1, workload.plain.parameters, read=True)
