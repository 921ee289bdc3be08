"""How `prefarena tune` searches: the same budget for every entry, on data that the report's numbers never see."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prefarena.settings.search import Dimension
from prefarena.settings.section import Section


class Tuning(Section):
    """The budget of every entry, what trials are ranked by and on, and what is searched. `compare` does not read it.

    Every trial is a training stage like any other. Trials are proposed in batches; of a batch all are trained with the
    first of the selection's seeds, and the better ones of each entry with the others.
    """

    num_trials: int = Field(24, ge=2, description="Number of trials of every entry.")
    device_seconds: float | None = Field(
        None,
        gt=0,
        description="An entry whose trials have taken this long gets no further batch; by default there "
        "is no such limit.",
    )
    batch_size: int = Field(
        8, ge=1, description="Trials of an entry that are proposed together, before the results of any are known."
    )
    sampler: Literal["tpe", "random"] = Field(
        "tpe",
        description="tpe: the first batch is random and later ones learn from it (Optuna's tree-structured Parzen "
        "estimator); random: all batches are random, so that curves of expected best trials describe "
        "independent trials.",
    )
    seed: int = Field(0, description="Seed of the proposals.")
    seeds: tuple[int, ...] = Field(
        (1000, 1001),
        min_length=1,
        description="Seeds of the selection. On the enumerable language each is another language, different from "
        "those of the comparison; on text each is a seed of training.",
    )
    kept_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of each entry's trials in a batch that are also trained with the other seeds: the best "
        "with the first one.",
    )
    kl_limit: float = Field(
        5.0,
        gt=0,
        description="Trials whose KL to the reference is at most this, in nats per response, are ranked by reward; "
        "those beyond it come after all that beat the reference, the farthest last.",
    )
    validation_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Text tasks: share of the training prompts that trials do not train on, and are measured on.",
    )
    spaces: dict[str, dict[str, Dimension]] = Field(
        {},
        description="By an entry's name: the space to search in place of the one that its method proposes, by "
        "dotted names such as training.learning_rate: {low, high, log, integer} or {values: [...]}.",
    )

    def __hash__(self) -> int:
        """A hash of the contents: a comparison is hashed like any section, but a mapping like `spaces` cannot be."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _seeds_are_once(self) -> Tuning:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds a seed twice")
        return self
