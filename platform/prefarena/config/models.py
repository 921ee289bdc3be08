"""The model that is aligned: made from sizes, or a checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefarena.settings.section import Section


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
