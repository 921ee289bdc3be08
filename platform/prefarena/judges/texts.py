"""Conversion of token ids to the texts that judges see."""

from __future__ import annotations

import re
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from prefarena.modeling.endings import end_ids


class JudgeRow(TypedDict):
    """A response to a prompt. The texts have no special tokens; the ids are the policy's, with the end if it came."""

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]


def judge_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], responses: list[list[int]]
) -> list[JudgeRow]:
    """N prompts and responses, decoded by the policy's tokenizer; what ends a response is not in its text."""
    ends = end_ids(tokenizer)
    return [
        JudgeRow(
            prompt=str(tokenizer.decode(prompt, skip_special_tokens=True)),
            response=str(tokenizer.decode(_unended(response, ends), skip_special_tokens=True)),
            prompt_ids=list(prompt),
            response_ids=list(response),
        )
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def filled(template: str, texts: dict[str, str]) -> str:
    """The template with `{name}` replaced by the text of that name; braces elsewhere, and in the texts, stay."""
    field = re.compile("|".join(rf"\{{{re.escape(name)}\}}" for name in texts))
    return field.sub(lambda match: texts[match[0][1:-1]], template)


def _unended(response: list[int], ends: tuple[int, ...]) -> list[int]:
    return response[:-1] if response and response[-1] in ends else response
