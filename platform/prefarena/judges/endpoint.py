"""A judge that is a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import re

import numpy as np

from prefarena.config import EndpointJudge
from prefarena.errors import UserError
from prefarena.judges.answers import Form, Reading, read_response
from prefarena.judges.client import Client, answer_schema, check_connection
from prefarena.judges.texts import filled, judge_rows
from prefarena.judges.usage import Usage
from prefarena.modeling.load import load_tokenizer

_SCHEMA = answer_schema("score", {"type": "number"})


class EndpointScorer:
    """Asks the model for a score, at temperature 0, `concurrency` rows at a time."""

    def __init__(self, settings: EndpointJudge, tokenizer: str, calls: str | None = None) -> None:
        """`calls`: the folder of calls that have been paid for. Raises UserError as `check_endpoint` does."""
        check_endpoint(settings)
        self._settings, self._tokenizer = settings, load_tokenizer(tokenizer)
        pattern = None if settings.pattern is None else re.compile(settings.pattern)
        form = Form(settings.min_score, settings.max_score, pattern)
        self._client = Client(
            settings, lambda body: read_response(body, form), lambda reason: Reading(None, reason), calls, _SCHEMA
        )

    @property
    def usage(self) -> Usage:
        return self._client.usage

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Score each answer, float64 [N]; nan where no answer comes or it holds no sure score (`answers.py`).

        Raises JudgeError, with the endpoint, some rows, the reasons and the answers, where more than
        `max_silent_share` of the rows so far have no score, or the server refuses the key or the model.
        """
        rows = judge_rows(self._tokenizer, prompts, responses)
        template = self._settings.prompt
        found = self._client.ask(
            [filled(template, {"prompt": row["prompt"], "response": row["response"]}) for row in rows]
        )
        return np.array([np.nan if one.score is None else one.score for one in found], dtype=np.float64)


def check_endpoint(settings: EndpointJudge) -> None:
    """Raises UserError where the connection's settings cannot be used, or the template leaves the response out."""
    check_connection(settings)
    if "{response}" not in settings.prompt:
        raise UserError("judge endpoint: its `prompt` template must hold {response}")
