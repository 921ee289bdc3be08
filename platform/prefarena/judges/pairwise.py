"""A judge that is shown two responses and says which is better; each pair is asked in both orders."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from prefarena.config import PairwiseJudge
from prefarena.errors import UserError
from prefarena.judges.client import Client, answer_schema, check_connection
from prefarena.judges.texts import JudgeRow, filled, judge_rows
from prefarena.judges.usage import Usage
from prefarena.judges.verdicts import Verdict, read_verdict_response
from prefarena.modeling.load import load_tokenizer

_SCHEMA = answer_schema("winner", {"type": "string", "enum": ["A", "B", "tie"]})


@dataclass(frozen=True)
class Games:
    """A judge's verdicts on N pairs of an own response and another policy's.

    first, second: [N], of the order in which the own response was shown first, and second: 1 where it was preferred,
    0 where the other was, 1/2 for a tie, nan where the judge was silent. asked: [N], False where both texts are the
    same, which is a tie that nobody needs to be asked about.
    """

    first: np.ndarray
    second: np.ndarray
    asked: np.ndarray


class PairwiseComparer:
    """Asks the model which of two responses is better, at temperature 0, `concurrency` questions at a time."""

    def __init__(self, settings: PairwiseJudge, tokenizer: str, calls: str | None = None) -> None:
        """`calls`: the folder of calls that have been paid for. Raises UserError as `check_pairwise` does."""
        check_pairwise(settings)
        self._settings, self._tokenizer = settings, load_tokenizer(tokenizer)
        pattern = None if settings.pattern is None else re.compile(settings.pattern)
        self._client = Client(
            settings,
            lambda body: read_verdict_response(body, pattern),
            lambda reason: Verdict(None, reason),
            calls,
            _SCHEMA,
        )

    @property
    def usage(self) -> Usage:
        return self._client.usage

    def compare(self, prompts: list[list[int]], own: list[list[int]], other: list[list[int]]) -> Games:
        """The games of N pairs of responses to N prompts, all as token ids.

        Raises JudgeError where more than `max_silent_share` of the answers have no verdict, or the server refuses the
        key or the model. A row of its message is the pair, those of the second order follow after N.
        """
        ours, theirs = judge_rows(self._tokenizer, prompts, own), judge_rows(self._tokenizer, prompts, other)
        asked = np.array([a["response"] != b["response"] for a, b in zip(ours, theirs, strict=True)], dtype=bool)
        pairs = [pair for pair, is_asked in zip(zip(ours, theirs, strict=True), asked, strict=True) if is_asked]
        questions = [self._question(a, b) for a, b in pairs] + [self._question(b, a) for a, b in pairs]
        verdicts = self._client.ask(questions)
        first, second = np.full(len(asked), 0.5), np.full(len(asked), 0.5)
        first[asked] = [_share(verdict, "A") for verdict in verdicts[: len(pairs)]]
        second[asked] = [_share(verdict, "B") for verdict in verdicts[len(pairs) :]]
        return Games(first, second, asked)

    def _question(self, shown_first: JudgeRow, shown_second: JudgeRow) -> str:
        texts = {"response_a": shown_first["response"], "response_b": shown_second["response"]}
        return filled(self._settings.prompt, {"prompt": shown_first["prompt"], **texts})


def _share(verdict: Verdict, own: str) -> float:
    if verdict.winner is None:
        return float("nan")
    return 0.5 if verdict.winner == "tie" else float(verdict.winner == own)


def check_pairwise(settings: PairwiseJudge) -> None:
    """Raises UserError where the connection's settings cannot be used, or the template leaves a response out."""
    check_connection(settings)
    for field in ("{response_a}", "{response_b}"):
        if field not in settings.prompt:
            raise UserError(f"pairwise judge: its `prompt` template must hold {field}")
