"""Which tokens end an answer: one place, which data, saved policies, generation and judges agree with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from on_policy import LocalGenerator
from templates import CHATML, CHATML_UNASKED, ENDS, GEMMA, LLAMA2, R1_OPEN, tokenizer
from tiny import BOS, EOS, FIRST_LETTER, save_tiny_policy

from prefarena.config import TextTask
from prefarena.data.notes import notes_of
from prefarena.data.tokenization import Tokenizer
from prefarena.generation.interface import Sampling
from prefarena.judges.texts import judge_rows
from prefarena.modeling.endings import answer_form, end_ids, load_ends
from prefarena.modeling.load import load_policy, load_tokenizer, save_policy

CONFIG = "generation_config.json"


def name_ends(folder: str, ends: int | list[int], **others: Any) -> None:
    (Path(folder) / CONFIG).write_text(json.dumps({"eos_token_id": ends, **others}))


@pytest.mark.parametrize(("template", "end"), ENDS)
def test_the_end_of_a_turn_is_found_by_rendering(template: str, end: str) -> None:
    made = tokenizer("bytes", template)
    expected = {made.eos_token_id, made.convert_tokens_to_ids(end)}
    assert end_ids(made) == tuple(sorted(expected))
    made.chat_template = None
    assert end_ids(made) == (made.eos_token_id,)


@pytest.mark.parametrize("tail", ["", "\n", " [done]"])
def test_a_template_without_an_end_leaves_the_tokenizers(tail: str) -> None:
    made = tokenizer("bytes", "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + tail + "{% endfor %}")
    form = answer_form(made)
    assert form is not None
    assert (form.end_id, form.end) == (None, tail if tail.strip() else "")
    assert end_ids(made) == (made.eos_token_id,)


def test_a_template_that_always_opens_the_next_answer_ends_none_with_that() -> None:
    turns = "{% for m in messages %}{{ '\\n[' + m.role + ']' + m.content }}{% endfor %}{{ '\\n[assistant]' }}"
    form = answer_form(tokenizer("bytes", turns))
    assert form is not None
    assert (form.header, form.end, form.after) == ("", "", "\n[assistant]")


def test_what_a_generation_config_names_is_kept_in_saved_policies(tmp_path: Path) -> None:
    source = save_tiny_policy(tmp_path / "a")
    name_ends(source, [EOS, FIRST_LETTER])
    names = load_tokenizer(source)
    assert load_ends(source, names) == (EOS, FIRST_LETTER)
    assert Tokenizer.load(source, None, TextTask(data="x")).ends == (EOS, FIRST_LETTER)
    for _ in range(2):  # a policy is saved, loaded and saved again on its way
        save_policy(load_policy(source), names, tmp_path / "b")
        source = str(tmp_path / "b")
        assert json.loads((tmp_path / "b" / CONFIG).read_text())["eos_token_id"] == [EOS, FIRST_LETTER]
        assert load_ends(source, load_tokenizer(source)) == (EOS, FIRST_LETTER)


def test_saved_policies_name_the_templates_end_and_one_end_stays_one(tmp_path: Path) -> None:
    source = save_tiny_policy(tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["eos_token_id"] == EOS
    names = load_tokenizer(source)
    names.add_special_tokens({"additional_special_tokens": ["a"]})
    names.chat_template = "{% for m in messages %}{{ m.content }}a{% endfor %}"
    save_policy(load_policy(source), names, tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["eos_token_id"] == [EOS, FIRST_LETTER]


def test_an_architectures_default_is_no_end_of_this_tokenizer(tmp_path: Path) -> None:
    source = save_tiny_policy(tmp_path / "a")
    name_ends(source, FIRST_LETTER, _from_model_config=True)
    assert load_ends(source, load_tokenizer(source)) == (EOS,)


def test_rollouts_stop_at_every_end(tmp_path: Path) -> None:
    source = save_tiny_policy(tmp_path / "a")
    name_ends(source, [EOS, FIRST_LETTER, FIRST_LETTER + 1])
    generator = LocalGenerator(source)
    generator.sync(load_policy(source).state_dict().items(), "v")
    rollouts = generator.generate([[BOS, FIRST_LETTER + 3]] * 60, Sampling(5, 1.0, seed=0), "v")
    ends = {EOS, FIRST_LETTER, FIRST_LETTER + 1}
    assert {rollout.response_ids[-1] for rollout in rollouts if rollout.finished} == ends
    for rollout in rollouts:
        assert not ends & set(rollout.response_ids[:-1])
        assert rollout.finished == (rollout.response_ids[-1] in ends)


def test_judges_see_no_end_in_the_text() -> None:
    made = tokenizer("bytes", CHATML)
    turn = made.convert_tokens_to_ids("<|im_end|>")
    made._extra_special_tokens = []  # a tokenizer that does not call its end of turn special
    (row,) = judge_rows(made, [[5]], [[*made("yes", add_special_tokens=False)["input_ids"], turn]])
    assert (row["response"], row["response_ids"][-1]) == ("yes", turn)


def test_what_was_done_to_answers_is_said_in_sentences() -> None:
    none = {"num_responses_tokenised_apart": 0, "num_responses_as_written": 0, "num_turns_joined": 0}
    for template in (None, CHATML, GEMMA, LLAMA2, R1_OPEN):
        assert notes_of(none, answer_form(tokenizer("bytes", template))) == []
    (note,) = notes_of(none, answer_form(tokenizer("bytes", CHATML_UNASKED)))
    assert "ignores add_generation_prompt" in note
    joined, apart, written = notes_of(
        {"num_responses_tokenised_apart": 3, "num_responses_as_written": 2, "num_turns_joined": 5}, None
    )
    assert joined.startswith("5 turns of transcripts")
    assert apart.startswith("3 responses were tokenised apart") and written.startswith("2 responses")
