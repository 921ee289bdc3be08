"""What a comparison is given to run on: engines, workers, scorers, and which of them may share a device."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefarena.config.labels import Labels, kept_apart
from prefarena.settings.section import Section

Dtype = Literal["float32", "bfloat16"]
#: The same words as `modeling.arithmetic.Arithmetic`, which machines without pydantic import.
Arithmetic = Literal["float32", "tf32", "bfloat16"]


def usual_dtype(use_gpu: bool) -> Dtype:
    """What `auto` is on GPUs, or on CPUs."""
    return "bfloat16" if use_gpu else "float32"


class Generation(Section):
    """The vLLM engines behind the generation actors."""

    num_actors: int = Field(1, ge=1, description="Number of generation actors, which share the prompts evenly.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Number of devices on one node over which each actor's engine is spread (vLLM's tensor "
        "parallelism, which splits every layer). For models that do not fit on one device, or are slow on one.",
    )
    cpus: float = Field(
        1, ge=0, description="CPUs (and OpenMP threads) for each of the actor's devices; used when use_gpu is false."
    )
    gpus: float = Field(
        1,
        gt=0,
        le=1,
        description="GPUs for each of the actor's devices, when use_gpu is true; a fraction where trainer and "
        "engine share one.",
    )
    labels: Labels = Field((), description="Labels of the nodes that may run generation actors, e.g. {role: generate}.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the engines' weights and products. auto: bfloat16 on GPUs, float32 on CPUs; "
        "on-policy methods weight tokens to correct for the difference from the trainer's log-probs "
        "(importance_cap).",
    )
    batch_invariant: bool = Field(
        False,
        description="Engines on GPUs compute a sequence in the same way whatever else is in its batch (vLLM's "
        "VLLM_BATCH_INVARIANT), so that the same seed gives the same samples; this is slower.",
    )
    kv_cache_gib: int = Field(
        1, ge=1, description="Size of the KV cache of each device when generating on CPUs, in whole GiB."
    )
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    max_num_seqs: int = Field(256, ge=1)
    weight_sync: Literal["host", "nccl", "ipc"] = Field(
        "host",
        description="How new weights reach the engines: through host memory and Ray's object store (any device), NCCL "
        "(trainer and engine on different GPUs), or CUDA IPC (on the same GPU).",
    )
    sleep_mode: Literal["none", "keep", "discard"] = Field(
        "none",
        description="What engines do with the memory of GPUs that they share with training workers while those "
        "learn. keep: weights move to the host's memory and the cache is dropped (vLLM's sleep, level 1); discard: "
        "weights are dropped as well, and every update sends all of them (level 2); none: engines keep all of it.",
    )
    verify_weights: bool = Field(
        True, description="Compare a checksum of the weights that each engine holds with that of what was sent."
    )
    start_timeout_s: float = Field(300, gt=0)
    generate_timeout_s: float = Field(600, gt=0)
    sync_timeout_s: float = Field(
        120,
        gt=0,
        description="Longest wait for one step of a weight update, plus a second for every 32 MiB of weights.",
    )

    def dtype_on(self, use_gpu: bool) -> Dtype:
        """What `dtype` says of engines on GPUs, or on CPUs."""
        return usual_dtype(use_gpu) if self.dtype == "auto" else self.dtype


class Scoring(Section):
    """What scores finished text: the reference's log-probs of pairs, and evaluations from samples."""

    num_actors: int | None = Field(
        None,
        ge=1,
        description="How many processes score at the same time: actors for log-probs and labels, and tasks of each "
        "evaluation from samples; by default resources.num_workers.",
    )
    cpus: float = Field(
        1, gt=0, description="CPUs of each of these processes, which has as many torch threads, but at least one."
    )
    gpus: float | None = Field(
        None,
        gt=0,
        le=1,
        description="GPUs of each of these processes, when use_gpu is true; by default resources.gpus_per_worker.",
    )
    labels: Labels = Field((), description="Labels of the nodes that these processes may run on.")
    dtype: Literal["auto"] | Arithmetic = Field(
        "auto",
        description="Precision of the weights and products of models that measure: an evaluation's policy and "
        "reference, learned and classifier judges (whose heads stay in float32), and the reference on test pairs. "
        "auto: bfloat16 on GPUs, float32 on CPUs. Training pairs are scored in the precision of the training that "
        "reads them (training.precision).",
    )


class Resources(Section):
    """What is asked of the cluster."""

    num_workers: int = Field(1, ge=1, description="Number of Ray Train workers of a training run.")
    cpus_per_worker: float = Field(1, ge=1, description="CPUs, and torch threads, of each worker.")
    use_gpu: bool = Field(
        False,
        description="Whether workers, engines and scorers use GPUs; if false, none is used even where there is one.",
    )
    gpus_per_worker: float = Field(
        1, gt=0, le=1, description="GPUs of each worker, when use_gpu is true; a fraction with weight_sync: ipc."
    )
    labels: Labels = Field((), description="Labels of the nodes that may run training workers, e.g. {role: train}.")
    scoring: Scoring = Scoring()
    concurrent_runs: int | None = Field(
        None,
        ge=0,
        description="How many groups of trainings run at the same time; 0: as many as the cluster has room for. By "
        "default 0 where each worker has GPUs of its own, and otherwise 1, because groups that share a machine slow "
        "each other down.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: each worker of a training holds a part of the weights, gradients and optimizer state "
        "(FSDP2), and in on-policy training a part of the reference and the reward model as well; none: each worker "
        "holds all of them (DDP).",
    )
    cpu_offload: bool = Field(
        False,
        description="With sharding: fsdp on GPUs, even with one worker: weights, gradients and optimizer state are "
        "kept in the host's memory, and a GPU holds only what it is computing with. Slower; for models that do not "
        "fit otherwise.",
    )
    autoscaled: bool = Field(
        False,
        description="The cluster grows on demand: a comparison waits for what the cluster does not have yet, "
        "instead of being refused.",
    )
    check_memory: bool = Field(
        True,
        description="Refuse, before any work, a training that needs more memory than any worker could have; false: "
        "try it all the same.",
    )
    start_timeout_s: float = Field(
        300, gt=0, description="Longest wait for a group of training workers to be placed, including a second attempt."
    )
    task_timeout_s: float = Field(
        3600, gt=0, description="Longest wait for a Ray task to end: drawing pairs, scoring responses, an evaluation."
    )
    max_failures: int = Field(
        2, ge=0, description="How many deaths of workers a Ray Train run recovers from, and as many of its controller."
    )
    cache_dir: str | None = Field(
        None,
        description="Where each node keeps its copies if `output` is a URL; by default ~/.cache/prefarena.",
    )
    storage_retry_s: float = Field(
        120, ge=0, description="How long a training worker retries storage whose failure may be temporary."
    )

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where models are scored. Never asked of the machine: Ray shows GPUs to tasks that were given none."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def num_groups(self) -> int:
        """`concurrent_runs`, decided; 0: as many as the cluster has room for."""
        if self.concurrent_runs is None:
            return 0 if self.use_gpu and self.gpus_per_worker == 1 else 1
        return self.concurrent_runs


def check_devices(resources: Resources, generation: Generation) -> None:
    """Raise ValueError for what cannot be placed, or could not be joined where Ray would place it."""
    _check_offload(resources)
    _check_sleep(resources, generation)
    _check_weight_sync(resources, generation)
    _check_gpus(resources, generation)


def _check_offload(resources: Resources) -> None:
    if not resources.cpu_offload:
        return
    if not resources.use_gpu:
        raise ValueError(
            "resources.cpu_offload moves weights and optimizer state from GPUs to the host's memory, but without "
            "resources.use_gpu: true everything is there already; remove it"
        )
    if resources.sharding != "fsdp":
        raise ValueError(
            "resources.cpu_offload applies to what resources.sharding: fsdp cuts into parts; set that, even with one "
            "worker"
        )


def _check_sleep(resources: Resources, generation: Generation) -> None:
    told, mode = f"generation.sleep_mode: {generation.sleep_mode}", generation.sleep_mode
    if mode == "none":
        return
    if not resources.use_gpu:
        raise ValueError(f"{told} is for engines on GPUs; it needs resources.use_gpu: true")
    if generation.tensor_parallel > 1:
        raise ValueError(
            f"{told} is for engines that share a worker's GPU, but one with generation.tensor_parallel: "
            f"{generation.tensor_parallel} takes whole GPUs; use several engines of one GPU each"
        )
    if resources.gpus_per_worker + generation.gpus > 1 or kept_apart(resources.labels, generation.labels):
        raise ValueError(
            f"{told} makes room for a worker on the same GPU, but here each has its own; let them share one, e.g. with "
            "resources.gpus_per_worker: 0.9 and generation.gpus: 0.1, or remove it"
        )


def _check_weight_sync(resources: Resources, generation: Generation) -> None:
    if generation.weight_sync != "host" and not resources.use_gpu:
        raise ValueError(f"generation.weight_sync: {generation.weight_sync} needs resources.use_gpu: true")
    if generation.weight_sync != "ipc":
        return
    if generation.tensor_parallel > 1:
        raise ValueError(
            "generation.weight_sync: ipc is for an engine on the trainer's own GPU; use nccl or host with "
            f"generation.tensor_parallel: {generation.tensor_parallel}"
        )
    if resources.num_workers > 1 or generation.num_actors > 1:
        raise ValueError(
            "generation.weight_sync: ipc is for one worker and one actor on the same GPU; use nccl or host with "
            f"{resources.num_workers} workers and {generation.num_actors} actors"
        )
    if resources.gpus_per_worker + generation.gpus > 1:
        raise ValueError(
            "generation.weight_sync: ipc needs worker and actor on the same GPU; lower resources.gpus_per_worker "
            f"({resources.gpus_per_worker:g}) and generation.gpus ({generation.gpus:g}) to at most 1 together"
        )
    if kept_apart(resources.labels, generation.labels):
        raise ValueError(
            "generation.weight_sync: ipc needs worker and actor on the same GPU, but no node meets both "
            "resources.labels and generation.labels; change one, or use nccl or host"
        )


def _check_gpus(resources: Resources, generation: Generation) -> None:
    """Refuse what needs GPUs without them, and processes that talk over NCCL and may be given one GPU, which NCCL
    takes once in a group.
    """
    if not resources.use_gpu:
        if generation.batch_invariant:
            raise ValueError("generation.batch_invariant is for engines on GPUs; it needs resources.use_gpu: true")
        return
    if generation.tensor_parallel > 1 and generation.gpus != 1:
        raise ValueError(
            f"generation.tensor_parallel: {generation.tensor_parallel} takes whole GPUs, which its ranks join over "
            f"NCCL; set generation.gpus ({generation.gpus:g}) to 1"
        )
    if resources.num_workers > 1 and 2 * resources.gpus_per_worker <= 1:
        raise ValueError(
            f"resources.gpus_per_worker: {resources.gpus_per_worker:g} puts several of resources.num_workers: "
            f"{resources.num_workers} on one GPU, which NCCL refuses; set it above 0.5, or num_workers to 1"
        )
    if generation.weight_sync != "nccl":
        return
    together = resources.gpus_per_worker + generation.gpus <= 1
    if together and not kept_apart(resources.labels, generation.labels):
        raise ValueError(
            "generation.weight_sync: nccl needs worker and actor on different GPUs; raise "
            f"resources.gpus_per_worker ({resources.gpus_per_worker:g}) and generation.gpus ({generation.gpus:g}) "
            "to more than 1 together, or use ipc or host on one GPU"
        )
    if generation.num_actors > 1 and 2 * generation.gpus <= 1:
        raise ValueError(
            f"generation.weight_sync: nccl needs each of generation.num_actors: {generation.num_actors} on a GPU "
            f"of its own; set generation.gpus ({generation.gpus:g}) above 0.5, or use host"
        )
