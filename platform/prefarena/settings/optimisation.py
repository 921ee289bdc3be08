"""How a model is trained, whatever it learns from: the optimizer, precision, adapters; and from a fixed table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from prefarena.settings.section import Betas, Section


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


class LearnerSettings(Section):
    """What every training asks of its learner (`training/learner.py`): AdamW, a linear warm-up, then the schedule."""

    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up; it falls to zero unless it is constant."
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: Betas = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="Precision of the computation. bfloat16: the weights stay float32, and bfloat16 copies of them are "
        "computed with. tf32: float32, but GPUs round the factors of matrix products to TF32's 10 bits of "
        "mantissa.",
    )
    lora: LoRA | None = Field(
        None, description="Train adapters instead of all the model's weights, which is the default."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Compute each layer a second time in the backward pass: less memory, about a third more time.",
    )

    @property
    def spares_memory(self) -> bool:
        """Whether memory counts for more than speed where the two are at odds: it was asked for at the price of time,
        or next to nothing of the model is trained, so that most of what a process holds is what it has freed.
        """
        return self.activation_checkpointing or self.lora is not None


class Optimisation(LearnerSettings):
    """A training on a fixed table. Batch sizes are global (all workers)."""

    batch_size: int = Field(64, ge=1, description="Sequences or pairs per optimizer step, over all workers.")
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Maximum number of tokens in a forward pass of one worker; a longer pair or sequence gets a "
        "pass of its own. auto: 8192, halved (at most down to 512) until a pass is predicted to fit the worker's "
        "share of memory.",
    )
    num_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_epochs.")
    num_epochs: float = Field(1.0, gt=0)
    warmup_steps: int = Field(10, ge=0)
    max_bad_steps: int = Field(
        5,
        ge=0,
        description="How many steps in a row may be skipped because their loss or gradient is not finite; after one "
        "more, the method has failed.",
    )
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(10, ge=1, description="Steps between metric rows.")
    num_snapshots: int = Field(
        0,
        ge=0,
        exclude_if=lambda number: number == 0,
        description="Number of an entry's intermediate policies that are kept, evenly spaced, and evaluated as "
        "the final one is; on text for their trajectory alone.",
    )

    def check_no_snapshots(self, what: str) -> None:
        """Raise ValueError where intermediate models are asked for of what is no entry's policy."""
        if self.num_snapshots:
            raise ValueError(f"num_snapshots is for the policies of entries, and {what} keeps none; leave it out")
