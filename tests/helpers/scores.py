"""Judges that are functions, for tests: what they say is known, and workers can import them by name."""

from __future__ import annotations

from prefarena.judges.texts import JudgeRow


def sum_of_ids(rows: list[JudgeRow]) -> list[float]:
    return [float(sum(row["response_ids"])) for row in rows]


def silent_about_a(rows: list[JudgeRow]) -> list[float | str | None]:
    """No number for responses that begin with a or b."""
    values: list[float | str | None] = []
    for row in rows:
        values.append({"a": None, "b": "none of your business"}.get(row["response"][:1], float(len(row["response"]))))
    return values
