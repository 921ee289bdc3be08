"""What else policies can do, measured beside their preferences, by EleutherAI's lm-eval."""

from __future__ import annotations

from pydantic import Field

from prefarena.settings.section import Section


class Abilities(Section):
    """Tasks of lm-eval on which every policy is measured, as differences to the reference."""

    tasks: tuple[str, ...] = Field(min_length=1, description="Names of tasks or groups of lm-eval, or of the folder.")
    folder: str | None = Field(
        None,
        description="Folder of task files (YAML, as in lm-eval), whose names take precedence over lm-eval's own; paths "
        "of data in them are relative to the working directory, as in lm-eval.",
    )
    limit: int | None = Field(None, ge=1, description="Use only the first items of each task, this many; none: all.")
    chat_template: bool = Field(
        False,
        exclude_if=lambda value: value is False,  # it came later, and is in no address where it is not set
        description="Ask in the tokenizer's chat template, as `lm-eval --apply_chat_template` does, each question as a "
        "message of the user; otherwise as plain text.",
    )
