"""Prompt and answer are the whole conversation's own tokens, divided where the prompt ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_model import smollm2
from templates import (
    ALWAYS_OPEN,
    CHATML,
    CHATML_UNASKED,
    ENDS,
    GEMMA,
    LLAMA2,
    LLAMA3,
    QWEN3,
    R1,
    R1_OPEN,
    ZEPHYR,
    tokenizer,
)  # fmt: skip
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefarena.config import TextTask
from prefarena.data import rejections
from prefarena.data.boundary import Encoder, _num_before
from prefarena.data.conversations import Texts
from prefarena.data.formats import normalise
from prefarena.data.rejections import Unusable
from prefarena.data.tokenization import Tokenizer, TokenPair
from prefarena.modeling.load import load_tokenizer

KINDS = ["bytes", "prefix", "metaspace", "unigram"]
TASK = TextTask(data="x", max_prompt_tokens=400, max_response_tokens=400)
TOKENIZERS = {kind: tokenizer(kind) for kind in [*KINDS, "trimmed"]}


def chat(chosen: str, rejected: str = "no", question: str = "What is a river?") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def tokens_of(made: PreTrainedTokenizerBase, row: dict[str, Any]) -> TokenPair:
    return Tokenizer(made, TASK).pair(normalise(row))


def whole_ids(made: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of the whole text, with exactly one bos before it."""
    ids = made(text, add_special_tokens=False)["input_ids"]
    while ids[:1] == [made.bos_token_id]:
        ids = ids[1:]
    return [made.bos_token_id, *ids]


def rendered(made: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """What the tokenizer makes of the rendered conversation of the chosen answer."""
    return whole_ids(made, str(made.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("template", "end"), ENDS)
def test_a_conversation_is_its_own_tokens_up_to_the_end_of_the_turn(kind: str, template: str, end: str) -> None:
    made, row = tokenizer(kind, template), chat("It is large.")
    found, whole = tokens_of(made, row), rendered(made, row)
    ids = found.prompt_ids + found.chosen_ids
    assert found.num_responses_apart == found.num_responses_as_written == 0
    assert ids == whole[: len(ids)]
    assert made.convert_ids_to_tokens(found.chosen_ids[-1]) == end
    assert end not in made.convert_ids_to_tokens(found.chosen_ids[:-1])


def boundary(made: PreTrainedTokenizerBase, text: str, at: int) -> bool:
    """Whether tokens of the text meet before its character `at`; by the library's own offsets, without ours."""
    offsets = made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return all(end <= at or start >= at for start, end in offsets)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS[:3]),
    texts=st.lists(st.text(st.sampled_from("ab \nsi?é4") | st.characters(codec="utf-8"), min_size=1, max_size=8),
                   min_size=3, max_size=3),
)  # fmt: skip
def test_prompt_and_answer_are_the_whole_text_wherever_tokens_meet(kind: str, texts: list[str]) -> None:
    made = TOKENIZERS[kind]
    prompt, chosen, rejected = texts
    try:
        found = tokens_of(made, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    except Unusable:
        return
    num_whole = 0
    for answer, ids in ((chosen, found.chosen_ids), (rejected, found.rejected_ids)):
        assert ids[-1] == made.eos_token_id
        whole = whole_ids(made, prompt + answer)
        is_whole = found.prompt_ids + ids[:-1] == whole
        num_whole += is_whole
        if not is_whole and boundary(made, prompt + answer, len(prompt)):  # the other answer's prompt is another
            assert found.num_responses_apart
    assert num_whole >= 2 - found.num_responses_apart


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, "trimmed"]),
    texts=st.lists(st.text(st.sampled_from("ab \nsi?é4🙂́") | st.characters(codec="utf-8"), min_size=1, max_size=8),
                   min_size=3, max_size=3),
)  # fmt: skip
def test_whole_texts_settle_what_the_prompt_by_itself_would(kind: str, texts: list[str]) -> None:
    """The shortcut, which never encodes the prompt alone, gives what the long way gives."""
    made = Tokenizer(TOKENIZERS[kind], TASK)
    prompt, chosen, rejected = texts
    found = Texts(prompt, (chosen, rejected), made.tokenizer.eos_token_id)
    ids = made.encoder.divided([(prompt + answer, len(prompt)) for answer in (chosen, rejected)])
    assert made._divided(found, ids) == made._divided_by_prompt(found, [whole for whole, _ in ids])


def test_most_texts_are_encoded_without_their_prompts_alone() -> None:
    for kind in ("bytes", "prefix", "metaspace"):
        encoder = Tokenizer(TOKENIZERS[kind], TASK).encoder
        ((ids, number),) = encoder.divided([("What is a river? It is large.", 16)])
        assert number is not None
        assert ids[:number] == encoder.encode(["What is a river?"])[0]


@pytest.mark.parametrize("kind", ["prefix", "metaspace"])
@pytest.mark.parametrize(("prompt", "answer"), [("Q:", " yes"), ("Q: ", "yes"), ("Q", "s it"), ("Q\n", "yes")])
def test_no_answer_gets_a_space_of_the_tokenizers(kind: str, prompt: str, answer: str) -> None:
    made = TOKENIZERS[kind]
    found = tokens_of(made, {"prompt": prompt, "chosen": answer, "rejected": answer + " no"})
    assert made.decode(found.prompt_ids[1:] + found.chosen_ids[:-1]) == prompt + answer


def test_answers_that_tokens_join_to_the_prompt_are_apart_and_counted() -> None:
    found = tokens_of(TOKENIZERS["prefix"], {"prompt": "Say: ", "chosen": "yes", "rejected": "no"})
    assert found.num_responses_apart == 2


# ---------------------------------------------------------------------------------- the encoder by itself


def divided(encoder: Encoder, left: str, right: str) -> tuple[list[int], list[int]] | None:
    """The long way, which looks at the left text's own tokens."""
    whole_ids, left_ids = encoder.encode([left + right, left])
    return encoder.cut(left + right, len(left), whole_ids, left_ids)


def test_no_special_tokens_of_the_tokenizers_own_are_written() -> None:
    """One that would put bos and eos around every text, cut it and pad it gives the same as one that would not."""
    made = tokenizer("bytes")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.backend_tokenizer.enable_truncation(3)
    made.backend_tokenizer.enable_padding(length=40)
    plain, encoder = Encoder(TOKENIZERS["bytes"]), Encoder(made)
    texts = ["What is a river?", "It is large.", "é"]
    assert encoder.encode(texts) == plain.encode(texts)
    assert encoder.divided([("What is a river?", 4)]) == plain.divided([("What is a river?", 4)])
    made.add_tokens([AddedToken("tree", single_word=True, normalized=False)])
    assert divided(encoder, "tree", "b") == divided(plain, "tree", "b")  # the offsets, for one


def test_the_whole_texts_tokens_count_where_the_left_text_by_itself_has_others() -> None:
    """A word is a token where it stands alone, as it does in the prompt and not in the whole text."""
    made = tokenizer("bytes")
    made.add_tokens([AddedToken("tree", single_word=True, normalized=False)])
    encoder = Encoder(made)
    assert encoder.encode(["tree"]) == [[made.convert_tokens_to_ids("tree")]]
    letters = made.convert_tokens_to_ids(list("treeb"))
    assert divided(encoder, "tree", "b") == (letters[:4], letters[4:])
    assert divided(encoder, "tree", "s") is None  # the whole text has a token "es", after "tre"


@pytest.mark.parametrize(
    ("left", "right", "number"),
    [
        ("a ", " b", 2),  # the space is a token by itself: the left text's own
        ("Say: ", "yes", None),  # the space begins the token of " yes", whose offsets hide it
        ("Say:", " yes", 4),
        ("", "yes", 0),
    ],
)
def test_offsets_without_white_space_make_no_cuts(left: str, right: str, number: int | None) -> None:
    encoder = Encoder(TOKENIZERS["trimmed"])
    ids = encoder.encode([left + right])[0]
    assert divided(encoder, left, right) == (None if number is None else (ids[:number], ids[number:]))


def test_spaces_that_the_prompt_by_itself_joins_are_not_cut_where_offsets_hide_them() -> None:
    """A token without characters stands at the cut, and the prompt that generation would make has another one there."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "Ġ", "ĠĠ"])}
    backend = Backend(models.BPE(vocabulary, [("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert encoder.encode(["a  ", "a  b"]) == [[0, 3], [0, 2, 2, 1]]
    assert encoder.divided([("a  b", 3)]) == [([0, 2, 2, 1], None)]
    assert divided(encoder, "a  ", "b") is None


def test_a_token_of_no_text_meets_no_other() -> None:
    backend = TOKENIZERS["bytes"].backend_tokenizer
    written = Backend.from_str(backend.to_str())
    written.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert _num_before(written.encode("is", add_special_tokens=True), 0) is None
    assert _num_before(written.encode("?is", add_special_tokens=True), 1) == 2


def test_an_unknown_token_is_cut_where_it_ends_and_not_inside() -> None:
    encoder = Encoder(TOKENIZERS["unigram"])  # fuses characters that it does not know
    for left, right, num_left in (("a🙂", "🙂b", None), ("a🙂", "a", 3), ("a🙂", "", 3)):
        ids = encoder.encode([left + right])[0]
        found = divided(encoder, left, right)
        assert found == (None if num_left is None else (ids[:num_left], ids[num_left:]))


def small_fast(tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A BPE of these tokens alone; what it does not know becomes one unknown token."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", *tokens])}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True)
    return PreTrainedTokenizerFast(tokenizer_object=Backend(model), unk_token="<unk>")


def test_an_answer_apart_begins_behind_an_anchor_that_does_not_join_it() -> None:
    encoder = Encoder(small_fast(["a", "b", "x", "xa"], [("x", "a")]))
    assert encoder.apart("ab") == [1, 2]  # the first anchor is unknown, and ends where the answer begins
    assert encoder.apart("🙂b") == [0, 2]  # the first anchor and the answer are one unknown token; the second is not
    encoder = Encoder(small_fast(["a", "b", "x", "xa", "\n", "\na"], [("x", "a"), ("\n", "a")]))
    assert encoder.apart("ab") == [1, 2]  # both anchors would join it


class TestWithoutFastBackend:
    """A tokenizer in Python, of bytes, which ends every text with its eos unless it is told not to."""

    @pytest.fixture
    def made(self) -> ByT5Tokenizer:
        made = ByT5Tokenizer()
        made.add_tokens(["ab", "\na", "xa"])  # so that tokens can reach over a cut
        return made

    def test_texts_are_their_tokens_without_an_end(self, made: ByT5Tokenizer) -> None:
        assert made("c")["input_ids"][-1] == made.eos_token_id
        joined = made.convert_tokens_to_ids("ab")
        assert Encoder(made).encode(["dc", "cab"]) == [[ord("d") + 3, ord("c") + 3], [ord("c") + 3, joined]]
        assert Encoder(made).encode([]) == Encoder(made).divided([]) == []

    def test_where_a_text_is_divided_is_left_to_the_longer_way(self, made: ByT5Tokenizer) -> None:
        encoder = Encoder(made)
        assert encoder.divided([("dc", 1), ("cab", 2)]) == [(ids, None) for ids in encoder.encode(["dc", "cab"])]

    def test_it_is_cut_where_the_left_text_has_the_same_tokens(self, made: ByT5Tokenizer) -> None:
        encoder = Encoder(made)
        for left, right in (("dc", "d"), ("c", "ab"), ("", "dc"), ("d<unk>", "c")):
            assert divided(encoder, left, right) == tuple(encoder.encode([left]) + encoder.encode([right]))
        assert divided(encoder, "ca", "b") is None

    def test_an_answer_that_both_anchors_would_join_is_its_own_tokens(self, made: ByT5Tokenizer) -> None:
        encoder = Encoder(made)
        assert encoder.apart("ac") == [ord("a") + 3, ord("c") + 3]
        assert encoder.apart("dc") == [ord("d") + 3, ord("c") + 3]

    def test_a_long_text_causes_no_warning(self, made: ByT5Tokenizer) -> None:
        """It is cut to the task's limit later on, and would be warned of as too long for the model."""
        made.model_max_length = 3
        Encoder(made).encode(["dcdcdc"])
        assert not made.deprecation_warnings


# ------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("template", [CHATML_UNASKED, ALWAYS_OPEN])
def test_a_role_that_a_template_writes_unasked_belongs_to_the_prompt(template: str) -> None:
    made = tokenizer("bytes", template)
    found = tokens_of(made, chat("It is large."))
    assert made.decode(found.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert made.decode(found.chosen_ids) == "It is large.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "content", "answer", "num_as_written"),
    [
        (R1, "<think>large?</think>yes", "<think>large?</think>yes</s>", 1),  # strips thoughts
        (R1, "yes", "yes</s>", 0),
        (R1_OPEN, "<think>\nlarge?</think>yes", "large?</think>yes</s>", 1),  # opens a thought
        (R1_OPEN, "large?</think>yes", "large?</think>yes</s>", 1),
        (QWEN3, "<think>\nlarge?\n</think>\n\nyes", "<think>\nlarge?\n</think>\n\nyes<|im_end|>", 0),
        (QWEN3, "<think>large?</think>yes", "<think>\nlarge?\n</think>\n\nyes<|im_end|>", 0),
        (QWEN3, "yes", "<think>\n\n</think>\n\nyes<|im_end|>", 0),
    ],
)
def test_thoughts_are_trained_on_as_generation_gives_them(
    template: str, content: str, answer: str, num_as_written: int
) -> None:
    made = tokenizer("bytes", template)
    found = tokens_of(made, chat(content, content + " indeed"))
    assert made.decode(found.chosen_ids) == answer
    assert found.num_responses_as_written == 2 * num_as_written


def test_an_answer_without_the_thought_that_generation_opens_is_refused() -> None:
    with pytest.raises(Unusable) as refused:
        tokens_of(tokenizer("bytes", R1_OPEN), chat("yes"))
    assert refused.value.reason == rejections.NOT_CONTINUED
    assert "'<think>'" in refused.value.detail
    assert refused.value.reason in rejections.STRUCTURAL


# ---------------------------------------------------------------------------------- where answers end


@pytest.mark.parametrize("tail", ["", "\n", " \n\n"])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (ZEPHYR, "</s>")]
)
def test_text_in_the_templates_form_ends_with_its_end(template: str, end: str, tail: str) -> None:
    made = tokenizer("bytes", template)
    prompt = str(made.apply_chat_template(chat("")["prompt"], tokenize=False, add_generation_prompt=True))
    for answers in (("yes" + end + tail, "no" + end + tail), ("yes", "no"), ("yes" + end + "\n</s>", "no" + end)):
        found = tokens_of(made, {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        assert made.decode(found.chosen_ids) == "yes" + end
        assert made.decode(found.rejected_ids) == "no" + end


@pytest.mark.parametrize("template", [GEMMA, LLAMA2])
def test_an_end_inside_an_answer_is_refused(template: str) -> None:
    made = tokenizer("prefix", template)
    for text in ("a<end_of_turn>b", "a</s>b", "a<s>b"):
        if text == "a<end_of_turn>b" and template == LLAMA2:
            continue
        with pytest.raises(Unusable) as refused:
            tokens_of(made, chat(text))
        assert refused.value.reason == rejections.END_INSIDE


def test_a_real_chat_model_keeps_the_rendered_tokens() -> None:
    made = load_tokenizer(smollm2())
    assert tokens_of(made, chat("  Two")).num_responses_apart == 1  # the token of "\\n " reaches over the place
    for content in ("It is large.", "Two\n\nlines ", "é 🙂"):
        row = chat(content)
        found, whole = tokens_of(made, row), rendered(made, row)
        ids = found.prompt_ids + found.chosen_ids
        assert (ids, found.num_responses_apart) == (whole[: len(ids)], 0)
        assert ids[-1] == made.eos_token_id
