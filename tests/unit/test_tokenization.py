"""Token boundaries, bos and eos, truncation, and the tokenizer learnt from a task's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefarena.config import TextTask
from prefarena.data import rejections
from prefarena.data.formats import normalise
from prefarena.data.rejections import Unusable
from prefarena.data.tokenization import Tokenizer, train_tokenizer
from prefarena.errors import UserError

TEXTS = ["\n\nHuman: Why is the sky blue?\n\nAssistant: I think that light scatters.", "naïve café 你好 🙂"] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = {
    "prompt": [{"role": "user", "content": "sky"}],
    "chosen": [{"role": "assistant", "content": "blue"}],
    "rejected": [{"role": "assistant", "content": "black"}],
}


@pytest.fixture
def bpe(tmp_path: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300, tmp_path / "bpe")


def test_boundary_is_exact_and_text_survives(bpe: PreTrainedTokenizerFast) -> None:
    prompt, chosen, rejected = "\n\nHuman: naïve 🙂?\n\nAssistant:", " I think\u2028so ", " I think not"
    tokens = Tokenizer(bpe, TextTask(data="x")).pair(
        normalise({"chosen": prompt + chosen, "rejected": prompt + rejected})
    )
    assert tokens.prompt_ids[0] == bpe.bos_token_id
    assert bpe.decode(tokens.prompt_ids[1:]) == prompt
    for ids, text in ((tokens.chosen_ids, chosen), (tokens.rejected_ids, rejected)):
        assert bpe.decode(ids[:-1]) == text
        assert (tokens.prompt_ids + ids).count(bpe.bos_token_id) == 1
        assert ids.count(bpe.eos_token_id) == 1 and ids[-1] == bpe.eos_token_id


def test_a_batch_gives_what_its_pairs_give_one_by_one(bpe: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"naïve {i} 🙂?", "chosen": f" I think\u2028so {i}" * (i + 1), "rejected": "x"} for i in range(9)
    ]
    rows[3]["rejected"] = " <|bos|>no"
    other = {**CHAT, "prompt": [{"role": "user", "content": "🙂"}]}
    rows += [CHAT, {"prompt": "p" * 99, "chosen": "a", "rejected": "b"}, other]
    task = TextTask(data="x", max_prompt_tokens=60, max_response_tokens=40)
    pairs = [normalise(row) for row in rows]
    for template in (None, TEMPLATE):
        bpe.chat_template = template
        tokenizer = Tokenizer(bpe, task)
        together = tokenizer.pairs(pairs)
        for pair, found in zip(pairs, together, strict=True):
            if isinstance(found, Unusable):
                with pytest.raises(Unusable, match=found.reason):
                    tokenizer.pair(pair)
            else:
                assert found == tokenizer.pair(pair)
        reasons = [found.reason if isinstance(found, Unusable) else None for found in together]
        assert reasons == [None] * 3 + [rejections.END_INSIDE] + [None] * 6 + [rejections.PROMPT_TOO_LONG, None]
        for pair, found in zip(pairs[:3], together[:3], strict=True):  # as transformers encodes a single text
            assert not isinstance(found, Unusable)
            ids = [
                bpe(text, add_special_tokens=False)["input_ids"] for text in (pair.prompt, pair.chosen, pair.rejected)
            ]
            whole = [[bpe.bos_token_id, *ids[0]], [*ids[1], bpe.eos_token_id], [*ids[2], bpe.eos_token_id]]
            assert [found.prompt_ids, found.chosen_ids, found.rejected_ids] == [whole[0], whole[1][:40], whole[2]]


def test_special_tokens_may_be_split_as_the_tokenizer_says(bpe: PreTrainedTokenizerFast) -> None:
    pair = normalise({"prompt": "p", "chosen": "a<|eos|>b", "rejected": "c"})
    bpe.split_special_tokens = True
    (found,) = Tokenizer(bpe, TextTask(data="x")).pairs([pair])
    assert not isinstance(found, Unusable)
    assert found.chosen_ids == [*bpe("a<|eos|>b", add_special_tokens=False)["input_ids"], bpe.eos_token_id]
    assert bpe.eos_token_id not in found.chosen_ids[:-1]


def test_chat_template_writes_neither_a_second_bos_nor_a_second_eos(bpe: PreTrainedTokenizerFast) -> None:
    bpe.chat_template = TEMPLATE
    tokens = Tokenizer(bpe, TextTask(data="x")).pair(normalise(CHAT))
    assert bpe.decode(tokens.prompt_ids) == "<|bos|>[user]sky<|eos|>\n[assistant]"
    assert bpe.decode(tokens.chosen_ids) == "blue<|eos|>"


def test_messages_without_a_template_become_a_transcript(bpe: PreTrainedTokenizerFast) -> None:
    tokens = Tokenizer(bpe, TextTask(data="x")).pair(normalise(CHAT))
    assert bpe.decode(tokens.prompt_ids) == "<|bos|>\n\nHuman: sky\n\nAssistant:"
    assert bpe.decode(tokens.chosen_ids) == " blue<|eos|>"


def test_a_template_that_refuses_a_dialogue_drops_the_row(bpe: PreTrainedTokenizerFast) -> None:
    bpe.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Unusable, match="roles must alternate"):
        Tokenizer(bpe, TextTask(data="x")).pair(normalise(CHAT))


def test_truncation_keeps_the_end_of_prompts_and_the_start_of_responses(bpe: PreTrainedTokenizerFast) -> None:
    pair = normalise({"prompt": "ABCDEFGH", "chosen": "UVWXYZ", "rejected": "ZYX"})
    task = TextTask(data="x", max_prompt_tokens=4, max_response_tokens=4, long_prompts="keep_end")
    tokens = Tokenizer(bpe, task).pair(pair)
    assert bpe.decode(tokens.prompt_ids) == "<|bos|>FGH"
    assert (bpe.decode(tokens.chosen_ids), bpe.decode(tokens.rejected_ids)) == ("UVWX", "ZYX<|eos|>")
    assert (tokens.prompt_cut, tokens.num_responses_cut) == (True, 1)
    with pytest.raises(Unusable) as dropped:
        Tokenizer(bpe, task.model_copy(update={"long_prompts": "drop"})).pair(pair)
    assert dropped.value.reason == rejections.PROMPT_TOO_LONG


def test_pairs_that_truncation_makes_equal_and_inner_eos_are_dropped(bpe: PreTrainedTokenizerFast) -> None:
    tokenizer = Tokenizer(bpe, TextTask(data="x", max_response_tokens=2))
    for chosen, expected in (("xyz", rejections.IDENTICAL_CUT), ("a<|eos|>b", rejections.END_INSIDE)):
        with pytest.raises(Unusable) as dropped:
            tokenizer.pair(normalise({"prompt": "p", "chosen": chosen, "rejected": "xyw"}))
        assert dropped.value.reason == expected
    with pytest.raises(Unusable) as same:
        tokenizer.pair(normalise({"prompt": "p", "chosen": "a", "rejected": "a<|eos|>"}))
    assert same.value.reason == rejections.IDENTICAL


def test_a_tokenizer_without_eos_is_the_users_to_mend(bpe: PreTrainedTokenizerFast) -> None:
    bpe.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        Tokenizer(bpe, TextTask(data="x"))


def test_no_room_for_a_prompt(bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="max_prompt_tokens"):
        Tokenizer(bpe, TextTask(data="x", max_prompt_tokens=1))


def test_training_is_deterministic_and_special_tokens_are_distinct(tmp_path: Path) -> None:
    first, second = (train_tokenizer(TEXTS, 320, tmp_path / name) for name in ("a", "b"))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert (first.pad_token_id, first.bos_token_id, first.eos_token_id) == (0, 1, 2)
    assert 259 < len(second) <= 320


def test_pretraining_pieces_hold_the_whole_text(bpe: PreTrainedTokenizerFast) -> None:
    tokenizer = Tokenizer(bpe, TextTask(data="x", max_prompt_tokens=4, max_response_tokens=3))
    pieces = tokenizer.text("abcdefghijklmnop")
    assert all(len(piece) <= 7 and piece[0] == bpe.bos_token_id for piece in pieces)
    assert bpe.decode([token for piece in pieces for token in piece[1:]]) == "abcdefghijklmnop<|eos|>"
