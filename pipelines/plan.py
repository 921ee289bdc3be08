"""The stages of a comparison, named and addressed by everything that their results depend on. No work is done here.

    data ─▶ base ─▶ reference ─▶ pairs ─┬▶ logps ─┬─▶ one training stage per entry and seed ─▶ evaluation
                                        │         └─▶ reward model ─▶ PPO ──────────────────▶ evaluation
                                        │         └─▶ shared_logps ─▶ training with a tail_weight (LD-DPO)
                                        └▶ responses ─▶ training of a method on single responses

For text tasks `pairs` is `data`, unless they are drawn from a policy (`task.pairs`) or not all prompts have some
(`task.covered_share`); `validation` is behind it where prompts are set aside to tune on. For the enumerable language
pairs are drawn from the reference policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipelines.addresses import (
    computing_inputs,
    data_inputs,
    demonstration_inputs,
    demonstration_stage,
    engine_inputs,
    evaluation_inputs,
    judge_inputs,
    model_inputs,
    tokenizer_inputs,
    watching_function,
)
from pipelines.asked_for import is_pairwise, learns_a_reward, needs_shared
from prefarena.config import (
    BestOfN,
    Comparison,
    EndpointJudge,
    Entry,
    EvaluationJudge,
    FunctionJudge,
    GoldJudge,
    LanguageTask,
    OffPolicyMethod,
    OnPolicyMethod,
    RewardModel,
    TextTask,
    reward_of,
)
from prefarena.mirror import root_of
from prefarena.modeling.arithmetic import Arithmetic, named
from prefarena.settings.off_policy import Pairwise
from prefarena.settings.unpaired import Unpaired
from prefarena.stage_files import MODEL
from prefarena.stages import Stage


@dataclass(frozen=True)
class Trained:
    """An entry at a seed, as stages.

    reward_model: before methods that learn their reward. training: none for best-of-n, which has no policy of its own.
    scores: on the enumerable language, the exact table of a reward that is not the gold one. wins: the comparison with
    the reference, where the judge is a pairwise one. replayed: the entry whose pairs it is trained on. on_the_way: the
    evaluations of its snapshots from samples, in their order; exact ones are parts of `evaluation`.
    """

    entry: Entry
    seed: int
    reward_model: Stage | None
    training: Stage | None
    scores: Stage | None
    evaluation: Stage
    wins: Stage | None = None
    replayed: Trained | None = None
    on_the_way: tuple[Stage, ...] = ()

    def stages(self) -> list[Stage]:
        """All stages, in order."""
        own = (self.reward_model, self.training, self.scores, self.evaluation, self.wins)
        return [*(stage for stage in own if stage), *self.on_the_way]

    @property
    def learned_from(self) -> Stage | None:
        """The reward model whose scores, or whose labels, its policy was trained on."""
        return self.replayed.reward_model if self.replayed else self.reward_model

    @property
    def training_failure(self) -> str | None:
        """Why there is no policy; None where there is one or may yet be one."""
        if self.reward_model is not None and self.reward_model.failure:
            return f"its reward model failed: {self.reward_model.failure}"
        if self.replayed is not None and (why := self.replayed.training_failure):
            return f"the training whose pairs it replays failed: {why}"
        return self.training.failure if self.training is not None else None

    @property
    def failure(self) -> str | None:
        """Why there is no policy, or none that could be measured; None where a result exists or may yet exist."""
        if why := self.training_failure:
            return why
        if self.scores is not None and self.scores.failure:
            return f"its reward could not score every response: {self.scores.failure}"
        if self.wins is not None and self.wins.failure:
            return f"its comparison with the reference failed: {self.wins.failure}"
        return f"its evaluation failed: {self.evaluation.failure}" if self.evaluation.failure else None


@dataclass(frozen=True)
class SeedPlan:
    """All stages of one seed. Stages that do not depend on the seed are the same for every seed."""

    seed: int
    task: LanguageTask | TextTask
    data: Stage
    base: Stage
    reference: Stage
    pairs: Stage
    scored: dict[Arithmetic, Stage]  # pairs with the reference's log-probs, by the arithmetic of training
    shared_lengths: dict[Arithmetic, Stage]  # scored pairs, also of their first tokens, for methods that weigh the rest
    responses: dict[Arithmetic, Stage]  # single ones, of methods that learn from those
    scored_in: Arithmetic  # of judges, evaluations and test pairs
    samples: Stage | None  # holds reference_samples/, on which learned rewards are normalised; none where none is
    judge: Stage | None
    evaluation: Stage  # of the reference itself
    frontier: Stage | None  # scores of many samples of the reference, where the frontier is estimated
    trained: tuple[Trained, ...]
    behaviour: Stage | None = None  # another model than the reference that drawn pairs come from
    drawn: Stage | None = None  # responses of which pairs are made
    demonstrations: dict[str, Stage] = field(default_factory=dict)  # by their source, where that has a stage of its own
    undivided: Stage | None = None  # pairs before training prompts were set aside to tune on

    @property
    def tables(self) -> Path:
        """Where prompts and demonstrations are: with the pairs of text, and with the data of the language."""
        return (self.data if isinstance(self.task, LanguageTask) else self.pairs).folder

    def demonstrations_of(self, method: OffPolicyMethod | OnPolicyMethod) -> Path:
        """The table that a method's eta term is over."""
        if method.demonstration_source == "chosen":
            return self.pairs.folder / "train_pairs"
        own = self.demonstrations.get(method.demonstration_source)
        return (self.tables if own is None else own.folder) / "demonstrations"

    @property
    def made_pairs(self) -> Stage:
        """The stage of pairs as the data or a policy gave them."""
        return self.undivided or self.pairs

    @property
    def singles(self) -> Path | None:
        """The stage with single responses, if the task has such rows; None if they are pairs, taken apart."""
        if not isinstance(self.task, TextTask) or self.task.unpaired_data is None:
            return None
        return (self.pairs if self.undivided else self.data).folder / "responses"

    @property
    def logps(self) -> Stage:
        """Scored pairs, for whoever reads their text or the test pairs, which are scored alike in all of them."""
        return next(iter(self.scored.values()))

    def shared(self) -> list[Stage]:
        """Stages before any entry's own, in order, without repeats."""
        stages: list[Stage | None] = [self.data, self.base, self.reference, self.behaviour, self.drawn]
        stages += [self.undivided, self.pairs]
        stages += [*self.scored.values(), *self.shared_lengths.values(), *self.responses.values()]
        stages += [*self.demonstrations.values(), self.samples, self.judge]
        return list(dict.fromkeys(stage for stage in stages if stage))


def make_plan(config: Comparison) -> list[SeedPlan]:
    """The stages of every seed."""
    root = root_of(config.output, config.resources.cache_dir) / "stages"
    return [_seed_plan(config, seed, root) for seed in config.seeds]


def unique(stages: list[Stage]) -> list[Stage]:
    """Stages in order of first appearance."""
    return list(dict.fromkeys(stages))


def _seed_plan(config: Comparison, seed: int, root: Path) -> SeedPlan:
    task = config.task
    if config.seeds_vary == "task" and isinstance(task, LanguageTask):
        task = task.model_copy(update={"seed": task.seed + seed})
    data = Stage.at(root, "data", task.kind, [data_inputs(config, task), tokenizer_inputs(config)])
    base = Stage.at(root, "base", task.kind, [data.key, model_inputs(config.model), config.reference.seed])
    reference = base
    if config.reference.train:
        settings = config.reference.model_dump(mode="json")
        inputs = [base.key, settings, computing_inputs(config)]
        reference = Stage.at(root, "reference", task.kind, inputs)
    pairs, samples, judge = data, None, None
    if isinstance(task, LanguageTask):
        pairs = samples = Stage.at(root, "pairs", task.kind, [reference.key, task.model_dump(mode="json")])
    elif learns_a_reward(config):
        sampled = [config.evaluation.num_reference_samples, config.evaluation.seed, *engine_inputs(config)]
        samples = Stage.at(root, "reference_samples", task.kind, [data.key, reference.key, sampled])
        if config.trained_judge is not None:
            inputs = [data.key, reference.key, samples.key, _dump(config.trained_judge)]
            inputs += [computing_inputs(config), *named(config.scored_in)]
            judge = Stage.at(root, "judge", task.kind, inputs)
    behaviour: Stage | None = None
    drawn: Stage | None = None
    if isinstance(task, TextTask):
        behaviour, drawn, pairs = _pair_stages(config, task, root, data, reference, judge)
    undivided: Stage | None = None
    if isinstance(task, TextTask) and task.validation_share is not None:
        undivided = pairs
        pairs = Stage.at(root, "validation", task.kind, [pairs.key, task.validation_share, task.split_seed])
    trained_on, scored = dict[Arithmetic, str](), dict[Arithmetic, Stage]()
    for arithmetic in _arithmetics(config, lambda method: not isinstance(method, Unpaired)) or ["float32"]:
        inputs = [pairs.key, reference.key, *named(arithmetic)]
        trained_on[arithmetic] = Stage.at(root, "logps", task.kind, inputs).key  # how test pairs are scored aside
        inputs += [f"test pairs: {other}" for other in named(config.scored_in)]
        scored[arithmetic] = Stage.at(root, "logps", task.kind, inputs)
    shared_lengths = {
        arithmetic: Stage.at(root, "shared_logps", task.kind, [trained_on[arithmetic]])
        for arithmetic in _arithmetics(config, needs_shared)
    }
    responses = {
        arithmetic: Stage.at(root, "responses", task.kind, [pairs.key, reference.key, arithmetic])
        for arithmetic in _arithmetics(config, lambda method: isinstance(method, Unpaired))
    }
    sources = {source for entry in config.entries if (source := demonstration_stage(entry.method)) is not None}
    demonstrations = dict[str, Stage]()
    for source in sorted(sources):
        inputs = demonstration_inputs(config, task, source, pairs.key, reference.key)
        demonstrations[source] = Stage.at(root, "demonstrations", source, inputs)
    logps = next(iter(scored.values()))
    judged_by = None if isinstance(task, LanguageTask) else judge.key if judge else judge_inputs(config.judge)
    if is_pairwise(config):
        judged_by = "pairwise"  # which has a stage of its own: responses do not depend on the judge
    evaluate = [logps.key, judged_by, evaluation_inputs(config)]
    if isinstance(task, TextTask) and engine_inputs(config) != ["float32"]:
        evaluate.append(engine_inputs(config))

    def trained_as(entry: Entry) -> Trained:
        replay = entry.method.replay if isinstance(entry.method, Pairwise) else None
        source = None if replay is None else next(trained_as(one) for one in config.entries if one.name == replay)
        shared = logps, trained_on, shared_lengths, responses, samples, judge, evaluate
        own = demonstrations.get(demonstration_stage(entry.method) or "")
        return _trained(config, entry, seed, root, *shared, replayed=source, demonstrations=own)

    trained = tuple(trained_as(entry) for entry in config.entries)
    evaluation, frontier = Stage.at(root, "evaluation", "reference", [reference.key, evaluate]), None
    if isinstance(task, TextTask) and config.evaluation.frontier_samples:
        frontier = Stage.at(root, "frontier", task.kind, [evaluation.key, config.evaluation.frontier_samples])
    if is_pairwise(config):
        trained = tuple(_compared(one, root, evaluation, config.judge) for one in trained)
    return SeedPlan(
        seed,
        task,
        data,
        base,
        reference,
        pairs,
        scored,
        shared_lengths,
        responses,
        config.scored_in,
        samples,
        judge,
        evaluation,
        frontier,
        trained,
        behaviour,
        drawn,
        demonstrations,
        undivided,
    )


def _pair_stages(
    config: Comparison, task: TextTask, root: Path, data: Stage, reference: Stage, judge: Stage | None
) -> tuple[Stage | None, Stage | None, Stage]:
    """The policy of drawn pairs if it is not the reference, the responses, and the pairs, drawn or not."""
    if task.pairs is None:
        if task.covered_share == 1:
            return None, None, data
        return None, None, Stage.at(root, "pairs", task.kind, [data.key, task.covered_share, task.split_seed])
    behaviour = None
    if task.pairs.policy is not None:
        behaviour = Stage.at(root, "behaviour", task.kind, [data.key, model_inputs(task.pairs.policy)])
    policy = behaviour or reference
    drawn = Stage.at(root, "drawn", task.kind, [data.key, policy.key, task.pairs.drawing(), *engine_inputs(config)])
    judges = [
        [judge.key if judge and isinstance(own, RewardModel) else judge_inputs(own), annotator.noise]
        for annotator, own in zip(task.pairs.annotators, task.pairs.judges(config.judge), strict=True)
    ]
    inputs = [drawn.key, task.pairs.labelling(), task.covered_share, judges, *named(config.scored_in)]
    return behaviour, drawn, Stage.at(root, "pairs", task.kind, inputs)


def _trained(
    config: Comparison,
    entry: Entry,
    seed: int,
    root: Path,
    logps: Stage,
    trained_on: dict[Arithmetic, str],
    shared_lengths: dict[Arithmetic, Stage],
    responses: dict[Arithmetic, Stage],
    samples: Stage | None,
    judge: Stage | None,
    evaluate: list[Any],
    *,
    replayed: Trained | None = None,
    demonstrations: Stage | None = None,
) -> Trained:
    """trained_on: what scored training pairs depend on, by the arithmetic of training. demonstrations: what the eta
    term is over, where that is a stage of its own.
    """
    method, label, reward_model, scores = entry.method, f"{entry.name}-s{seed}", None, None
    pairs, settings = logps.key, _dump(method)
    if isinstance(method, OnPolicyMethod):
        settings = method.address()
    if isinstance(method, OffPolicyMethod):
        arithmetic, settings = method.training.precision, method.address()
        pairs = responses[arithmetic].key if isinstance(method, Unpaired) else trained_on[arithmetic]
        if needs_shared(method):
            pairs = shared_lengths[arithmetic].key
        if replayed is not None and replayed.training is not None:
            pairs = replayed.training.key
    inputs: list[Any] = [pairs, settings, seed]
    if demonstrations is not None:
        inputs.append(["demonstrations", demonstrations.key])
    if not isinstance(method, BestOfN):
        inputs.append(computing_inputs(config))
    if (keyed := reward_of(method)) is not None:
        reward = keyed[1]
        if isinstance(reward, RewardModel):
            rm_inputs: list[Any] = [logps.key, samples.key if samples else None, _dump(reward), seed]
            rm_inputs.append(computing_inputs(config))
            reward_model = Stage.at(root, "reward_model", f"s{seed}", rm_inputs)
            inputs.append(reward_model.key)
        elif isinstance(reward, FunctionJudge):
            inputs.append(judge_inputs(reward))
        inputs += engine_inputs(config)
        # Beside an on-policy method's own reward its rollouts have the judge's; on the language both are tables.
        if isinstance(method, OnPolicyMethod | BestOfN):
            function = watching_function(config, reward) if isinstance(method, OnPolicyMethod) else None
            inputs.append(judge.key if judge else judge_inputs(function) if function else None)
            if isinstance(config.task, LanguageTask) and not isinstance(reward, GoldJudge | EndpointJudge):
                scored_by = reward_model.key if reward_model else judge_inputs(reward)
                scores = Stage.at(root, "scores", f"{reward.kind}-s{seed}", [logps.key, scored_by])
    training = None if isinstance(method, BestOfN) else Stage.at(root, method.kind, label, inputs)
    evaluate = evaluate if config.proxy_of(method) is None else [*evaluate, "proxy_reward"]
    measured = [training.key if training else inputs, scores.key if scores else None, evaluate]
    evaluation, on_the_way = Stage.at(root, "evaluation", label, measured), tuple[Stage, ...]()
    if isinstance(config.task, TextTask) and not is_pairwise(config) and training is not None:
        number = 0 if isinstance(method, BestOfN) else method.training.num_snapshots
        on_the_way = tuple(
            Stage.at(root, "evaluation", f"{label}-{place + 1}-of-{number}", [training.key, place, evaluate])
            for place in range(number)
        )
    return Trained(entry, seed, reward_model, training, scores, evaluation, replayed=replayed, on_the_way=on_the_way)


def _compared(trained: Trained, root: Path, reference: Stage, judge: EvaluationJudge) -> Trained:
    """An entry with its comparison with the reference; `reference` is that one's evaluation."""
    inputs = [trained.evaluation.key, reference.key, _dump(judge)]
    return replace(trained, wins=Stage.at(root, "wins", f"{trained.entry.name}-s{trained.seed}", inputs))


def _dump(settings: BaseModel) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _arithmetics(config: Comparison, wanted: Callable[[OffPolicyMethod], bool]) -> list[Arithmetic]:
    """The arithmetics of all entries with a wanted off-policy method, without repeats; float32 first."""
    methods = [entry.method for entry in config.entries if isinstance(entry.method, OffPolicyMethod)]
    found = {method.training.precision for method in methods if wanted(method)}
    return sorted(found, key=lambda arithmetic: arithmetic != "float32")


# ---------------------------------------------------------------------------------------------- jobs


def model_of(stage: Stage) -> str:
    return str(stage.folder / MODEL)


def policy_of(plan: SeedPlan, trained: Trained) -> str:
    """The model that an entry samples from: best-of-n has the reference."""
    return model_of(trained.training or plan.reference)
