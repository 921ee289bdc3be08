"""What is learned: the enumerable language, or preference data as people have it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from prefarena.config.drawn_pairs import DrawnPairs
from prefarena.settings.section import Section, is_none


class LanguageTask(Section):
    """The enumerable language: every response to every prompt can be listed, so nothing is estimated."""

    kind: Literal["language"] = "language"
    seed: int = Field(0, description="Seed of the source of demonstrations and of the gold reward.")
    num_letters: int = Field(13, ge=2, le=13, description="Number of letters; with pad, bos and eos at most 16 tokens.")
    num_prompts: int = Field(64, ge=2)
    prompt_letters: int = Field(3, ge=1, le=6)
    response_limit: int = Field(4, ge=1, le=4, description="Maximum number of tokens in a response, its eos included.")
    num_demonstrations: int = Field(
        16384, ge=1, description="Number of demonstrations, drawn from the source over all prompts."
    )
    covered_share: float = Field(0.5, gt=0, le=1, description="Share of the prompts that have preference pairs.")
    num_pairs: int = Field(
        16384, ge=2, description="Number of training pairs, drawn from the reference policy on covered prompts."
    )
    num_test_pairs: int = Field(1024, ge=2, description="Number of held-out pairs, on the same covered prompts.")
    labels: Literal["deterministic", "bradley_terry"] = "deterministic"
    label_temperature: float = Field(
        1.0, gt=0, description="Bradley-Terry labels: P(y1 > y2) = sigmoid((r1 - r2) / T)."
    )


class TextTask(Section):
    """Preference data as people have it: files, a saved dataset, or a hub id."""

    kind: Literal["text"] = "text"
    data: str = Field(
        description="A jsonl, json, csv (also compressed) or parquet file, a folder of such files, a saved `datasets` "
        "folder, or a hub id."
    )
    split: str = Field("train", description="Split to read of a saved DatasetDict, a hub id, or files named by split.")
    format: Literal["auto", "standard", "conversational", "hh"] = Field(
        "auto",
        description="Row format; `auto` recognises TRL's formats (explicit and implicit prompt) and raw HH-RLHF.",
    )
    transcripts: Literal["text", "messages"] = Field(
        "text",
        description="Whether HH-RLHF transcripts stay plain text or are read as messages, which go through the chat "
        "template.",
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows of `data`.")
    test_data: str | None = Field(
        None,
        description="Rows to test on, in any form that `data` may have. Without this and test_split, rows of `data` "
        "are held out.",
    )
    test_split: str | None = Field(
        None, description="Split to test on: of `test_data` (by default `test`) or, if that is not given, of `data`."
    )
    num_test_pairs: int | None = Field(
        None,
        ge=1,
        description="About how many rows are held out for evaluation; by default 2000, or a fifth of the rows if "
        "that is less.",
    )
    test_share: float | None = Field(
        None, gt=0, lt=1, description="Share of the prompts to hold out for evaluation, in place of num_test_pairs."
    )
    num_judge_pairs: int | None = Field(
        None,
        ge=1,
        description="About how many rows are held out to train the evaluation judge, if it is a learned one; by "
        "default 2000, or a fifth of the rows if that is less.",
    )
    judge_share: float | None = Field(
        None, gt=0, lt=1, description="Share of the prompts to hold out for the judge, in place of num_judge_pairs."
    )
    split_seed: int = 0
    max_prompt_tokens: int = Field(256, ge=1, description="Longer prompts keep their last tokens or are dropped.")
    long_prompts: Literal["drop", "keep_end"] = "drop"
    max_response_tokens: int = Field(128, ge=1, description="Longer responses keep their first tokens (and lose eos).")
    max_row_bytes: int = Field(4 << 20, ge=1024, description="Larger rows are rejected without being held in memory.")
    max_rejected_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="A larger share of rows that cannot be trained on stops the run; repeats are not counted.",
    )
    unpaired_data: str | None = Field(
        None,
        description="Rows of `prompt`, `completion` and `label` (desirable or not), in any form that `data` may "
        "have, for methods that learn from single responses, such as kto; by default the pairs are taken apart.",
    )
    demonstration_data: str | None = Field(
        None,
        exclude_if=is_none,
        description="Rows of `prompt` and `response`, in any form that `data` may have, for methods whose "
        "demonstration_source is file.",
    )
    pretraining_text: str | None = Field(None, description="A jsonl(.gz) file with a `text` column, for gamma > 0.")
    pairs: DrawnPairs | None = Field(
        None,
        description="Pairs are drawn from a policy and labelled by a judge; `data` then provides the prompts, with or "
        "without answers. By default the pairs are those of `data`.",
    )
    covered_share: float = Field(1.0, gt=0, le=1, description="Share of the training prompts that have pairs.")
    validation_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the training prompts that policies are measured on in place of the test prompts, and "
        "that nothing but the reference trains on; `prefarena tune` sets it for its trials.",
    )

    @property
    def test_source(self) -> tuple[str, str] | None:
        """Path and split of the rows to test on; None where rows of `data` are held out."""
        if self.test_data is None and self.test_split is None:
            return None
        return self.test_data or self.data, self.test_split or "test"

    @model_validator(mode="after")
    def _test_rows_are_others(self) -> Self:
        if self.test_source is None:
            return self
        setting = "test_data" if self.test_data else "test_split"
        for name in ("test_share", "num_test_pairs"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} holds out rows of data, and {setting} says which to test on; give one of them"
                )
        if self.test_source == (self.data, self.split):
            raise ValueError(
                f"{setting}: these are the rows to train on; give another split, or test_data of their own"
            )
        return self

    @model_validator(mode="after")
    def _held_out_leaves_rows(self) -> Self:
        for split in ("test", "judge"):
            if getattr(self, f"{split}_share") is not None and getattr(self, f"num_{split}_pairs") is not None:
                raise ValueError(f"{split}_share and num_{split}_pairs say the same thing; give one of them")
        held_out = (self.test_share or 0.0) + (self.judge_share or 0.0)
        if held_out >= 1:
            raise ValueError(f"test_share and judge_share are {held_out:g} together, which leaves no rows to train on")
        return self

    @model_validator(mode="after")
    def _transcripts_can_be_there(self) -> Self:
        if self.transcripts == "messages" and self.format not in ("auto", "hh"):
            raise ValueError(
                f"transcripts: messages reads HH-RLHF transcripts, which format: {self.format} has none of"
            )
        return self


Task = Annotated[LanguageTask | TextTask, Field(discriminator="kind")]
