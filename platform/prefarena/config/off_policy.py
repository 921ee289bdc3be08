"""Supervised training and the off-policy methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from prefarena.config.section import Betas, Section


class LoRA(Section):
    """Low-rank adapters that are trained in place of the model's weights. They have no dropout."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="What an adapter adds is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        (), description="Names of the linear layers that get one, such as q_proj; none: all but the head."
    )

    @field_validator("targets")
    @classmethod
    def _no_head(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if any(target.rsplit(".", 1)[-1] == "lm_head" for target in targets):
            raise ValueError("lm_head cannot have an adapter: its weight is read as it is; leave it out")
        return targets


class Optimisation(Section):
    """One training run: AdamW, linear warm-up, then the schedule. Batch sizes are global (all workers)."""

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, ge=1, description="Sequences or pairs per optimizer step, over all workers.")
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Most tokens in a forward pass of one worker; a longer pair or sequence goes alone. auto: 8192, or "
        "the largest half, quarter and so on, down to 512, that is predicted to fit the worker's share of memory.",
    )
    num_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_epochs.")
    num_epochs: float = Field(1.0, gt=0)
    warmup_steps: int = Field(10, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: Betas = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast, float32 master weights."
    )
    max_bad_steps: int = Field(
        5,
        ge=0,
        description="Steps in a row that may be skipped, as their loss or gradient is not a number; one more, and the "
        "method has failed.",
    )
    lora: LoRA | None = Field(None, description="Train adapters of the model; none: all of its weights.")
    activation_checkpointing: bool = Field(
        False, description="Compute each layer once more in the backward pass: less memory, about a third more time."
    )
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(10, ge=1, description="Steps between metric rows.")


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


OffPolicyMethod = MPO | DPO | IPO | SFT
