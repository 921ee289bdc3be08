"""What the limits would do is said after the first rows, and stops the run there where it is too much. No Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.preferences import check_text_task, prepare_text
from prefarena.config import PretrainedModel, ScratchModel, TextTask
from prefarena.data.first_rows import look_at_pairs
from prefarena.data.limits import Limit, look_at_limits
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError
from prefarena.modeling.load import load_tokenizer

Row = dict[str, Any]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that makes one token of every letter; with bos and eos `n` letters are `n + 1` tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer([""], 259, folder)
    return folder


def row(prompt: int = 10, chosen: int = 5, rejected: int = 6, **columns: Any) -> Row:
    """A pair of so many tokens, all ends counted."""
    return {"prompt": "p" * (prompt - 1), "chosen": "c" * (chosen - 1), "rejected": "r" * (rejected - 1), **columns}


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def said(path: Path, rows: Sequence[Row], bpe: Path, **settings: Any) -> list[str]:
    task = TextTask(data=write(path / "pairs.jsonl", rows), **{"max_prompt_tokens": 256, **settings})
    return look_at_limits(task, look_at_pairs(task), Tokenizer.load(bpe, None, task))


def with_long(number: int, tokens: Sequence[int], others: int = 1500) -> list[Row]:
    """`number` prompts of the first 1,000 rows are long."""
    return [row(tokens[i % len(tokens)] if i < number else 10) for i in range(others)]


# ------------------------------------------------------------------------------------------------------- sentences


def test_limits_that_do_nothing_are_not_spoken_of(tmp_path: Path, bpe: Path) -> None:
    assert said(tmp_path, [row(256, 128, 127)] * 5, bpe, max_response_tokens=128) == []


def test_long_prompts_are_told_with_the_limit_that_would_keep_them(tmp_path: Path, bpe: Path) -> None:
    (sentence,) = said(tmp_path, with_long(38, [913, 300]), bpe, max_rejected_share=0.05)
    assert sentence == (
        f"{tmp_path}/pairs.jsonl: of the first 1,000 rows, 38 (3.8%) have a prompt of more than 256 tokens, "
        "which is left out (task.long_prompts: drop); the longest has 913; task.max_prompt_tokens: 512 would keep "
        "98.1% whole"
    )
    (sentence,) = said(tmp_path, with_long(3, [913], others=40), bpe, long_prompts="keep_end")
    assert sentence == (
        f"{tmp_path}/pairs.jsonl: of its 40 rows, 3 (7.5%) have a prompt of more than 256 tokens, which is cut "
        "at its beginning (task.long_prompts: keep_end); the longest has 913; task.max_prompt_tokens: 1024 would keep "
        "all whole"
    )


def test_long_responses_are_told_with_the_limit_that_would_keep_them(tmp_path: Path, bpe: Path) -> None:
    rows = [row(chosen=200, rejected=300), row(chosen=129), *[row()] * 8]
    (sentence,) = said(tmp_path, rows, bpe, max_response_tokens=128)
    assert sentence == (
        f"{tmp_path}/pairs.jsonl: of its 10 rows, 3 of 20 responses (15.0%) have more than 128 tokens and lose their "
        "last ones, so that they do not end; the longest has 300; task.max_response_tokens: 512 would keep all whole"
    )


def test_only_the_first_rows_and_only_those_of_max_rows_are_looked_at(tmp_path: Path, bpe: Path) -> None:
    rows = [*[row()] * 1000, *[row(900)] * 500]
    assert said(tmp_path, rows, bpe) == []
    assert said(tmp_path, rows[990:], bpe, max_rows=10) == []
    (sentence,) = said(tmp_path, rows[990:], bpe, max_rows=11, max_rejected_share=0.1)
    assert "of its 11 rows, 1 (9.1%) have a prompt" in sentence


def test_other_reasons_are_told_beside_the_lengths(tmp_path: Path, bpe: Path) -> None:
    rows = [row(chosen=6, rejected=6, prompt=10 + i) for i in range(40)] + [row(label=3.0)]
    (sentence,) = said(tmp_path, rows, bpe, max_rejected_share=0.03)
    assert "1 (2.4%) cannot be trained on for reasons other than their length" in sentence


@pytest.mark.parametrize(
    ("lengths", "room", "most", "expected"),
    [
        ([10, 300], 10**9, 0, "task.x: 512 would keep all whole"),
        ([512, 300], 10**9, 0, "task.x: 512 would keep all whole"),
        ([513], 10**9, 0, "task.x: 1024 would keep all whole"),
        ([10] * 997 + [300, 300, 5000], 10**9, 0.005, ""),  # few enough already
        ([10] * 990 + [300] * 9 + [5000], 10**9, 0.005, "task.x: 512 would keep 99.9% whole"),
        ([300, 900, 5000], 1000, 0, "task.x: 1000 would keep 66.6% whole; more does not fit the model's context"),
        ([300], 200, 0, ""),  # nothing more fits
        ([], 10**9, 0, ""),
    ],
)
def test_the_limit_that_is_named_keeps_enough_and_fits(
    lengths: list[int], room: int, most: float, expected: str
) -> None:
    assert Limit("task.x", 256, room).better(lengths, most) == expected


# ------------------------------------------------------------------------------------------------------------ stops


def test_too_many_long_prompts_stop_the_run_after_the_first_rows(tmp_path: Path, bpe: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError) as error:
        said(tmp_path, with_long(38, [913, 300]), bpe)
    assert str(error.value) == (
        f"{data}: 38 of its first 1000 rows (3.8%) cannot be trained on, and task.max_rejected_share allows 0.01 of "
        f"them: prompt too long 38, first at {data}:1 (913 tokens) - raise task.max_prompt_tokens, or set "
        "task.long_prompts: keep_end; task.max_prompt_tokens: 1024 would keep all whole; fix the rows, or raise "
        "task.max_rejected_share"
    )
    for settings in ({"max_prompt_tokens": 1024}, {"long_prompts": "keep_end"}, {"max_rejected_share": 0.038}):
        said(tmp_path, with_long(38, [913, 300]), bpe, **settings)  # each of the remedies mends it
    said(tmp_path, with_long(10, [913]), bpe)  # as many as are allowed


def test_rows_of_a_wrong_form_stop_it_there_before_there_is_a_tokenizer(tmp_path: Path) -> None:
    rows = [row() if i % 50 else row(label=7.0) for i in range(3000)]
    with pytest.raises(UserError, match=r"20 of its first 1000 rows \(2\.0%\) cannot be trained on"):
        check_text_task(TextTask(data=write(tmp_path / "pairs.jsonl", rows)))


def test_answers_that_are_equal_once_cut_stop_it_there(tmp_path: Path, bpe: Path) -> None:
    same = {"prompt": "p", "chosen": "c" * 200, "rejected": "c" * 201}
    with pytest.raises(UserError, match=r"1000 of its first 1000 rows .* raise task.max_response_tokens"):
        said(tmp_path, [same] * 1200, bpe, max_response_tokens=100)


def test_the_test_set_is_looked_at_too(tmp_path: Path, bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    tokenizer.save_pretrained(tmp_path / "model")
    data, test = write(tmp_path / "data.jsonl", [row()] * 9), write(tmp_path / "test.jsonl", [row(400), *[row()] * 8])
    model = PretrainedModel(path=str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"test\.jsonl: 1 of 9 rows .* task.max_prompt_tokens: 512 would keep all"):
        check_text_task(TextTask(data=data, test_data=test, max_prompt_tokens=256), model)
    assert check_text_task(TextTask(data=data, test_data=test, max_prompt_tokens=512), model)


def test_the_commands_exit_status_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "output": str(tmp_path / "out"),
        "task": {"kind": "text", "data": write(tmp_path / "pairs.jsonl", [row(label=7.0)] * 20 + [row()] * 1200)},
        "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["compare", str(tmp_path / "config.yaml")]) == 2
    assert "20 of its first 1000 rows (2.0%) cannot be trained on" in capsys.readouterr().err


def noise(letters: int, seed: int) -> str:
    """Text that no tokenizer of a few tokens makes much shorter."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrst", k=letters))


def test_a_model_from_scratch_is_stopped_once_its_tokenizer_is_learnt(tmp_path: Path) -> None:
    rows = [{**row(), "prompt": noise(2000 if i % 30 == 0 else 20, seed=i)} for i in range(1100)]
    task = TextTask(data=write(tmp_path / "pairs.jsonl", rows), long_prompts="drop")
    with pytest.raises(UserError, match=r"34 of its first 1000 rows \(3\.4%\) .* prompt too long 34"):
        prepare_text(task, None, ScratchModel(vocab_size=300), tmp_path / "out")
    assert (tmp_path / "out/tokenizer/tokenizer.json").is_file() and not (tmp_path / "out/dropped.jsonl").exists()


def test_what_the_limits_do_is_said_before_the_rest_is_tokenised(tmp_path: Path) -> None:
    rows = [{**row(), "prompt": noise(2000 if i % 30 == 0 else 20, seed=i)} for i in range(1100)]
    task = TextTask(data=write(tmp_path / "pairs.jsonl", rows), long_prompts="keep_end")
    said: list[str] = []

    class Stop(Exception):
        pass

    def say(sentence: str) -> None:
        said.append(sentence)
        raise Stop

    with pytest.raises(Stop):
        prepare_text(task, None, ScratchModel(vocab_size=300), tmp_path / "out", say=say)
    assert "of the first 1,000 rows, 34 (3.4%) have a prompt of more than 256 tokens" in said[0]
    assert not (tmp_path / "out/dropped.jsonl").exists()
