"""Answers of pairwise judges with the verdict that a person reads; None where a person could not be sure."""

from __future__ import annotations

import json
import random
import re

import pytest

from prefarena.judges.verdicts import read_verdict, read_verdict_response

CORPUS: list[tuple[str, str | None]] = [
    ("A", "A"), ("B", "B"), (" tie \n", "tie"), ("**A**", "A"), ("B.", "B"), ("Tie.", "tie"), ("Response B", "B"),
    ("Verdict: A", "A"), ("Verdict: B.", "B"), ("verdict: tie", "tie"), ("**Verdict:** A", "A"),
    ("Verdict: **B**", "B"), ("**Verdict: A**", "A"),
    ("Verdict = A", "A"), ("Final verdict: B", "B"), ("Verdict: [[A]]", "A"), ("[[B]]", "B"),
    ("Verdict: Response A", "A"), ("The winner is Assistant B.", "B"), ("Winner: Draw", "tie"), ("Verdict: (A)", "A"),
    ("Better response: B", "B"), ("My verdict is A.", "A"), ("Verdict: A (by far)", "A"), ("Verdict: A is better", "A"),
    ("Verdict: B because it answers.", "B"), ("Verdict: A - it is shorter", "A"), ("Verdict: A, it is shorter.", "A"),
    ("Response A is rude.\nResponse B is kind.\nVerdict: B", "B"), ("Verdict: A? No.\nVerdict: B", "B"),
    ("[[A]] at first sight, but then [[B]]", "B"), ("[[C]]", "tie"), ("[[A>>B]]", "A"), ("[[A>B]]", "A"),
    ("[[A=B]]", "tie"), ("[[B>A]]", "B"), ("[[B>>A]]", "B"), ("[[ A > B ]]", "A"), ("Verdict: [[A<<B]]", "B"),
    ("My final verdict is: [[A>B]]", "A"), ("[[tie]]", "tie"), ("Verdict: A\n[[B]]", "B"), ("[[B]]\nVerdict: A", "A"),
    ('{"winner": "A"}', "A"), ('{"reason": "A is long", "winner": "B"}', "B"), ('{"winner": "tie"}', "tie"),
    ('```json\n{"winner": "response_b", "x": 1}\n```', None), ('```json\n{"winner": "Response B"}\n```', "B"),
    ('Here it is: {"winner": "A"}', "A"), ('{"Verdict": "B"}', "B"), ("```\nA\n```", "A"),
    ("<think>Verdict: A</think>\nVerdict: B", "B"), ("Perhaps A. Verdict: A</think>B", "B"),
    ("", None), ("I would rather not say.", None), ("A is long. B is short.", None), ("Response A is better", None),
    ("<think>Verdict: A", None), ("Verdict: A or B", None), ("Verdict: A/B", None), ("Verdict: A|B|tie", None),
    ("Verdict: both", None), ("Verdict: C", None), ("Verdict: AB", None), ("Verdict: A bit hard to say", None),
    ("Verdict: A is worse", None), ("Verdict: A is not better", None), ("Verdict: not A", None), ("[[D]]", None),
    ("Verdict: A, or rather B", None), ("Verdict: A, if it were honest", None), ("[[A]] or [[D]]", None),
    ("The winner is a response that helps", None), ('{"winner": "A", "verdict": "B"}', None), ('{"winner": 1}', None),
    ('{"winner": null}', None), ('{"better": "A"}', None), ("Verdict:", None),
    ("Verdict: A and B", None), ("[[]]", None),
    ("Verdict: A B", None), ("AB", None), ("A tie-breaker", None), ("[\"A\"]", None), ("Verdict: Apple", None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "winner"), CORPUS)
def test_a_verdict_is_read_as_a_person_reads_it(answer: str, winner: str | None) -> None:
    found = read_verdict(answer)
    assert found.winner == winner
    assert (found.reason != "") == (winner is None)


def test_a_pattern_of_the_users_reads_its_last_match_and_nothing_else() -> None:
    pattern = re.compile(r"<best>(.*?)</best>")
    assert read_verdict("<best>A</best> no, <best>tie</best>", pattern).winner == "tie"
    assert "does not match `pattern`" in read_verdict("Verdict: A", pattern).reason
    assert "is not A, B or tie" in read_verdict("<best>neither</best>", pattern).reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [("<html>502</html>", "not JSON"), ("[]", "no choices"), ('{"choices": []}', "no choices"), ("", "not JSON")],
)
def test_whatever_a_server_answers_is_a_reason(text: str, reason: str) -> None:
    assert reason in read_verdict_response(text, None).reason


def test_an_answer_that_was_cut_off_is_silent() -> None:
    cut = {"choices": [{"finish_reason": "length", "message": {"content": "Verdict: A"}}]}
    assert "cut off" in read_verdict_response(json.dumps(cut), None).reason


def test_no_text_of_whatever_pieces_raises() -> None:
    rng = random.Random(0)
    pieces = [
        "Verdict",
        ":",
        " ",
        "A",
        "B",
        "tie",
        "[[",
        "]]",
        "{",
        "}",
        '"winner"',
        "\n",
        "<think>",
        "</think>",
        "or",
        ".",
    ]
    for _ in range(3000):
        found = read_verdict("".join(rng.choices(pieces, k=rng.randint(0, 9))))
        assert found.winner in ("A", "B", "tie", None) and (found.reason != "") == (found.winner is None)
