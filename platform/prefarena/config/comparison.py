"""A comparison: entries x seeds on one task, and what it is given to run on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, model_validator

from prefarena import methods
from prefarena.config.best_of_n import BestOfN
from prefarena.config.labels import Labels, kept_apart
from prefarena.config.models import Model, ScratchModel
from prefarena.config.tasks import LanguageTask, Task, TextTask
from prefarena.config.tracking import Tracking
from prefarena.methods import on_policy
from prefarena.settings.judges import EvaluationJudge, PairwiseJudge, RewardModel
from prefarena.settings.off_policy import OffPolicy
from prefarena.settings.on_policy import OnPolicy
from prefarena.settings.optimisation import Optimisation
from prefarena.settings.section import Section

#: Every method, as their files are found.
METHODS: tuple[type[Section], ...] = (*methods.discover().values(), *on_policy.discover().values(), BestOfN)
OffPolicyMethod = OffPolicy
OnPolicyMethod = OnPolicy
if TYPE_CHECKING:  # a union that is made of what is found means nothing to a type checker
    Method = OffPolicy | OnPolicy | BestOfN
else:
    Method = Annotated[Union[METHODS], Field(discriminator="kind")]  # noqa: UP007


class Reference(Section):
    """How the reference policy is made from the base model: SFT on the demonstrations."""

    train: bool = Field(True, description="False: the base model is the reference as it is.")
    loss_on: Literal["response", "all"] = Field("response", description="`all` also learns the prompt's tokens.")
    seed: int = 0
    training: Optimisation = Optimisation(learning_rate=3e-3, num_steps=400, batch_size=256)


class Entry(Section):
    """A method with settings, in a comparison."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=-]*$", description="Unique; used in tables and folder names.")
    group: str | None = Field(None, description="Name of the grid it belongs to in a sweep; none: the method's name.")
    method: Method


Dtype = Literal["float32", "bfloat16"]
#: The same words as `modeling.arithmetic.Arithmetic`, which machines without pydantic import.
Arithmetic = Literal["float32", "tf32", "bfloat16"]


def _usual(use_gpu: bool) -> Dtype:
    """What `auto` is on GPUs, or on CPUs."""
    return "bfloat16" if use_gpu else "float32"


class Generation(Section):
    """The vLLM engines behind the generation actors."""

    num_actors: int = Field(1, ge=1, description="Generation actors; prompts are balanced over them.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Devices of one node that each actor's engine is spread over: vLLM's tensor parallelism, every "
        "layer cut among them. For models that one device does not hold, or is slow with.",
    )
    cpus: float = Field(
        1, ge=0, description="CPUs (and OpenMP threads) of each of the actor's devices; used when use_gpu is false."
    )
    gpus: float = Field(
        1,
        gt=0,
        le=1,
        description="Of each of the actor's devices, when use_gpu is true; a share where trainer and engine share one.",
    )
    labels: Labels = Field((), description="Labels of the nodes that hold generation actors, e.g. {role: generate}.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the engines' weights and products. auto: bfloat16 on GPUs, float32 on CPUs; on-policy methods "
        "weigh tokens for the difference to the trainer's log-probs (importance_cap).",
    )
    batch_invariant: bool = Field(
        False,
        description="Engines on GPUs compute a sequence in the same way whatever shares its batch (vLLM's "
        "VLLM_BATCH_INVARIANT), so that the same seed gives the same samples; it is slower.",
    )
    kv_cache_gib: int = Field(1, ge=1, description="KV cache on CPU, whole GiB, of each device.")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    max_num_seqs: int = Field(256, ge=1)
    weight_sync: Literal["host", "nccl", "ipc"] = Field(
        "host",
        description="How new weights reach the engines: through host memory and Ray's object store (any device), NCCL "
        "(trainer and engine on different GPUs), or CUDA IPC (on the same GPU).",
    )
    verify_weights: bool = Field(True, description="Compare a checksum of what each engine holds with what was sent.")
    start_timeout_s: float = Field(300, gt=0)
    generate_timeout_s: float = Field(600, gt=0)
    sync_timeout_s: float = Field(
        120,
        gt=0,
        description="Longest wait for a step of an update of weights; with a second for every 32 MiB of them.",
    )

    def dtype_on(self, use_gpu: bool) -> Dtype:
        """What `dtype` says of engines on GPUs, or on CPUs."""
        return _usual(use_gpu) if self.dtype == "auto" else self.dtype


class Scoring(Section):
    """What scores finished text: the reference's log-probs of pairs, and evaluations from samples."""

    num_actors: int | None = Field(
        None,
        ge=1,
        description="How many score at the same time: actors for log-probs and labels, and tasks of each evaluation "
        "from samples; none: resources.num_workers.",
    )
    cpus: float = Field(1, gt=0, description="CPUs of each; its torch threads, and at least one.")
    gpus: float | None = Field(
        None, gt=0, le=1, description="GPUs of each, when use_gpu is true; none: resources.gpus_per_worker."
    )
    labels: Labels = Field((), description="Labels of the nodes that they run on.")
    dtype: Literal["auto"] | Arithmetic = Field(
        "auto",
        description="Of the weights and products of what measures: an evaluation's policy and reference, learned and "
        "classifier judges (their heads stay in float32), the reference on test pairs. auto: bfloat16 on GPUs, float32 "
        "on CPUs. Training pairs are scored as the training that reads them computes (training.precision).",
    )


class Resources(Section):
    """What is asked of the cluster."""

    num_workers: int = Field(1, ge=1, description="Ray Train workers of a training run.")
    cpus_per_worker: float = Field(1, ge=1, description="CPUs, and torch threads, of each worker.")
    use_gpu: bool = Field(
        False, description="Whether workers, engines and scorers have GPUs; without it none is used, even where one is."
    )
    gpus_per_worker: float = Field(1, gt=0, le=1, description="When use_gpu is true; a share for weight_sync: ipc.")
    labels: Labels = Field((), description="Labels of the nodes that hold training workers, e.g. {role: train}.")
    scoring: Scoring = Scoring()
    concurrent_runs: int | None = Field(
        None,
        ge=0,
        description="Groups of off-policy trainings at the same time; 0: as many as the cluster has room for. None: 0 "
        "where each worker has GPUs of its own, else 1, because groups that share a machine slow each other down.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: each worker of a training holds a part of weights, gradients and optimizer state (FSDP2), "
        "and an on-policy one a part of its reference and reward model as well; none: each holds all of them (DDP).",
    )
    autoscaled: bool = Field(
        False, description="The cluster grows on demand: what it has not yet is waited for, not refused."
    )
    check_memory: bool = Field(
        True,
        description="Refuse, before any work, a training of which no worker could hold what it needs at the least; "
        "false: try it all the same.",
    )
    start_timeout_s: float = Field(
        300, gt=0, description="Longest wait for a group of training workers to be placed, one more attempt included."
    )
    task_timeout_s: float = Field(
        3600, gt=0, description="Longest wait for a Ray task to end: drawing pairs, scoring responses, an evaluation."
    )
    max_failures: int = Field(
        2, ge=0, description="Deaths of workers that a Ray Train run recovers from, and as many of its controller."
    )
    cache_dir: str | None = Field(
        None,
        description="Where nodes keep their copies where `output` is a URL; none: ~/.cache/prefarena of each.",
    )
    storage_retry_s: float = Field(
        120, ge=0, description="How long a training worker asks storage again that fails in a way that may pass."
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


class Evaluation(Section):
    """How every entry is evaluated. Enumerable tasks are evaluated exactly; these settings are for the others."""

    num_prompts: int = Field(128, ge=1, description="Held-out prompts to sample on.")
    samples_per_prompt: int = Field(2, ge=1)
    temperature: float = Field(1.0, gt=0)
    batch_size: int = Field(
        64, ge=1, description="Most sequences in a forward pass, which has 8,192 tokens at most, or one sequence."
    )
    num_reference_samples: int = Field(
        512, ge=2, description="Samples of the reference on training prompts, on which learned rewards are normalised."
    )
    frontier_samples: int = Field(
        0,
        ge=0,
        description="Text tasks: samples of the reference on each held-out prompt, from which the best score at any KL "
        "is estimated, and each entry's regret; 0: not estimated, else at least 8. n samples show a KL of up to about "
        "log n - 2 nats.",
    )
    num_coverage_prompts: int | None = Field(
        None,
        ge=0,
        description="Text tasks with task.covered_share below 1: training prompts with pairs, and as many without, on "
        "which policies are sampled and measured beside the held-out ones; none: num_prompts.",
    )
    win_matrix: bool = Field(True, description="Win rates between all entries, not only against the reference.")
    seed: int = 0

    @model_validator(mode="after")
    def _few_samples_show_no_frontier(self) -> Evaluation:
        if 0 < self.frontier_samples < 8:
            raise ValueError("frontier_samples: fewer than 8 samples per prompt show no frontier; give 0 or at least 8")
        return self


def _with_value(section: Section, value: object, where: str = "") -> Iterator[str]:
    """The settings within a section that have this value, by their full names; entries by their own."""
    for name, own in section:
        found = {name: own} if not isinstance(own, tuple) else {f"{name}[{at}]": one for at, one in enumerate(own)}
        for key, one in found.items():
            label = f"{name}.{one.name}" if isinstance(one, Entry) else key
            if isinstance(one, Section):
                yield from _with_value(one, value, f"{where}{label}.")
            elif one == value:
                yield f"{where}{label}"


class Comparison(Section):
    """Entries x seeds on one task: what `prefarena compare` runs."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: str = Field(
        "runs",
        description="Folder for stages and run folders: a path that all nodes share, or a URL of an object store.",
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    seeds_vary: Literal["training", "task"] = Field(
        "training",
        description="`training`: seeds share task, reference and pairs. `task`: on the enumerable language every seed "
        "is another language with its own reference and pairs, so that standard errors speak of more than one.",
    )
    task: Task = LanguageTask()
    model: Model = ScratchModel()
    reference: Reference = Reference()
    entries: tuple[Entry, ...] = Field(min_length=1)
    judge: EvaluationJudge = Field(
        RewardModel(), description="Text tasks: the evaluation's judge; a learned one is trained on pairs of its own."
    )
    generation: Generation = Generation()
    resources: Resources = Resources()
    evaluation: Evaluation = Evaluation()
    tracking: tuple[Tracking, ...] = Field(
        (), description="Where trainings are shown beside their own logs: tensorboard, wandb, mlflow, trackio."
    )

    @property
    def scored_in(self) -> Arithmetic:
        """`resources.scoring.dtype`, decided. The enumerable language is measured exactly, on CPUs, in float32."""
        if self.task.kind == "language":
            return "float32"
        chosen = self.resources.scoring.dtype
        return _usual(self.resources.use_gpu) if chosen == "auto" else chosen

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        names = [entry.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1 or name == "reference":
                raise ValueError(f"entry name {name!r} is used twice or reserved")
        if len(set(self.tracking)) != len(self.tracking):
            raise ValueError("tracking holds the same tracker twice")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds a seed twice")
        for entry in self.entries:
            reward = getattr(entry.method, "reward", None)
            if reward is not None and reward.kind == "gold" and self.task.kind != "language":
                raise ValueError(f"entry {entry.name!r}: reward kind gold is the enumerable language's own")
        if self.judge.kind == "gold" and self.task.kind != "language":
            raise ValueError("judge kind gold is the enumerable language's own")
        if self.task.kind == "language" and self.resources.scoring.dtype not in ("auto", "float32"):
            raise ValueError(
                f"resources.scoring.dtype: {self.resources.scoring.dtype} is for text tasks; the enumerable language "
                "is measured exactly, in float32"
            )
        if self.evaluation.frontier_samples and self.judge.kind == "pairwise" and self.task.kind != "language":
            raise ValueError(
                "evaluation.frontier_samples: a frontier is of scores, and judge kind pairwise gives none; set it to 0"
            )
        self._check_drawn_pairs()
        self._check_weight_sync()
        self._check_gpus()
        if self.seeds_vary == "task" and self.task.kind != "language":
            raise ValueError("seeds_vary: task is for the enumerable language; a text task has one set of data")
        return self

    def _check_drawn_pairs(self) -> None:
        pairs = self.task.pairs if isinstance(self.task, TextTask) else None
        if pairs is None or not any(isinstance(judge, PairwiseJudge) for judge in pairs.judges(self.judge)):
            return
        wrong = [("choose", "best_worst"), ("labels", "bradley_terry")]
        given = next((f"{name}: {value}" for name, value in wrong if getattr(pairs, name) == value), None)
        if given is None and any(a.noise > 0 and a.judge is None for a in pairs.annotators):
            given = "noise"
        if given is not None:
            raise ValueError(f"task.pairs.{given} needs scores, and a pairwise judge gives none; use another annotator")

    def _check_weight_sync(self) -> None:
        resources, generation = self.resources, self.generation
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
                "generation.weight_sync: ipc needs worker and actor on the same GPU, and no node meets both "
                "resources.labels and generation.labels; change one, or use nccl or host"
            )

    def _check_gpus(self) -> None:
        """Refuse what needs GPUs without them, and processes that talk over NCCL and may be given one GPU, which NCCL
        takes once in a group.
        """
        resources, generation = self.resources, self.generation
        if not resources.use_gpu:
            if generation.batch_invariant:
                raise ValueError("generation.batch_invariant is of engines on GPUs; it needs resources.use_gpu: true")
            for where in _with_value(self, "tf32"):
                raise ValueError(f"{where}: tf32 is how GPUs multiply; it needs resources.use_gpu: true")
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
