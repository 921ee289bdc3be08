"""A judge that is a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
from openai import BadRequestError, OpenAI, OpenAIError

from prefarena.config import EndpointJudge
from prefarena.errors import JudgeError, UserError
from prefarena.judges.answers import Form, read_response
from prefarena.judges.texts import JudgeRow, judge_rows
from prefarena.modeling.load import load_tokenizer

_FIELD = re.compile(r"\{(prompt|response)\}")


class EndpointScorer:
    """Asks the model for a score, at temperature 0, `concurrency` rows at a time."""

    def __init__(self, settings: EndpointJudge, tokenizer: str) -> None:
        """Raises UserError where the key or the template's {response} is missing."""
        self._settings, self._key = settings, check_endpoint(settings)
        self._tokenizer = load_tokenizer(tokenizer)
        pattern = None if settings.pattern is None else re.compile(settings.pattern)
        self._form = Form(settings.min_score, settings.max_score, pattern)
        self._limit_field = "max_tokens"  # or "max_completion_tokens", once the server has asked for it
        self._client = OpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",  # the client insists on one
            timeout=settings.timeout_s,
            max_retries=settings.max_retries,  # of timeouts, lost connections, 408, 409, 429 and 5xx, backing off
        )

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """The score of each answer, float64 [N].

        Raises JudgeError, with the endpoint, the row, the reason and the answer, where an answer holds no score that
        is sure (`judges/answers.py`) or none comes.
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
            body = self._asked(filled(settings.prompt, row))
        except OpenAIError as error:
            raise JudgeError(f"{where}: no answer ({self._without_key(str(error)):.300})") from None
        found = read_response(body, self._form)
        if found.score is None:
            raise JudgeError(f"{where}: {found.reason}; it answered {self._without_key(body)[-300:]!r}")
        return found.score

    def _asked(self, text: str) -> str:
        """The body of the response, whatever it holds. Newer servers name the limit `max_completion_tokens`."""
        field = self._limit_field
        try:
            return self._sent(text, field)
        except BadRequestError as error:
            if field != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self._limit_field = "max_completion_tokens"
            return self._sent(text, self._limit_field)

    def _sent(self, text: str, limit_field: str) -> str:
        response = self._client.chat.completions.with_raw_response.create(
            model=self._settings.model,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            extra_body={limit_field: self._settings.max_tokens},
        )
        return response.text

    def _without_key(self, text: str) -> str:
        """Servers may repeat the key that they refuse."""
        return text.replace(self._key, "(key)") if self._key else text


def check_endpoint(settings: EndpointJudge) -> str | None:
    """The key, from the environment. Raises UserError where it is not set, where the template leaves the response out
    and where `base_url` is no URL, which would otherwise be found after all training."""
    if not _is_url(settings.base_url):
        raise UserError(
            f"judge endpoint: base_url must be a URL such as http://host:8000/v1, not {settings.base_url!r:.200}"
        )
    if "{response}" not in settings.prompt:
        raise UserError("judge endpoint: its `prompt` template must hold {response}")
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UserError(f"judge endpoint: the environment variable {settings.api_key_env} (api_key_env) is not set")
    return key


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is no number
        return False


def filled(template: str, row: JudgeRow) -> str:
    """The template with the row's texts; braces in the texts stay as they are."""
    texts = {"prompt": row["prompt"], "response": row["response"]}
    return _FIELD.sub(lambda match: texts[match[1]], template)
