"""Checking whether a worker can hold the least that a comparison's trainings need, before anything expensive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from pipelines.jobs import max_length
from pipelines.plan import SeedPlan
from prefarena.cluster.doctor import gibibytes, largest_room, on_nodes
from prefarena.cluster.needs import Training, least_need, num_parameters, trainings
from prefarena.cluster.probe import NodeReport, ask_nodes
from prefarena.config import Comparison, PretrainedModel, TextTask, reward_of
from prefarena.errors import UserError
from prefarena.modeling.inspection import inspect_policy
from prefarena.modeling.load import new_settings
from prefarena.modeling.memory import MemoryNeed
from prefarena.stages import Stage
from prefarena.tasks.language import Language

_ANSWER_LIMIT_S = 60.0
#: Parameters; what trains a smaller model needs 3 GiB at most, and nodes are not asked for its sake.
LARGE = 10**8


def check_memory(config: Comparison, plans: list[SeedPlan]) -> None:
    """Raise UserError for a training still to be done that no GPU, or node, of the cluster could hold. Needs Ray.

    Only what is certain is refused: where the largest device cannot hold the least that a worker needs. What a training
    needs with its longest sequences is for the doctor, which warns.
    """
    settings = model_settings(config) if config.resources.check_memory else None
    if settings is None or num_parameters(settings) < LARGE:
        return
    waiting = to_do(plans)
    left = [training for training in trainings(config) if training.where in waiting]
    reports, silent = ask_nodes(None, "", _ANSWER_LIMIT_S) if left else ([], [])
    if not silent:
        for training in left:
            refuse_what_cannot_fit(config, training, settings, reports)


def to_do(plans: Sequence[SeedPlan]) -> set[str]:
    """The keys of the trainings whose stages are neither finished nor failed."""
    found: dict[str, list[Stage | None]] = {
        "reference.training": [plan.reference for plan in plans],
        "judge.training": [plan.judge for plan in plans],
    }
    for trained in (one for plan in plans for one in plan.trained):
        where = f"entries.{trained.entry.name}.method"
        if (keyed := reward_of(trained.entry.method)) is not None:
            found.setdefault(f"{where}.{keyed[0]}.training", []).append(trained.reward_model)
        found.setdefault(f"{where}.training", []).append(trained.training)
    return {where for where, stages in found.items() if any(stage and not stage.settled for stage in stages)}


def refuse_what_cannot_fit(
    config: Comparison, training: Training, settings: PretrainedConfig, reports: Sequence[NodeReport]
) -> None:
    """Raise UserError where the largest GPU, or node, has less than a worker needs at the least."""
    room = largest_room(config, reports, training.on_policy)
    need = least_need(training, settings) if room is not None else None
    if need is None or room is None:
        return
    hosts = [int(report.memory_mib) * 2**20 for report in on_nodes(reports, config.resources.labels)]
    if need.host > max(hosts):
        raise UserError(
            f"{training.where}: a worker keeps {gibibytes(need.host)} in its host's memory (resources.cpu_offload), "
            f"but the largest node available to it has {gibibytes(max(hosts))}; raise resources.num_workers, or set "
            f"{training.where}.lora; resources.check_memory: false tries it anyway"
        )
    waking = int(room * config.generation.gpu_memory_utilization)
    if training.on_policy and config.generation.sleep_mode != "none" and need.weights + need.optimizer + waking > room:
        raise UserError(
            f"{training.where}: between two updates a worker holds {gibibytes(need.weights + need.optimizer)}, and "
            f"the engine that wakes on the same GPU takes {gibibytes(waking)} of the {gibibytes(room)} of the largest "
            f"GPU; lower "
            "generation.gpu_memory_utilization, or set resources.cpu_offload; resources.check_memory: false tries it "
            "anyway"
        )
    if need.total > room:
        what = "GPU" if config.resources.use_gpu else "node"
        raise UserError(
            f"{training.where}: a worker needs at least {_listed(need)}, however short its sequences are, and the "
            f"largest {what} that it may have offers {gibibytes(room)}; {_advice(config, training)}; "
            "resources.check_memory: false tries it all the same"
        )


def _listed(need: MemoryNeed) -> str:
    return (
        f"{gibibytes(need.total)} (weights {gibibytes(need.weights)}, gradients {gibibytes(need.gradients)}, optimizer "
        f"{gibibytes(need.optimizer)}, passes or weights on their way to engines {gibibytes(need.activations)})"
    )


def _advice(config: Comparison, training: Training) -> str:
    """The settings that would lower the need, of those that are not set yet."""
    sharded = config.resources.sharding == "fsdp"
    found = ["raise resources.num_workers" if sharded else "set resources.sharding: fsdp with several num_workers"]
    if training.settings.lora is None:
        found.append(f"set {training.where}.lora")
    if training.settings.precision != "bfloat16":
        found.append(f"set {training.where}.precision: bfloat16")
    if config.resources.use_gpu and not config.resources.cpu_offload:
        found.append("set resources.cpu_offload" + ("" if sharded else " with sharding: fsdp"))
    if training.on_policy and config.generation.weight_sync == "ipc":
        found.append("lower generation.gpu_memory_utilization")
    return ", or ".join(found)


def model_settings(config: Comparison) -> PretrainedConfig | None:
    """The comparison's model as a configuration, without weights; None if no model can be made with it."""
    if isinstance(config.model, PretrainedModel):
        try:
            return inspect_policy(config.model.path, config.model.revision)
        except UserError:  # `check_input` has told it
            return None
    task, model = config.task, config.model
    vocab_size = model.vocab_size if isinstance(task, TextTask) else Language(task).vocab_size
    return new_settings(model, vocab_size, max_length(task))
