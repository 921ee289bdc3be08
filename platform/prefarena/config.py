"""Typed configuration: the one home of every default.

A comparison is `entries x seeds` on one `task`. Unknown keys are errors that suggest the right one (see
`load_config`). Every model here is frozen: a resolved configuration is a value, and stages hash it.
"""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prefarena.errors import UserError


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --------------------------------------------------------------------------------------------- models


class ScratchModel(Section):
    """A Llama with random weights, made from these sizes (no hub needed)."""

    kind: Literal["scratch"] = "scratch"
    hidden_size: int = Field(64, ge=32, description="Width; hidden_size / num_heads must be 32 or 64 for vLLM on CPU.")
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(192, ge=8)
    vocab_size: int = Field(
        2048, ge=300, description="Text tasks: size of the byte-level BPE trained on the task's own text."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ScratchModel:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        return self


class PretrainedModel(Section):
    """A transformers checkpoint: a hub id or a folder."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(description="Hub id or path of a causal language model with its tokenizer.")
    revision: str | None = None


Model = Annotated[ScratchModel | PretrainedModel, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------------- tasks


class LanguageTask(Section):
    """The enumerable language: every response to every prompt can be listed, so nothing is estimated."""

    kind: Literal["language"] = "language"
    seed: int = Field(0, description="Seed of the source of demonstrations and of the gold reward.")
    num_letters: int = Field(13, ge=2, le=13, description="Letters; with pad, bos and eos at most 16 tokens.")
    num_prompts: int = Field(64, ge=2)
    prompt_letters: int = Field(3, ge=1, le=6)
    response_limit: int = Field(4, ge=1, le=4, description="Most tokens in a response, its eos included.")
    num_demonstrations: int = Field(16384, ge=1, description="Drawn from the source, over all prompts.")
    covered_share: float = Field(0.5, gt=0, le=1, description="Share of the prompts that have preference pairs.")
    num_pairs: int = Field(
        16384, ge=2, description="Training pairs, drawn from the reference policy on covered prompts."
    )
    num_test_pairs: int = Field(1024, ge=2, description="Held-out pairs, on the same covered prompts.")
    labels: Literal["deterministic", "bradley_terry"] = "deterministic"
    label_temperature: float = Field(
        1.0, gt=0, description="Bradley-Terry labels: P(y1 > y2) = sigmoid((r1 - r2) / T)."
    )


class TextTask(Section):
    """Preference data as people have it: files, a saved dataset, or a hub id."""

    kind: Literal["text"] = "text"
    data: str = Field(description="jsonl(.gz) or parquet file or folder, a folder saved by `datasets`, or a hub id.")
    split: str = Field("train", description="Split to read, for a saved DatasetDict or a hub id.")
    format: Literal["auto", "standard", "conversational", "hh"] = Field(
        "auto",
        description="Row format; `auto` recognises TRL's formats (explicit and implicit prompt) and raw HH-RLHF.",
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows.")
    test_share: float = Field(0.2, gt=0, lt=1, description="Share of prompts held out for evaluation.")
    judge_share: float = Field(
        0.2, gt=0, lt=1, description="Share of prompts held out to train the evaluation judge (a second reward model)."
    )
    split_seed: int = 0
    max_prompt_tokens: int = Field(256, ge=1, description="Longer prompts keep their last tokens or are dropped.")
    long_prompts: Literal["drop", "keep_end"] = "drop"
    max_response_tokens: int = Field(128, ge=1, description="Longer responses keep their first tokens (and lose eos).")
    max_rejected_share: float = Field(0.5, ge=0, le=1, description="More rows than this dropped stops the run.")
    pretraining_text: str | None = Field(None, description="jsonl(.gz) with a `text` column, for gamma > 0.")


Task = Annotated[LanguageTask | TextTask, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------- training


class Optimisation(Section):
    """One training run: AdamW, linear warm-up, then the schedule. Batch sizes are global (all workers)."""

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, ge=1, description="Sequences or pairs per optimizer step, over all workers.")
    micro_batch_size: int = Field(64, ge=1, description="Sequences or pairs per forward pass of one worker.")
    num_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_epochs.")
    num_epochs: float = Field(1.0, gt=0)
    warmup_steps: int = Field(10, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast, float32 master weights."
    )
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(10, ge=1, description="Steps between metric rows.")


class Reference(Section):
    """How the reference policy is made from the base model: SFT on the demonstrations."""

    train: bool = Field(True, description="False: the base model is the reference as it is.")
    loss_on: Literal["response", "all"] = Field("response", description="`all` also learns the prompt's tokens.")
    seed: int = 0
    training: Optimisation = Optimisation(learning_rate=3e-3, num_steps=400, batch_size=256, micro_batch_size=256)


class OffPolicy(Section):
    """Settings that every off-policy method shares."""

    demonstration_weight: float = Field(
        0.0, ge=0, description="eta: weight of -E[log pi(y|x)] on demonstrations, the off-policy forward-KL term."
    )
    demonstration_mean: Literal["sequences", "tokens"] = Field(
        "sequences", description="Mean of the demonstration term over sequences (the formula) or over tokens."
    )
    pretraining_weight: float = Field(0.0, ge=0, description="gamma: weight of -E[log pi(x)] on pretraining text.")
    training: Optimisation = Optimisation()


class MPO(OffPolicy):
    """Maximum Preference Optimization with importance sampling (arXiv 2312.16430)."""

    kind: Literal["mpo"] = "mpo"
    beta: float = Field(1.0, gt=0)
    reference: Literal["none", "precomputed"] = Field(
        "precomputed", description="`none` is the paper's final form; `precomputed` starts every pair at h = 0."
    )
    length_normalise: bool = False
    demonstration_weight: float = Field(0.05, ge=0, description="eta: weight of the off-policy forward-KL term.")


class DPO(OffPolicy):
    """Direct Preference Optimization (arXiv 2305.18290); label_smoothing > 0 is cDPO."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    length_normalise: bool = False


class IPO(OffPolicy):
    """Identity Preference Optimization (arXiv 2310.12036); sums over tokens, as the paper does."""

    kind: Literal["ipo"] = "ipo"
    tau: float = Field(0.1, gt=0)
    length_normalise: bool = Field(False, description="True averages log-ratios over tokens, as TRL does.")


class SFT(OffPolicy):
    """Supervised fine-tuning on the chosen responses."""

    kind: Literal["sft"] = "sft"


class RewardModel(Section):
    """Bradley-Terry reward model on the pairs, started from the reference policy's body."""

    training: Optimisation = Optimisation()
    centre_weight: float = Field(
        0.0, ge=0, description="Weight of (r_w + r_l)^2, which keeps scores near zero (2312.09244)."
    )


class PPOStep(Section):
    """Proximal Policy Optimization with a critic, arXiv 1707.06347; docs/methods.md says what is done exactly."""

    num_iterations: int = Field(40, ge=1, description="Rollout batches.")
    rollouts_per_iteration: int = Field(256, ge=2)
    num_epochs: int = Field(2, ge=1, description="Passes over each rollout batch.")
    num_minibatches: int = Field(4, ge=1, description="Optimizer steps per pass.")
    micro_batch_size: int = Field(64, ge=1, description="Rollouts per forward pass of one worker.")
    learning_rate: float = Field(1e-3, gt=0)
    critic_learning_rate: float = Field(2e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_iterations: int = Field(2, ge=0, description="Linear learning-rate warm-up.")
    kl_coef: float = Field(0.2, ge=0)
    target_kl: float | None = Field(
        None, gt=0, description="Adaptive KL controller's target (nats a sequence); none: fixed."
    )
    kl_horizon: int = Field(2048, ge=1, description="Adaptive KL controller's horizon, in rollouts.")
    discount: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0)
    value_clip: float = Field(0.2, gt=0)
    temperature: float = Field(1.0, gt=0)
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Subtracted from the score of a response cut off without eos."
    )
    reward_clip: float = Field(10.0, gt=0)
    importance_cap: float | None = Field(
        2.0, gt=0, description="Cap of the truncated trainer/generator importance weights; none turns them off."
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(10, ge=1, description="Iterations between checkpoints.")


class RLHF(Section):
    """Reward model on the pairs, then PPO with vLLM rollouts."""

    kind: Literal["rlhf"] = "rlhf"
    reward_model: RewardModel = RewardModel()
    prompts: Literal["covered", "all"] = Field("covered", description="Prompts that PPO samples on.")
    ppo: PPOStep = PPOStep()


Method = Annotated[MPO | DPO | IPO | SFT | RLHF, Field(discriminator="kind")]
OffPolicyMethod = MPO | DPO | IPO | SFT


class Entry(Section):
    """A method with settings, in a comparison."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=-]*$", description="Unique; used in tables and folder names.")
    group: str | None = Field(None, description="Name of the grid it belongs to in a sweep; none: the method's name.")
    method: Method


# ------------------------------------------------------------------------------- resources and the rest


class Generation(Section):
    """The vLLM engine behind the generation actor."""

    cpus: float = Field(1, ge=0, description="CPUs (and OpenMP threads) of the actor; used when use_gpu is false.")
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    kv_cache_gib: int = Field(1, ge=1, description="KV cache on CPU, whole GiB.")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    max_num_seqs: int = Field(256, ge=1)
    start_timeout_s: float = Field(300, gt=0)
    generate_timeout_s: float = Field(600, gt=0)
    sync_timeout_s: float = Field(120, gt=0)


class Resources(Section):
    """What is asked of the cluster."""

    num_workers: int = Field(1, ge=1, description="Ray Train workers of a training run.")
    cpus_per_worker: float = Field(1, ge=1, description="CPUs, and torch threads, of each worker.")
    use_gpu: bool = False
    concurrent_runs: int = Field(1, ge=1, description="Off-policy Ray Train runs at the same time.")
    start_timeout_s: float = Field(300, gt=0, description="Longest wait for workers to be placed and started.")
    max_failures: int = Field(2, ge=0, description="Worker failures that a Ray Train run recovers from.")


class Evaluation(Section):
    """How every entry is evaluated. Enumerable tasks are evaluated exactly; these settings are for the others."""

    num_prompts: int = Field(128, ge=1, description="Held-out prompts to sample on.")
    samples_per_prompt: int = Field(2, ge=1)
    temperature: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="Sequences per forward pass.")
    win_matrix: bool = Field(True, description="Win rates between all entries, not only against the reference.")
    seed: int = 0


class Comparison(Section):
    """Entries x seeds on one task: what `prefarena compare` runs."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: str = Field("runs", description="Folder for stages and run folders.")
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
    judge: RewardModel = Field(RewardModel(), description="Text tasks: the evaluation judge, trained on its own pairs.")
    generation: Generation = Generation()
    resources: Resources = Resources()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        names = [entry.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1 or name == "reference":
                raise ValueError(f"entry name {name!r} is used twice or reserved")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds a seed twice")
        if self.seeds_vary == "task" and self.task.kind != "language":
            raise ValueError("seeds_vary: task is for the enumerable language; a text task has one set of data")
        return self


# -------------------------------------------------------------------------------------------- loading

DEFAULT_CONFIG = Path(__file__).with_name("default.yaml")


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Comparison:
    """Read a comparison from YAML; `overrides` are `key.path=value` with YAML values.

    Entries can be addressed by name: `entries.dpo.method.beta=0.3`. Raises UserError with one sentence per
    problem, naming the key, and for an unknown key the nearest known one.
    """
    source = Path(path) if path is not None else DEFAULT_CONFIG
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{source}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a config is a mapping of keys, this is {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, str(source))


def parse_config(tree: dict[str, Any], source: str = "config") -> Comparison:
    """Validate a mapping. Raises UserError as `load_config` does."""
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, source) for problem in error.errors())) from None


def dump_config(config: Comparison) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override!r}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override!r}: {'.'.join(parents)} is a value, not a group of settings")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if not isinstance(node, dict):
        raise UserError(f"--set {override!r}: {part} lies under a value, not under a group of settings")
    return node.setdefault(part, {})


def _index(items: list[Any], part: str, override: str) -> int:
    for i, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == part:
            return i
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name")) for item in items if isinstance(item, dict)]
    raise UserError(f"--set {override!r}: no entry {part!r}; there are {', '.join(names) or len(items)}")


def _explain(problem: Any, source: str) -> str:
    """One sentence for one pydantic error."""
    location = [part for part in problem["loc"] if part not in _UNION_TAGS]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
        return f"{source}: unknown key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"{source}: key {key!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{source}: {key or 'config'}: {message[:1].lower()}{message[1:]}{shown}"


_UNION_TAGS = {"language", "text", "scratch", "pretrained", "mpo", "dpo", "ipo", "sft", "rlhf"}


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at `location`, which is a pydantic error location with union tags."""
    kind: Any = Comparison
    for part in location:
        if isinstance(part, int):
            kind = next(arg for arg in get_args(kind) if arg is not Ellipsis)
        elif part in _UNION_TAGS and not (isinstance(kind, type) and part in getattr(kind, "model_fields", {})):
            kind = next(arm for arm in _arms(kind) if arm.model_fields["kind"].default == part)
        else:
            kind = kind.model_fields[part].annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _arms(kind: Any) -> list[type[BaseModel]]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return list(get_args(kind))
    return [kind]
