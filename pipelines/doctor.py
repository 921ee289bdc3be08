"""`prefarena doctor`: will it run here? As a job on a cluster, `prefarena submit --check`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from transformers import PretrainedConfig

from pipelines.checks import check_input
from pipelines.jobs import longest
from pipelines.memory import model_settings
from prefarena.cluster.attention import ask_gpu_nodes
from prefarena.cluster.capacity import check_side_by_side, cluster_nodes, describe, generates
from prefarena.cluster.doctor import (
    Finding,
    judge_attention,
    judge_capacity,
    judge_engine,
    judge_host,
    judge_memory,
    judge_nodes,
    judge_reach,
    judge_storage,
    judge_waking,
    room_of_worker,
)
from prefarena.cluster.needs import Lengths, disk_needed, heaviest_training, num_parameters, precisions
from prefarena.cluster.probe import ask_nodes, token_file
from prefarena.cluster.session import check_resources, ray_session
from prefarena.config import Comparison, PretrainedModel, TextTask
from prefarena.errors import UserError
from prefarena.modeling.attention_trial import attention_heads
from prefarena.stores import fingerprint, is_url
from prefarena.tasks.language import Language

_ANSWER_LIMIT_S = 120.0
_ATTENTION_LIMIT_S = 300.0  # both passes of both precisions are compiled
_MARKS = {True: "✗", False: "✓", None: "·"}


def doctor(config: Comparison | None) -> int:
    """Print what is here, what `config` needs, and what will not fit. Returns the exit status: 0, or 2 with problems.

    Nothing is started but a task of no CPU on every node, and where GPUs are asked for one that compiles attention on
    each that has some. Nothing is left behind.
    """
    with ray_session() as available:
        found = []
        for finding in _findings(config, available):
            print(f"{_MARKS[finding.problem]} {finding.text}", flush=True)
            found.append(finding)
    problems = sum(finding.problem is True for finding in found)
    print(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problem found")
    return 2 if problems else 0


def _findings(config: Comparison | None, available: dict[str, float]) -> Iterator[Finding]:
    if config is None:
        reports, silent = ask_nodes(None, "", _ANSWER_LIMIT_S)
        yield from judge_nodes(reports, silent, generates=False)
        yield Finding(None, f"the cluster has {describe(cluster_nodes())}")
        return
    try:
        check_input(config)
        yield Finding(False, f"comparison {config.name!r}: its settings and its data are usable")
    except UserError as error:
        yield Finding(True, str(error))
    output, places = Path(config.output).absolute(), _places(config)
    try:
        with nullcontext((None, "")) if is_url(config.output) else token_file(output) as (token, text):
            reports, silent = ask_nodes(token, text, _ANSWER_LIMIT_S, places)
    except OSError as error:
        yield Finding(True, f"output: {output} cannot be written to ({error.strerror or error})")
        return
    yield from judge_nodes(reports, silent, generates(config), config.generation.labels)
    yield from judge_reach(reports, places)
    settings = model_settings(config)
    room = room_of_worker(config, reports)
    memory = heaviest_training(config, settings, Lengths(*longest(config.task)), room) if settings else None
    nodes = cluster_nodes()
    capacity = judge_capacity(config, nodes, memory)
    yield from capacity
    if not config.resources.autoscaled and not any(finding.problem for finding in capacity):
        try:
            check_resources(config, available)  # each part fits; do those that stand side by side fit together?
            check_side_by_side(config, nodes)
        except UserError as error:
            yield Finding(True, str(error))
    yield from judge_memory(config, reports, memory)
    yield from judge_waking(config, reports, memory)
    yield from judge_host(config, reports, memory)
    if settings is not None:
        yield from judge_engine(config, reports, num_parameters(settings))
    if config.resources.use_gpu and settings is not None:
        yield from _try_attention(config, settings)
    if reports and not is_url(config.output):
        needed = disk_needed(config, num_parameters(settings), _data_bytes(config)) if settings else None
        yield from judge_storage(str(output), reports, needed)


def _try_attention(config: Comparison, settings: PretrainedConfig) -> Iterator[Finding]:
    """Try attention as the comparison's training computes it, on every node with GPUs that may hold a worker."""
    resources, heads, dtypes = config.resources, attention_heads(settings), precisions(config)
    if heads is None:
        return
    answers, silent = ask_gpu_nodes(heads, dtypes, resources.gpus_per_worker, resources.labels, _ATTENTION_LIMIT_S)
    yield from judge_attention(answers, silent, f"attention with heads of {heads.size} in {' and '.join(dtypes)}")


def _places(config: Comparison) -> dict[str, str]:
    """The paths and URLs that every node must read, by setting; names on the hub are checked by `check_input`."""
    named: dict[str, str | None] = {"output": config.output} if is_url(config.output) else {}
    if isinstance(config.task, TextTask):
        named |= {
            f"task.{name}": getattr(config.task, name)
            for name in ("data", "test_data", "unpaired_data", "demonstration_data", "pretraining_text")
        }
    if isinstance(config.model, PretrainedModel):
        named["model.path"] = config.model.path
    absolute = {key: str(Path(path).absolute()) for key, path in named.items() if path and Path(path).exists()}
    remote = {key: path for key, path in named.items() if path and (is_url(path) or Path(path).is_absolute())}
    return {**remote, **absolute}


def _data_bytes(config: Comparison) -> int:
    """Bytes of the task's data: its files, or the language's tables of every response (16 bytes each per policy)."""
    if isinstance(config.task, TextTask):
        return sum(_bytes_at(path) for path in {config.task.data, config.task.test_data or config.task.data})
    language = Language(config.task)
    responses = sum((language.vocab_size - 1) ** length for length in range(config.task.response_limit + 1))
    return 16 * responses * config.task.num_prompts * (1 + len(config.entries) * len(config.seeds)) // 3


def _bytes_at(path: str) -> int:
    if is_url(path):
        return sum(size or 0 for _, size, _ in fingerprint(path))
    files = Path(path).rglob("*") if Path(path).is_dir() else [Path(path)]
    return sum(file.stat().st_size for file in files if file.is_file())
