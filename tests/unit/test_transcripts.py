"""Where the prompt ends in plain text without a prompt column: no line of an answer's own moves it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefarena.data.formats import normalise
from prefarena.data.transcripts import find_prompt

#: Openings of transcripts, each with the label that asks there.
PROMPTS = [
    ("User: What is a river?\nAssistant:", "User"),
    ("Human: 2 + 2?\nAI: 5\nHuman: Really?\nAI:", "Human"),
    ("You are a teacher.\n\nUser: Hello\nBot: Hi\nUser: 2 + 2?\nBot:", "User"),
    ("Question: How many?\nAnswer:", "Question"),
    ("Q: 1 + 1?\nA: 2\nQ: 2 + 2?\nA:", "Q"),
    ("Q: Which?\nA: red\nB: blue\nQ: And now?\nAnswer:", "Q"),
    ("Question: Which is right?\nA: red\nB: blue\nAnswer:", "Question"),
    ("Below is an instruction.\n\n### Instruction:\nAdd\n\n### Input:\n2, 2\n\n### Response:", "Instruction"),
    ("What is 2 + 2?\nAssistant:", None),
    ("User: Solve this.\nQuestion: 2 + 2?\nAnswer: ?\nAssistant:", "User"),
    ("Which is right?\nA: red\nB: blue\nAnswer:", None),
]
#: What answers may contain: every label but the one that would begin another turn of the same transcript.
CONTENTS = [
    " Let us think.\nIt is large.\nAnswer: 0",
    " Let us think.\n\nAnswer: 3\nAnswer: 4",
    " A quiz:\nQuestion: 2 + 2?\nAnswer: 4",
    "\nI count.\nA: four",
    " ### Response: none\n### Response: 4",
    " Letters:\nAI: artificial intelligence\nBot: robot",
    " Two more.\nAssistant: And on.\nResponse: done",
]


@pytest.mark.parametrize(("prompt", "asking"), PROMPTS)
@pytest.mark.parametrize("content", CONTENTS)
def test_an_answers_own_labels_stay_in_the_answer(prompt: str, asking: str | None, content: str) -> None:
    if asking == "Question" and "Question:" in content:
        pytest.skip("another question and answer of the same labels is another turn")
    pair = normalise({"chosen": prompt + content + " and more", "rejected": prompt + content})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, content + " and more", content)
    assert pair.opening == find_prompt(prompt)[1]  # type: ignore[index]


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.sampled_from([prompt for prompt, _ in PROMPTS]),
    lines=st.lists(
        st.tuples(st.sampled_from(["", "Answer: ", "A: ", "Response: ", "### Response: "]), st.text(max_size=4)),
        max_size=4,
    ),
)
def test_no_answer_moves_the_end_of_its_prompt(prompt: str, lines: list[tuple[str, str]]) -> None:
    answer = "\n".join(label + text for label, text in [("", " So"), *lines])
    assert find_prompt(prompt + answer) == find_prompt(prompt)


@pytest.mark.parametrize("text", ["The sky is blue.", "Answer: 4", "User: and no answer", "Which?\nA: red\nB: blue"])
def test_text_without_an_answer_label_has_no_boundary(text: str) -> None:
    assert find_prompt(text) is None


def test_the_reported_rows_keep_their_reasoning_in_the_answer() -> None:
    for number, thing in enumerate(("river", "lamp", "bridge")):
        whole = f"User: What is a {thing}?\nAssistant: Let us think.\nIt is large.\nAnswer: "
        pair = normalise({"chosen": f"{whole}{number}", "rejected": f"{whole}{number + 1}"})
        assert pair.prompt == f"User: What is a {thing}?\nAssistant:"
        assert pair.chosen == f" Let us think.\nIt is large.\nAnswer: {number}"
