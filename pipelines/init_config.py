"""The text of the config that `prefarena init` writes: few keys, each with the reason for its value."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from pipelines.starting_points import LORA_FACTOR, LORA_SOURCE, Rate, starting_point

_BATCH_SIZE = 32  # of Zephyr 7B and Tulu 2, for DPO
_STEP = 64  # limits of lengths are multiples of so many tokens
_KEPT = 0.99  # share of prompts and responses that limits leave whole
#: With --quick, at the most.
_QUICK_ROWS, _QUICK_STEPS, _QUICK_BATCH_SIZE, _QUICK_TOKENS = 200, 4, 8, 64


@dataclass(frozen=True)
class Hardware:
    """Hardware. num_gpus: on all machines together; 0 means CPUs only. num_cpus: of the machine, without GPUs."""

    num_gpus: int
    gpu_gib: float
    num_cpus: int

    @property
    def num_workers(self) -> int:
        """Training workers: a power of two, which shares every batch evenly, and leaves a GPU for an engine."""
        return 1 << ((self.num_gpus - 1).bit_length() - 1) if self.num_gpus > 1 else 1


@dataclass(frozen=True)
class Wanted:
    """The user's answers, or flags."""

    file: Path
    model: str
    data: str
    split: str
    hardware: Hardware
    quick: bool


@dataclass(frozen=True)
class Look:
    """What was found. prompts, responses: tokens of each of those looked at, in order; context: None where unknown.

    as_messages: the rows are transcripts that go through the model's chat template.
    """

    settings: PretrainedConfig
    num_parameters: int
    context: int | None
    has_template: bool
    as_messages: bool
    num_rows: int
    all_rows: bool
    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    @property
    def told_model(self) -> str:
        context = f"a context of {self.context:,} tokens" if self.context else "a context of unknown length"
        return f"{self.num_parameters:,} parameters, {context}, {'a' if self.has_template else 'no'} chat template"

    @property
    def told_data(self) -> str:
        rows = f"{self.num_rows:,} rows" if self.all_rows else f"the first {self.num_rows:,} rows"
        found = f"{rows}; prompts of {_told(self.prompts)}, responses of {_told(self.responses)}"
        return f"{found}; transcripts of HH-RLHF's form" if self.as_messages else found

    def limits(self, most: int | None = None) -> tuple[int, int]:
        """Tokens of a prompt, and of a response, that leave nearly all whole, as far as the model's context allows."""
        prompt, response = (_up(_at_share(lengths, _KEPT)) for lengths in (self.prompts, self.responses))
        if most is not None:
            response = min(response, most)
        if self.context is not None and prompt + response > self.context:
            response = min(response, self.context // 2)
            prompt = min(prompt, self.context - response)
        return prompt, response


@dataclass(frozen=True)
class Memory:
    """Settings of a training run that save memory; each gives up more than the one before."""

    precision: str = "float32"
    recomputes: bool = False
    sharded: bool = False
    adapters: bool = False

    @staticmethod
    def choices(hardware: Hardware) -> list[Memory]:
        precision, many = ("bfloat16", hardware.num_workers > 1) if hardware.num_gpus else ("float32", False)
        found = [Memory(precision), Memory(precision, True)]
        return [*found, *([Memory(precision, True, True)] if many else []), Memory(precision, True, many, True)]

    @property
    def settings(self) -> list[str]:
        """The settings as written in `training`, next to others."""
        found = [] if self.precision == "float32" else [f"precision: {self.precision}"]
        found += ["activation_checkpointing: true"] if self.recomputes else []
        found += ["lora: {rank: 16, alpha: 32}"] if self.adapters else []
        return found

    def rate(self, rate: Rate) -> str:
        return f"{rate.value * (LORA_FACTOR if self.adapters else 1):.1e}"


def config_text(wanted: Wanted, name: str, look: Look, memory: Memory) -> str:
    """Write the whole file."""
    parts = [_head(wanted, look), f"name: {name}", _seeds(), _task(wanted, look), _model(wanted, look, memory)]
    return (
        "\n".join([*parts, _judge(wanted, look, memory), _entries(wanted, look, memory), _rest(wanted, memory)]) + "\n"
    )


def _head(wanted: Wanted, look: Look) -> str:
    return "\n".join(
        [
            "# Written by `prefarena init` from a look at the model and the data: a starting point; nothing has been "
            "tuned.",
            "# Every setting with its default is in prefarena/config; `prefarena methods` lists the methods and their "
            "settings.",
            f"# Model: {look.told_model}.",
            f"# Data: {look.told_data}.",
            *(
                [
                    "# --quick: only a few rows and steps, to see that everything runs. The resulting numbers mean "
                    "nothing."
                ]
                * wanted.quick
            ),
        ]
    )


def _seeds() -> str:
    return "seeds: [0]  # several, such as [0, 1, 2], separate differences between methods from those between seeds"


def _task(wanted: Wanted, look: Look) -> str:
    prompt, response = look.limits(_QUICK_TOKENS if wanted.quick else None)
    lines = ["task:", "  kind: text", f"  data: {_quoted(wanted.data)}"]
    lines += [f"  split: {_quoted(wanted.split)}"] if wanted.split != "train" else []
    lines += ["  transcripts: messages  # through the model's chat template"] if look.as_messages else []
    lines += [f"  max_rows: {_QUICK_ROWS}"] if wanted.quick else []
    lines += [
        f"  max_prompt_tokens: {prompt}  # {_whole(look.prompts, prompt)} of the prompts in the sample fit whole",
        "  long_prompts: keep_end  # longer ones lose their beginning; `drop` leaves them out",
        f"  max_response_tokens: {response}  # {_whole(look.responses, response)} of the responses fit whole",
    ]
    return "\n".join(lines)


def _model(wanted: Wanted, look: Look, memory: Memory) -> str:
    lines = [f"model: {{kind: pretrained, path: {_quoted(wanted.model)}}}"]
    if look.has_template:
        lines += [
            "# The model has a chat template, so it has learnt to answer: it is itself the reference that methods "
            "start from.",
            "reference: {train: false}",
        ]
        return "\n".join(lines)
    rate = starting_point(look.num_parameters).sft
    lines += [
        "# The model has no chat template, so it is first fine-tuned on the chosen answers; the result is the "
        "reference.",
        *_rate_comment("", rate, memory),
        "reference:",
        f"  training: {_training(rate, wanted, memory)}",
    ]
    return "\n".join(lines)


def _judge(wanted: Wanted, look: Look, memory: Memory) -> str:
    rate = starting_point(look.num_parameters).reward_model
    return "\n".join(
        [
            "# The judge that scores every policy's answers: a reward model trained on its own pairs. Others: "
            "docs/judges.md.",
            *_rate_comment("", rate, memory),
            "judge:",
            "  kind: learned",
            f"  training: &reward {_training(rate, wanted, memory)}",
        ]
    )


def _entries(wanted: Wanted, look: Look, memory: Memory) -> str:
    point = starting_point(look.num_parameters)
    minibatches, iterations = (2, 2) if wanted.quick else (4, 40)
    rollouts = minibatches * max(8 if wanted.quick else 32, wanted.hardware.num_workers)
    lines = [
        "entries:",
        *_rate_comment("  ", point.preference, memory),
        "  - name: dpo",
        f"    method: {{kind: dpo, beta: 0.1, training: &pairs {_training(point.preference, wanted, memory)}}}",
        "  # We know of no MPO recipe by model size, so this has DPO's rate and a weak pull towards the chosen "
        "answers.",
        "  - {name: mpo, method: {kind: mpo, beta: 0.1, demonstration_weight: 0.002, training: *pairs}}",
        *_rate_comment("  ", point.on_policy, memory),
        "  # The critic starts from the reward model and uses its learning rate.",
        "  - name: rlhf",
        "    method:",
        "      kind: rlhf",
        "      reward: {kind: learned, training: *reward}",
        "      training:",
        f"        learning_rate: {memory.rate(point.on_policy)}",
        f"        critic_learning_rate: {memory.rate(point.reward_model)}",
        f"        rollouts_per_iteration: {rollouts}",
        f"        num_iterations: {iterations}",
        f"        num_minibatches: {minibatches}",
        "        kl_coef: 0.05  # raise it where KL grows faster than the judge's score",
    ]
    return "\n".join([*lines, *(f"        {setting}" for setting in memory.settings)])


def _rest(wanted: Wanted, memory: Memory) -> str:
    hardware = wanted.hardware
    evaluation = "evaluation: {num_prompts: 16, samples_per_prompt: 1, num_reference_samples: 16}"
    lines = [evaluation] if wanted.quick else []
    if not hardware.num_gpus:
        share = max(1, hardware.num_cpus // 2)
        if share > 1:
            lines += [
                f"# {hardware.num_cpus} CPUs: half for training or scoring, half for the generation engine.",
                f"resources: {{cpus_per_worker: {share}, scoring: {{cpus: {share}}}}}",
                f"generation: {{cpus: {share}}}",
            ]
    elif hardware.num_gpus == 1:
        lines += [
            "# Training and the generation engine share one GPU, with half of its memory each.",
            "resources: {use_gpu: true, gpus_per_worker: 0.5}",
            "generation: {gpus: 0.5, gpu_memory_utilization: 0.45, weight_sync: ipc}",
        ]
    else:
        workers, engines = hardware.num_workers, hardware.num_gpus - hardware.num_workers
        sharded = ", sharding: fsdp" if memory.sharded else ""
        lines += [
            f"# {hardware.num_gpus} GPUs: some are for training, the others for generation.",
            f"resources: {{use_gpu: true, num_workers: {workers}{sharded}}}",
            f"generation: {{num_actors: {engines}, gpu_memory_utilization: 0.85, weight_sync: nccl}}",
        ]
    return "\n".join(lines)


def _training(rate: Rate, wanted: Wanted, memory: Memory) -> str:
    length = f"num_steps: {_QUICK_STEPS}, warmup_steps: 1" if wanted.quick else "num_epochs: 1"
    batch_size = max(_QUICK_BATCH_SIZE if wanted.quick else _BATCH_SIZE, wanted.hardware.num_workers)
    settings = [f"learning_rate: {memory.rate(rate)}", f"batch_size: {batch_size}", length, *memory.settings]
    return f"{{{', '.join(settings)}}}"


def _rate_comment(indent: str, rate: Rate, memory: Memory) -> list[str]:
    lines = [f"{indent}# Learning rate {rate.value:.0e}: {rate.source}."]
    return [*lines, f"{indent}# Adapters: {LORA_SOURCE}."] if memory.adapters else lines


def _told(lengths: Sequence[int]) -> str:
    return f"{statistics.median_high(lengths):,} tokens (median; 99% have at most {_at_share(lengths, _KEPT):,})"


def _at_share(lengths: Sequence[int], share: float) -> int:
    """The length that at least this share of them do not exceed. lengths: in order."""
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]


def _up(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _whole(lengths: Sequence[int], limit: int) -> str:
    return f"{sum(length <= limit for length in lengths) / len(lengths):.0%}"


def _quoted(text: str) -> str:
    """The text in a form that YAML reads back, even in a flow mapping."""
    return json.dumps(text, ensure_ascii=False)
