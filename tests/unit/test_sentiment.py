"""The sentiment reward: the lexicon's valences added up, and the prompts that it is shown with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from prefarena.functions import load_function
from prefarena.judges.texts import JudgeRow

DATA = Path(__file__).parents[2] / "pipelines" / "data"


def score(*responses: str) -> list[float]:
    pytest.importorskip("vaderSentiment")
    function = load_function("prefarena.judges.sentiment:valence", "judge function", ["the list of rows"])
    rows = [JudgeRow(prompt="terrible", response=text, prompt_ids=[1], response_ids=[2]) for text in responses]
    found: list[float] = function(rows)
    return found


def test_the_words_of_the_response_alone_count_and_their_valences_add_up() -> None:
    assert score("It was great.", "It was bad.", "It was on a hill.", "") == pytest.approx([3.1, -2.5, 0, 0])
    assert score("great great great")[0] == pytest.approx(3 * 3.1)
    many, more = score("good " * 8, "good " * 16)
    assert more == pytest.approx(2 * many)  # where `compound` is 1 for both


def test_negation_turns_a_word_round_and_a_word_of_degree_strengthens_it() -> None:
    plain, negated, strong = score("It was good.", "It was not good.", "It was very good.")
    assert negated < 0 < plain < strong


def test_exclamation_marks_add_nothing() -> None:
    plain, loud = score("It was good", "It was good!!!!")
    assert plain == loud


def test_the_shipped_prompts_are_what_the_script_writes_and_no_two_are_alike() -> None:
    command = [sys.executable, str(DATA / "sentiment_prompts.py")]
    written = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert written == (DATA / "sentiment-prompts.jsonl").read_text(encoding="utf-8")
    prompts = [json.loads(line)["prompt"] for line in written.splitlines()]
    assert len(set(prompts)) == len(prompts) == 480
    assert max(Counter(prompt[:12] for prompt in prompts).values()) < 40


def test_most_prompts_say_nothing_of_whether_it_was_liked() -> None:
    lines = (DATA / "sentiment-prompts.jsonl").read_text(encoding="utf-8").splitlines()
    valences = score(*(json.loads(line)["prompt"] for line in lines))
    assert sum(value == 0 for value in valences) > 0.8 * len(valences)
