"""The jobs of training workers, made from the plan of a comparison."""

from __future__ import annotations

import hashlib

from pipelines.addresses import watching_function
from pipelines.asked_for import learned_reward, needs_shared
from pipelines.plan import SeedPlan, Trained, model_of
from prefarena.config import (
    BestOfN,
    Comparison,
    DrawnPairs,
    Endpoint,
    EvaluationJudge,
    GoldJudge,
    JudgeSettings,
    LanguageTask,
    OffPolicyMethod,
    OnPolicyMethod,
    Pairwise,
    RewardModel,
    TextTask,
)
from prefarena.config.label_budgets import all_limits
from prefarena.judges.spec import JudgeSpec
from prefarena.mirror import root_of
from prefarena.settings.unpaired import Unpaired
from prefarena.stage_files import GOLD
from prefarena.stages import Stage
from prefarena.training.jobs import (
    Drawing,
    Job,
    OffPolicyJob,
    OnPolicyJob,
    ReferenceJob,
    Regulariser,
    Replayed,
    RewardModelJob,
)

GENERATOR = "prefarena-generator"


def reference_job(config: Comparison, plan: SeedPlan) -> ReferenceJob:
    settings = config.reference
    return ReferenceJob(
        max_length=max_length(plan.task),
        stage_dir=str(plan.reference.folder),
        name="reference",
        policy=model_of(plan.base),
        seed=settings.seed,
        training=settings.training,
        demonstrations=str(plan.data.folder / "demonstrations"),
        loss_on=settings.loss_on,
    )


def _samples(plan: SeedPlan) -> str:
    if plan.samples is None:
        raise TypeError("nothing is normalised in this comparison")
    return str(plan.samples.folder / "reference_samples")


def judge_job(config: Comparison, plan: SeedPlan, judge: Stage) -> RewardModelJob:
    if not isinstance(config.judge, RewardModel):
        raise TypeError(f"a {config.judge.kind} judge is not trained")
    return RewardModelJob(
        max_length=max_length(plan.task),
        stage_dir=str(judge.folder),
        name="judge",
        policy=model_of(plan.reference),
        seed=config.evaluation.seed,
        settings=config.judge,
        pairs=str(plan.data.folder / "judge_pairs"),
        test_pairs=str(plan.data.folder / "test_pairs"),
        samples=_samples(plan),
        scored_in=plan.scored_in,
    )


def reward_model_job(plan: SeedPlan, trained: Trained) -> RewardModelJob:
    settings = learned_reward(trained.entry.method)
    if settings is None or trained.reward_model is None:
        raise TypeError(f"{trained.entry.name} has no reward model")
    return RewardModelJob(
        max_length=max_length(plan.task),
        stage_dir=str(trained.reward_model.folder),
        name=f"reward-model-s{trained.seed}",
        policy=model_of(plan.reference),
        seed=trained.seed,
        settings=settings,
        pairs=str(plan.logps.folder / "train_pairs"),
        test_pairs=str(plan.logps.folder / "test_pairs"),
        samples=_samples(plan),
        scored_in=plan.scored_in,
    )


def entry_job(config: Comparison, plan: SeedPlan, trained: Trained, place: int = 0) -> Job:
    """The training job of an entry at a seed. Raises TypeError for best-of-n, which trains nothing.

    place: of the set of generation actors that it asks, as in `generator_names`.
    """
    method = trained.entry.method
    if trained.training is None or isinstance(method, BestOfN):
        raise TypeError("best-of-n trains nothing")
    folder, name = str(trained.training.folder), f"{trained.entry.name}-s{trained.seed}"
    if isinstance(method, OffPolicyMethod):
        pretraining, arithmetic = plan.data.folder / "pretraining", method.training.precision
        unpaired = isinstance(method, Unpaired)
        scored = plan.logps if unpaired else (plan.shared_lengths if needs_shared(method) else plan.scored)[arithmetic]
        return OffPolicyJob(
            max_length=max_length(plan.task),
            stage_dir=folder,
            name=name,
            policy=model_of(plan.reference),
            seed=trained.seed,
            method=method,
            pairs=str(scored.folder / "train_pairs"),
            responses=str(plan.responses[arithmetic].folder / "train_responses") if unpaired else None,
            demonstrations=str(plan.demonstrations_of(method)),
            num_demonstrations=_num_demonstrations(method),
            pretraining=str(pretraining) if method.pretraining_weight > 0 else None,
            drawing=_drawing(config, plan, trained, place),
            replayed=_replayed(trained),
        )
    return OnPolicyJob(
        max_length=max_length(plan.task),
        stage_dir=folder,
        name=name,
        policy=model_of(plan.reference),
        seed=trained.seed,
        training=method.training,
        reward=judge_spec(plan, method.reward, trained.reward_model, may_be_silent=True),
        prompts=str(plan.tables / "prompts"),
        covered_only=method.prompts == "covered",
        generators=generator_names(config, place),
        generation=config.generation,
        response_limit=response_limit(plan.task),
        critic=model_of(trained.reward_model) if trained.reward_model else None,
        monitor=_monitor(config, plan, method.reward),
        regulariser=Regulariser(
            method.demonstration_weight,
            method.demonstration_mean,
            method.pretraining_weight,
            str(plan.demonstrations_of(method)),
            str(plan.data.folder / "pretraining"),
            _num_demonstrations(method),
        ),
    )


def _num_demonstrations(method: OffPolicyMethod | OnPolicyMethod) -> int | None:
    """The number of chosen responses in the eta term, if it uses those: the pairs that are learned from."""
    return min(all_limits(method), default=None) if method.demonstration_source == "chosen" else None


def _drawing(config: Comparison, plan: SeedPlan, trained: Trained, place: int) -> Drawing | None:
    """How an off-policy entry gets pairs of its own; they are labelled as the task's are."""
    method = trained.entry.method
    online = method.online if isinstance(method, Pairwise) else None
    if online is None:
        return None
    labelled = plan.task if isinstance(plan.task, LanguageTask) else plan.task.pairs or DrawnPairs()
    return Drawing(
        every=online.every,
        temperature=online.temperature,
        reward=judge_spec(plan, online.reward, trained.reward_model, may_be_silent=True),
        generators=generator_names(config, place),
        generation=config.generation,
        response_limit=response_limit(plan.task),
        labels=labelled.labels,
        label_temperature=labelled.label_temperature,
    )


def _replayed(trained: Trained) -> Replayed | None:
    """Whose pairs an off-policy entry is trained on, where they are another entry's."""
    if trained.replayed is None:
        return None
    source, training = trained.replayed.entry.method, trained.replayed.training
    if not isinstance(source, Pairwise) or source.online is None or training is None:
        raise TypeError(f"{trained.replayed.entry.name} is not online")
    return Replayed(str(training.folder), source.online.every, source.training, source.num_pairs)


def _monitor(config: Comparison, plan: SeedPlan, reward: JudgeSettings) -> JudgeSpec | None:
    """The judge that on-policy training logs beside its reward.

    It is the gold reward, or for text the comparison's judge if that is a trained one or a function.
    """
    if isinstance(plan.task, LanguageTask):
        return None if isinstance(reward, GoldJudge) else judge_spec(plan, GoldJudge(), None)
    watching = watching_function(config, reward)
    if watching is not None:
        return judge_spec(plan, watching, None, may_be_silent=True)
    return judge_spec(plan, config.judge, plan.judge) if plan.judge else None


def judge_spec(
    plan: SeedPlan, settings: EvaluationJudge, reward_model: Stage | None, *, may_be_silent: bool = False
) -> JudgeSpec:
    """A judge as workers load it; `reward_model` is the stage of a learned one."""
    path = None
    if isinstance(settings, RewardModel):
        if reward_model is None:
            raise TypeError("a learned judge has a stage")
        path = model_of(reward_model)
    elif settings.kind == "gold":
        path = str(plan.pairs.folder / GOLD)
    calls = plan.data.folder.parents[1] / "judge_calls" if isinstance(settings, Endpoint) else None
    kept = None if calls is None else str(calls)
    return JudgeSpec(settings, path, model_of(plan.reference), kept, plan.scored_in, may_be_silent)


def generator_names(config: Comparison, place: int = 0) -> tuple[str, ...]:
    """The Ray names of the generation actors; another comparison on the same cluster has others.

    place: of the set of actors, where several are at work at the same time.
    """
    key = hashlib.sha256(
        f"{root_of(config.output, config.resources.cache_dir)}\n{config.model_dump_json()}".encode()
    ).hexdigest()[:8]
    first = place * config.generation.num_actors
    numbers = range(first, first + config.generation.num_actors)
    return tuple(f"{GENERATOR}-{config.name}-{key}-{number}" for number in numbers)


def response_limit(task: LanguageTask | TextTask) -> int:
    return task.response_limit if isinstance(task, LanguageTask) else task.max_response_tokens


def max_length(task: LanguageTask | TextTask) -> int:
    """Most tokens in a prompt and its response."""
    return sum(longest(task))


def longest(task: LanguageTask | TextTask) -> tuple[int, int]:
    """Most tokens in a prompt, and in a response."""
    if isinstance(task, LanguageTask):
        return 1 + task.prompt_letters, task.response_limit
    return task.max_prompt_tokens, task.max_response_tokens
