"""Inputs of stages' addresses, on which their results depend: the parts that several kinds of stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.asked_for import learns_judge
from prefarena.config import (
    Comparison,
    EvaluationJudge,
    FunctionJudge,
    JudgeSettings,
    LanguageTask,
    Model,
    OffPolicyMethod,
    OnPolicyMethod,
    Section,
    TextTask,
)
from prefarena.data.sources import version_of
from prefarena.functions import source_digest
from prefarena.settings.judges import is_same_function


def judge_inputs(settings: EvaluationJudge) -> list[Any]:
    """Inputs that scores depend on, including a function's source, so that an edited function is called again."""
    source = source_digest(settings.function) if isinstance(settings, FunctionJudge) else None
    return [settings.model_dump(mode="json"), source]


def watching_function(config: Comparison, reward: JudgeSettings) -> FunctionJudge | None:
    """The judge of a text task as it scores the rollouts of on-policy training, too, where it is a function.

    None where the training learns from that very function, whose scores are its reward. A judge that is paid for, or
    another model to hold, does not watch.
    """
    judge = config.judge
    if isinstance(config.task, LanguageTask) or not isinstance(judge, FunctionJudge):
        return None
    return None if is_same_function(reward, judge) else judge


def engine_inputs(config: Comparison) -> list[str]:
    """Inputs that samples depend on besides the policy, the prompts and the sampler."""
    generation = config.generation
    found: list[str] = [generation.dtype_on(config.resources.use_gpu)]
    found += ["batch_invariant"] if generation.batch_invariant else []
    return found + ([f"over {generation.tensor_parallel} devices"] if generation.tensor_parallel > 1 else [])


def computing_inputs(config: Comparison) -> list[Any]:
    """Inputs that say how a training's numbers are computed, in addition to its own settings.

    The number of workers and what each holds change no more than the order of additions, and a training that was
    interrupted goes on with others: they are not in its address.
    """
    return [config.resources.cpus_per_worker, config.resources.use_gpu]


def evaluation_inputs(config: Comparison) -> dict[str, Any]:
    """The settings that an evaluation depends on; it keeps the address that it had before there were the later ones."""
    later = {"frontier_samples", "abilities"}  # stages of their own
    if config.evaluation.num_coverage_prompts is None:
        later.add("num_coverage_prompts")
    return config.evaluation.model_dump(mode="json", exclude=later)


def data_inputs(config: Comparison, task: LanguageTask | TextTask) -> dict[str, Any]:
    """The task's settings that its data depend on; files by size and time of change, remote ones by their mark."""
    if isinstance(task, LanguageTask):
        pair_settings = {"num_pairs", "num_test_pairs", "labels", "label_temperature"}
        return task.model_dump(mode="json", exclude=pair_settings)
    named = (task.data, task.test_data, task.unpaired_data, task.pretraining_text)
    files = [mark for name in named if name for mark in source_marks(name)]
    # Other data keep the address that they had; how pairs are made of the prompts, and demonstrations, is in those of
    # stages of their own.
    later = {"pairs", "covered_share", "validation_share", "demonstration_data"}
    later |= {"unpaired_data"} if task.unpaired_data is None else set()
    return {**task.model_dump(mode="json", exclude=later), "files": files, "learns_judge": learns_judge(config)}


def demonstration_stage(method: Section) -> str | None:
    """The source of the data of a method's eta term, if the term is active and the data have a stage of their own."""
    if not isinstance(method, OffPolicyMethod | OnPolicyMethod) or method.demonstration_weight == 0:
        return None
    return method.demonstration_source if method.demonstration_source in ("samples", "file") else None


def demonstration_inputs(
    config: Comparison, task: LanguageTask | TextTask, source: str, pairs: str, reference: str
) -> list[Any]:
    """Inputs that the demonstrations of such a stage depend on. pairs, reference: the keys of these stages."""
    if isinstance(task, LanguageTask):
        return [pairs]
    if source == "file":
        return [pairs, task.demonstration_data, source_marks(task.demonstration_data or "")]
    return [pairs, reference, config.evaluation.seed, *engine_inputs(config)]


def source_marks(name: str) -> list[list[Any]]:
    """A mark that changes with the content of data at a path, a URL or a hub id; empty where nothing is there."""
    path = Path(name)
    if path.exists():
        return _marks([path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()))
    version = version_of(name)
    return [[name, version]] if version else []


def tokenizer_inputs(config: Comparison) -> Any:
    """The language has a tokenizer of its own; text is tokenised by the model's, or by one trained to its size."""
    if isinstance(config.task, LanguageTask):
        return None
    return config.model.vocab_size if config.model.kind == "scratch" else model_inputs(config.model)


def model_inputs(model: Model) -> Any:
    """The model's settings, and the files of a folder, to which stages refer: they may change where they are."""
    settings = model.model_dump(mode="json")
    if model.kind == "scratch" or not (folder := Path(model.path)).is_dir():
        return settings
    return {**settings, "files": _marks(sorted(file for file in folder.iterdir() if file.is_file()))}


def file_marks(folder: Path) -> list[list[Any]]:
    """Every file of a folder, by size and time of change."""
    return _marks(sorted(path for path in folder.rglob("*") if path.is_file()))


def _marks(files: list[Path]) -> list[list[Any]]:
    return [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
