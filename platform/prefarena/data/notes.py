"""Notes for readers of a data stage's summary on how its conversations were made, in one sentence each."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from prefarena.config import TextTask
from prefarena.data.first_rows import FirstRows
from prefarena.modeling.endings import AnswerForm


def transcript_notes(first: FirstRows, task: TextTask, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Notes on how HH-RLHF transcripts are read, if the model has a chat template and they can be read otherwise."""
    if tokenizer.chat_template is None or task.format not in ("auto", "hh"):
        return []
    some = f"{first.num_transcripts} of the first {first.num_rows} rows"
    if task.transcripts == "text" and first.num_transcripts:
        return [
            f"{some} are HH-RLHF transcripts and stay plain text, although the model has a chat template; set "
            f"task.transcripts: messages to read their turns as messages that go through it"
        ]
    if task.transcripts == "messages" and first.num_transcripts < first.num_rows:
        return [
            f"{some} are HH-RLHF transcripts, to which task.transcripts: messages applies; others are read as usual"
        ]
    return []


def notes_of(counts: dict[str, Any], form: AnswerForm | None) -> list[str]:
    """Notes on the tables with these `counts`; `form` is that of answers in the chat template."""
    notes = []
    if joined := counts["num_turns_joined"]:
        notes.append(f"{joined} turns of transcripts follow one of the same speaker, and continue its message")
    if apart := counts["num_responses_tokenised_apart"]:
        notes.append(
            f"{apart} responses were tokenised apart from their prompts: a token of the whole text crosses the end of "
            f"the prompt"
        )
    if written := counts["num_responses_as_written"]:
        notes.append(
            f"{written} responses are trained on as they are written: the chat template's rendering of the whole "
            "conversation leaves out parts of them, such as their thoughts, or begins differently from the prompt"
        )
    if form is not None and form.header:
        notes.append(
            f"the chat template ignores add_generation_prompt: for messages, {form.header!r}, which it "
            "writes before an answer, is the end of the prompt here, and must be given to the model when it is used, "
            "too"
        )
    if form is not None and form.before.strip():
        notes.append(f"the chat template writes {form.before!r} before an answer, which is trained on as part of it")
    return notes
