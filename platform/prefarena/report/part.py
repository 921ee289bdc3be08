"""The base of everything that results.json is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of the results: unknown keys are kept out, so that a misspelt one is found."""

    model_config = ConfigDict(extra="forbid")
