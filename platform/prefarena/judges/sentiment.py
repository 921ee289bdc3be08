"""A known reward for text: how favourable the words of a response are, by the lexicon of VADER.

    judge: {kind: function, function: "prefarena.judges.sentiment:valence"}

The package `vaderSentiment` holds the lexicon and its rules (Hutto and Gilbert, ICWSM 2014); it is installed with
`pip install "prefarena[sentiment]"`. Its own score, `compound`, squashes the sum of the words' valences into -1 to 1,
where responses of a few kind words are all about equal. The sum itself goes on telling them apart.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from prefarena.judges.texts import JudgeRow

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('vaderSentiment has the lexicon: pip install "prefarena[sentiment]"') from error


class _Valences(SentimentIntensityAnalyzer):  # type: ignore[misc]  # the package has no types
    """VADER up to the valence of each word; repeated punctuation marks add nothing."""

    def score_valence(self, sentiments: list[float], text: str) -> dict[str, Any]:
        return {"sum": float(sum(sentiments))}


@cache
def _analyzer() -> _Valences:
    return _Valences()


def valence(rows: list[JudgeRow]) -> list[float]:
    """The sum of the valences of each response's words: 3.1 for "great", -2.5 for "bad", 0 for most.

    VADER's rules for negation, words of degree, capitals and "but" are in it.
    """
    return [float(_analyzer().polarity_scores(row["response"])["sum"]) for row in rows]
