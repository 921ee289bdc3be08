"""What else policies can do, measured beside their preferences, by EleutherAI's lm-eval."""

from __future__ import annotations

from pydantic import Field

from prefarena.settings.section import Section


class Abilities(Section):
    """Tasks of lm-eval on which every policy is measured, as differences to the reference."""

    tasks: tuple[str, ...] = Field(min_length=1, description="Names of tasks or groups of lm-eval, or of the folder.")
    folder: str | None = Field(
        None,
        description="Folder of task files (YAML, as lm-eval has them), whose names come before lm-eval's own; paths "
        "of data in them are taken from the working directory, as lm-eval does.",
    )
    limit: int | None = Field(None, ge=1, description="Number of items of each task, the first ones; none: all.")
