"""Pairs of a text task that are drawn from a policy and labelled by a judge, in place of those of a file."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from prefarena.config.models import PretrainedModel
from prefarena.settings.judges import EvaluationJudge, PairwiseJudge
from prefarena.settings.section import Section


class Annotator(Section):
    """Who orders the responses to a prompt."""

    judge: EvaluationJudge | None = Field(
        None, description="By default the comparison's judge, which may be a learned one."
    )
    noise: float = Field(
        0.0, ge=0, description="Standard deviation of the Gaussian noise that this annotator adds to every score."
    )

    @model_validator(mode="after")
    def _can_label_text(self) -> Self:
        if self.judge is None:
            return self
        if self.judge.kind == "gold":
            raise ValueError("judge kind gold exists only on the enumerable language")
        if self.judge.kind == "learned":
            raise ValueError("a learned annotator is the comparison's own judge: leave the annotator's judge out")
        if self.noise > 0 and isinstance(self.judge, PairwiseJudge):
            raise ValueError("noise is added to scores, but a pairwise judge gives none")
        return self


class DrawnPairs(Section):
    """How pairs are drawn and labelled. The prompts are those of `task.data`."""

    policy: PretrainedModel | None = Field(
        None,
        description="Model that the responses are drawn from, with the same tokens as the reference; by default the "
        "reference itself.",
    )
    num_samples: int = Field(4, ge=2, description="Number of responses to each prompt.")
    temperature: float = Field(1.0, gt=0)
    choose: Literal["all", "best_worst"] = Field(
        "all", description="Which responses to a prompt become pairs: any two that differ, or the best with the worst."
    )
    labels: Literal["deterministic", "bradley_terry"] = "deterministic"
    label_temperature: float = Field(
        1.0, gt=0, description="Bradley-Terry labels: P(y1 > y2) = sigmoid((r1 - r2) / T), r being the judge's score."
    )
    flip_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the training pairs whose order is reversed afterwards."
    )
    annotators: tuple[Annotator, ...] = Field(
        (Annotator(),),
        min_length=1,
        description="Each prompt's responses are ordered by one of these, chosen at random with equal chances.",
    )
    max_silent_share: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="Responses without a usable score are left out and counted, up to this share; if there are "
        "more, the run stops.",
    )
    seed: int = Field(
        0, description="Seed of the samples, of the labels, and of the choice of prompts that have pairs."
    )

    @field_validator("policy", mode="before")
    @classmethod
    def _policy_by_its_name(cls, given: Any) -> Any:
        """Accept `reference`, or just a path."""
        if isinstance(given, str):
            return None if given == "reference" else {"path": given}
        return given

    def drawing(self) -> dict[str, Any]:
        """What the responses depend on besides policy and prompts."""
        return self.model_dump(mode="json", include={"num_samples", "temperature", "seed"})

    def labelling(self) -> dict[str, Any]:
        """What the pairs depend on besides the responses and the judges."""
        names = {"choose", "labels", "flip_share", "seed"}
        names |= {"label_temperature"} if self.labels == "bradley_terry" else set()
        return self.model_dump(mode="json", include=names)

    def judges(self, judge: EvaluationJudge) -> list[EvaluationJudge]:
        """Of each annotator; `judge` is the comparison's."""
        return [annotator.judge or judge for annotator in self.annotators]
