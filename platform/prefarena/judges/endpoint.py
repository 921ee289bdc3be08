"""A judge that is a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from openai import OpenAI, OpenAIError

from prefarena.config import EndpointJudge
from prefarena.errors import UserError
from prefarena.judges.texts import JudgeRow, judge_rows
from prefarena.modeling.load import load_tokenizer

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")
_FIELD = re.compile(r"\{(prompt|response)\}")


class EndpointScorer:
    """Asks the model for a number, at temperature 0, `concurrency` rows at a time."""

    def __init__(self, settings: EndpointJudge, tokenizer: str) -> None:
        """Raises UserError where the key or the template's {response} is missing."""
        self._settings, self._key = settings, check_endpoint(settings)
        self._tokenizer = load_tokenizer(tokenizer)
        self._client = OpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",  # the client insists on one
            timeout=settings.timeout_s,
            max_retries=settings.max_retries,  # of timeouts, lost connections, 408, 409, 429 and 5xx, backing off
        )

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """The first number of each answer, float64 [N].

        Raises UserError, with the endpoint, the row and the answer, where an answer holds no number or none comes.
        """
        rows = judge_rows(self._tokenizer, prompts, responses)
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            return np.array(list(pool.map(self._score_row, range(len(rows)), rows)), dtype=np.float64)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, rows that wait are not asked

    def _score_row(self, index: int, row: JudgeRow) -> float:
        settings = self._settings
        where = f"judge endpoint {settings.base_url} (model {settings.model}), row {index}"
        try:
            answer = self._client.chat.completions.create(
                model=settings.model,
                messages=[{"role": "user", "content": filled(settings.prompt, row)}],
                temperature=0,
                max_tokens=settings.max_tokens,
            )
        except OpenAIError as error:
            raise UserError(f"{where}: no answer ({self._without_key(str(error))})") from None
        content = (answer.choices[0].message.content or "") if answer.choices else ""
        found = first_number(content)
        if found is None:
            raise UserError(f"{where}: the answer {self._without_key(content)[:200]!r} holds no number")
        return found

    def _without_key(self, text: str) -> str:
        """Servers may repeat the key that they refuse."""
        return text.replace(self._key, "(key)") if self._key else text


def check_endpoint(settings: EndpointJudge) -> str | None:
    """The key, from the environment. Raises UserError where it is not set, or the template leaves the response out."""
    if "{response}" not in settings.prompt:
        raise UserError("judge endpoint: its `prompt` template must hold {response}")
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UserError(f"judge endpoint: the environment variable {settings.api_key_env} (api_key_env) is not set")
    return key


def filled(template: str, row: JudgeRow) -> str:
    """The template with the row's texts; braces in the texts stay as they are."""
    texts = {"prompt": row["prompt"], "response": row["response"]}
    return _FIELD.sub(lambda match: texts[match[1]], template)


def first_number(text: str) -> float | None:
    """The first finite number in `text`."""
    match = _NUMBER.search(text)
    number = float(match[0]) if match else math.nan
    return number if math.isfinite(number) else None
