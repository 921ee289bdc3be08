"""Answers of judges with the score that a person reads; None where a person could not be sure."""

from __future__ import annotations

import json
import random
import re

import pytest

from prefarena.judges.answers import Form, read_answer, read_response

FORM = Form(1, 10)
CORPUS: list[tuple[str, float | None]] = [
    ("8", 8), (" 8 \n", 8), ("8.", 8), ("8.5", 8.5), ("7,5", 7.5), ("8/10", 8), ("8 out of 10", 8), ("**8**", 8),
    ("Score: 9", 9), ("score: 9.", 9), ("SCORE = 9", 9), ("**Score:** 9", 9), ("**Score: 9**", 9), ("Score: **9**", 9),
    ("**Score**: 9/10", 9), ("Score (1-10): 8", 8), ("Score [1-10]: 8", 8), ("The score is 6", 6), ("Rating: 4", 4),
    ("1. Helpful\n2. Kind\nScore: 9", 9), ("Out of 10 I would give it 8", 8), ("I'd rate this response a 7.", 7),
    ("GPT-4 would do better. Score: 5", 5), ("Llama 2 wrote 3 sentences.\nScore: 2", 2),
    ("Score: 3? No, I was too strict.\nScore: 7", 7), ("Score: 7\nMaximum score: 10", 7), ("Score: 10 of 10", 10),
    ('{"score": 8}', 8), ('{"confidence": 3, "score": 8}', 8), ('```json\n{"length": 4, "score": 8.5}\n```', 8.5),
    ('{"score": "8/10"}', 8), ('Here it is: {"clarity": 2, "score": 6}', 6), ("```\n8\n```", 8),
    ("<think>Perhaps a 3. Score: 3</think>\nScore: 8", 8), ("Perhaps a 3. Score: 3</think>8", 8),
    ("Score: 1,5", 1.5), ("I give it 8. As I said, I give it 8.", 8), ("I would give it **8**", 8),
    ("", None), ("I would rather not.", None), ("Llama 2 is helpful", None), ("1. Helpful\n2. Kind", None),
    ("<think>Score: 8", None), ("<think>a</think><think>Score: 8", None), ("Score: 11", None), ("Score: -3", None),
    ("Score: \u22123", None), ("Score: 8-9", None), ("Score: 8 or 9", None), ("Score: 8\u20139", None),
    ("Score: 4/5", None), ("4/5", None), ("Score: 80%", None), ("Score: 1,000", None), ("Score: high", None),
    ("[8]", None), ("[8, 9]", None), ('{"score": null}', None), ('{"score": true}', None), ('{"a": 8}', None),
    ('{"score": NaN}', None), ('{"score": 3, "Score": 4}', None), ("Score: 1e3", None), ("Score: 2026-11-25", None),
    ("I would not give it 8", None), ("I would give it 8 if it were honest", None), ("I give it 8. I give it 3.", None),
    ("risk_score: 8", None), ("8 9", None), ("In 2024 this was 8", None), ("I would give it an 8-9", None),
    ("Score: 8.5.1", None), ("NaN", None), ("Infinity", None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "score"), CORPUS)
def test_an_answer_is_read_as_a_person_reads_it(answer: str, score: float | None) -> None:
    found = read_answer(answer, FORM)
    assert found.score == score
    assert (found.reason != "") == (score is None)


def test_a_pattern_of_the_users_reads_its_last_match_and_nothing_else() -> None:
    form = Form(0, 100, re.compile(r"\[\[(.+?)\]\]"))
    assert read_answer("[[3]] or rather [[72.5]]", form).score == 72.5
    assert "does not match `pattern`" in read_answer("Score: 72", form).reason
    assert "is not a number" in read_answer("[[good]]", form).reason
    assert "outside" in read_answer("[[101]]", form).reason


def body(content: object, finish_reason: str = "stop", **more: object) -> str:
    return json.dumps({"choices": [{"finish_reason": finish_reason, "message": {"content": content, **more}}]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<html>502</html>", "not JSON"), ('{"choices": [', "not JSON"), ("", "not JSON"), ("[" * 100_000, "not JSON"),
        ("[]", "no choices"), ("3", "no choices"), ("{}", "no choices"), ('{"choices": []}', "no choices"),
        ('{"choices": null}', "no choices"), ('{"choices": ["8"]}', "no choices"), ('{"choices": [{}]}', "empty"),
        ('{"choices": [{"message": "8"}]}', "empty"), (body(None, reasoning_content="Score: 8"), "empty"),
        (body("Score: 1", "length"), "max_tokens"), (body([{"type": "image"}, 3]), "empty"), (body({"a": 8}), "empty"),
    ],
)  # fmt: skip
def test_whatever_a_server_sends_is_silent_with_a_reason(text: str, reason: str) -> None:
    found = read_response(text, FORM)
    assert found.score is None and reason in found.reason


def test_a_response_is_read_without_its_reasoning() -> None:
    assert read_response(body("Score: 8", reasoning_content="Score: 3"), FORM).score == 8
    assert read_response(body([{"type": "text", "text": "Score: "}, {"type": "text", "text": "8"}]), FORM).score == 8


def test_no_text_of_whatever_pieces_raises_or_leaves_the_range() -> None:
    rng = random.Random(0)
    pieces = ["Score:", "score", " ", "8", "-", ",", ".", "/", "10", "<think>", "</think>", "{", "}", "[", '"', "\n",
              "give it", "a", "**", "of", "\u2212", "```", "\u0661", "\u00b2", "NaN", "1e9"]  # fmt: skip
    num_scored = 0
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        found = read_answer(text, FORM)
        assert found.score is None or 1 <= found.score <= 10, text
        assert (found.reason == "") == (found.score is not None), text
        num_scored += found.score is not None
        read_response(body(text), FORM)
    assert num_scored > 20


@pytest.mark.parametrize("score", [1, 2.5, 7, 10])
def test_a_stated_score_survives_whatever_stands_before_it(score: float) -> None:
    rng = random.Random(1)
    words = ["Llama 2", "1.", "10", "Score: 4\n", "<think>Score: 6</think>", "8/10", "give it 9", '{"score": 3}', "50%"]
    for _ in range(500):
        text = " ".join(rng.choices(words, k=rng.randint(0, 8)))
        assert read_answer(f"{text}\nScore: {score:g}", FORM).score == score, text
