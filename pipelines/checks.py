"""Checks of a comparison that need no work to be done."""

from __future__ import annotations

from pipelines.jobs import max_length
from pipelines.pair_scores import learners_from_scores
from pipelines.prompts import check_rows
from pipelines.tuning_record import tuning_of
from prefarena.cluster.capacity import generates
from prefarena.config import (
    Abilities,
    BestOfN,
    Comparison,
    DrawnPairs,
    EndpointJudge,
    OffPolicy,
    OnPolicyMethod,
    PretrainedModel,
    RewardModel,
    TextTask,
    reward_of,
)
from prefarena.errors import UserError
from prefarena.evaluation.ability_tasks import load_tasks
from prefarena.judges.spec import check_judge
from prefarena.modeling.inspection import check_context, check_head_size, check_split, inspect_policy
from prefarena.modeling.load import load_tokenizer, new_settings, read_tokenizer
from prefarena.modeling.vocabulary import check_tokens
from prefarena.settings.on_policy import CriticTraining
from prefarena.tasks.language import Language
from prefarena.trackers.make import check_packages


def check_input(config: Comparison) -> None:
    """Raise UserError for whatever can be found wrong without any work."""
    tuning_of(config)
    if isinstance(config.model, PretrainedModel):
        _check_pretrained(config, config.model)
    if isinstance(config.task, TextTask):
        check_rows(config.task, config.model, _learner_from_answers(config), _learner_from_scores(config))
        if config.task.pairs is not None:
            _check_drawn_pairs(config, config.task, config.task.pairs)
    else:
        Language(config.task)
    if not isinstance(config.model, PretrainedModel):
        width = config.model.hidden_size // config.model.num_heads
        if width not in (32, 64, 128, 256):
            raise UserError(
                f"model: hidden_size / num_heads is {width}; vLLM's attention supports 32, 64, 128 or 256, so change "
                f"one of the two"
            )
        if generates(config):
            check_split("model", new_settings(config.model, 1, 1), config.generation.tensor_parallel)
    rewards = [keyed[1] for entry in config.entries if (keyed := reward_of(entry.method)) is not None]
    for settings in [*rewards, *([config.judge] if isinstance(config.task, TextTask) else [])]:
        check_judge(settings)
    for entry in config.entries:
        if isinstance(entry.method, OffPolicy):
            entry.method.check()
    check_packages(config.tracking)
    if config.evaluation.abilities is not None:
        load_tasks(config.evaluation.abilities)
        _check_chat(config, config.evaluation.abilities)
    workers = config.resources.num_workers
    for name, training in _optimisations(config):
        if training % workers:
            raise UserError(f"{name}: {training} cannot be divided evenly among resources.num_workers = {workers}")


def _check_pretrained(config: Comparison, model: PretrainedModel) -> None:
    if not isinstance(config.task, TextTask):
        raise UserError("model.kind: pretrained models need a text task; the enumerable language has its own")
    methods = [entry.method for entry in config.entries]
    rewards = [config.judge, *(keyed[1] for method in methods if (keyed := reward_of(method)) is not None)]
    scored = any(isinstance(reward, RewardModel) for reward in rewards)
    scored = scored or any(isinstance(getattr(method, "training", None), CriticTraining) for method in methods)
    settings = inspect_policy(model.path, model.revision, scored=scored)
    tokenizer = load_tokenizer(model.path, model.revision)
    check_tokens(model.path, tokenizer, settings, model.revision)
    check_context(model.path, settings, max_length(config.task))
    if generates(config):
        check_split(model.path, settings, config.generation.tensor_parallel)
    if generates(config) and not config.resources.use_gpu:
        check_head_size(model.path, settings)


def _check_chat(config: Comparison, abilities: Abilities) -> None:
    """Raise UserError where abilities are asked for in a chat template that there is not."""
    if not abilities.chat_template:
        return
    tokenizer = None
    if isinstance(config.model, PretrainedModel):
        tokenizer = read_tokenizer(config.model.path, config.model.revision)
    if tokenizer is None or tokenizer.chat_template is None:
        raise UserError(
            "evaluation.abilities.chat_template: the model's tokenizer has no chat template; leave the setting out"
        )


def _learner_from_answers(config: Comparison) -> str | None:
    """The setting by which something is trained on the data's own answers; None if there is none."""
    if config.reference.train:
        return "reference.train: true"
    return "judge.kind: learned" if isinstance(config.judge, RewardModel) else None


def _learner_from_scores(config: Comparison) -> str | None:
    """The entry that is trained on scores in the data's own rows; None if none is. Drawn pairs have their judge's."""
    drawn = isinstance(config.task, TextTask) and config.task.pairs is not None
    return None if drawn else next(iter(learners_from_scores(config)), None)


def _check_drawn_pairs(config: Comparison, task: TextTask, pairs: DrawnPairs) -> None:
    """Raises UserError where a policy or a judge that pairs are to come from cannot be used."""
    for judge in pairs.judges(config.judge):
        check_judge(judge)
    if pairs.policy is None:
        return
    path, revision = pairs.policy.path, pairs.policy.revision
    settings = inspect_policy(path, revision)
    check_context(path, settings, max_length(task))
    if not config.resources.use_gpu:
        check_head_size(path, settings)
    same = isinstance(config.model, PretrainedModel) and (
        load_tokenizer(path, revision).get_vocab()
        == load_tokenizer(config.model.path, config.model.revision).get_vocab()
    )
    if not same:
        raise UserError(
            f"task.pairs.policy: {path} does not have the same tokenizer as `model`, so its responses cannot be used; "
            f"name a model that does, or `reference`"
        )


def _optimisations(config: Comparison) -> list[tuple[str, int]]:
    """Batch sizes that workers must share evenly, by key. Raises UserError for entries that cannot train."""
    sizes = [("reference.training.batch_size", config.reference.training.batch_size)]
    if config.trained_judge is not None:
        sizes.append(("judge.training.batch_size", config.trained_judge.training.batch_size))
    for entry in config.entries:
        where = f"entries.{entry.name}.method"
        if (keyed := reward_of(entry.method)) is not None and isinstance(keyed[1], RewardModel):
            sizes.append((f"{where}.{keyed[0]}.training.batch_size", keyed[1].training.batch_size))
        if isinstance(entry.method, OnPolicyMethod | BestOfN):
            if isinstance(entry.method, BestOfN):
                if isinstance(entry.method.reward, EndpointJudge) and not isinstance(config.task, TextTask):
                    raise UserError(f"{where}.reward: an endpoint cannot score every response of the language")
                continue
            training = entry.method.training
            sizes.append((f"{where}.training.rollouts_per_iteration", training.rollouts_per_iteration))
            if training.rollouts_per_iteration % training.num_minibatches:
                raise UserError(
                    f"{where}.training: rollouts_per_iteration {training.rollouts_per_iteration} cannot be cut into "
                    f"{training.num_minibatches} minibatches of equal size"
                )
            if entry.method.demonstration_weight > 0 or entry.method.pretraining_weight > 0:
                size = training.rollouts_per_iteration // training.num_minibatches
                sizes.append((f"{where}.training.rollouts_per_iteration / num_minibatches", size))
        else:
            sizes.append((f"{where}.training.batch_size", entry.method.training.batch_size))
        has_text = isinstance(config.task, TextTask) and config.task.pretraining_text is not None
        if entry.method.pretraining_weight > 0 and not has_text:
            raise UserError(f"{where}.pretraining_weight: above 0 it needs task.pretraining_text (text tasks)")
    return sizes
