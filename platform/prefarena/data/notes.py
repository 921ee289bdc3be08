"""What whoever reads a data stage's summary should know of how its answers were made, in one sentence each."""

from __future__ import annotations

from typing import Any

from prefarena.modeling.endings import AnswerForm


def notes_of(counts: dict[str, Any], form: AnswerForm | None) -> list[str]:
    """Of the tables whose `counts` these are; `form` is that of answers in the chat template."""
    notes = []
    if apart := counts["num_responses_tokenised_apart"]:
        notes.append(
            f"{apart} responses were tokenised apart from their prompts: a token of the whole text reaches over "
            "the place where the prompt ends"
        )
    if written := counts["num_responses_as_written"]:
        notes.append(
            f"{written} responses are trained on as they are written: the chat template's rendering of the whole "
            "conversation leaves out some of them, their thoughts for one, or begins otherwise than the prompt"
        )
    if form is not None and form.header:
        notes.append(
            f"the chat template takes no notice of add_generation_prompt: for messages, {form.header!r}, which it "
            "writes before an answer, is the end of the prompt here, and must be given to the model where it is used"
        )
    if form is not None and form.before.strip():
        notes.append(f"the chat template writes {form.before!r} before an answer, which is trained on as part of it")
    return notes
