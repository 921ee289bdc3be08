"""Which tokens end an answer, and how a chat template opens and ends one: the only place that decides this.

An answer ends with the tokenizer's eos, with the token that ends a turn of the assistant in the chat template
(`<end_of_turn>`, `<|eot_id|>`), or with one that the model's generation config names. Generation stops at each of them,
a trained answer has exactly one, at its end. What a template does is found by rendering a short conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from prefarena.modeling.adapters import adapter_at

#: What a template, which is a program, can fail with; its compilation fails with the first.
TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_QUESTION, _ANSWER = [{"role": "user", "content": "Qwz"}], "Zqxv"


@dataclass(frozen=True)
class AnswerForm:
    """The text that a chat template writes around the answer that ends a conversation.

    header: what it writes before an answer and not for generation, where it takes no notice of `add_generation_prompt`;
    the assistant's role, for one. opener: what it writes for generation and not before an answer, such as `<think>`.
    blank: white space between the prompt and an answer. before: what else it writes there, such as an empty thought.
    end: what it writes after an answer, up to the end of the turn; after: what follows that. end_id: the token that
    ends the turn; None where it writes none, and an answer ends with the tokenizer's eos.
    """

    header: str
    opener: str
    blank: str
    before: str
    end: str
    after: str
    end_id: int | None


def answer_form(
    tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] = MappingProxyType({})
) -> AnswerForm | None:
    """The form of answers in the tokenizer's chat template; None if it has no template or the template omits answers.

    `settings` are given to the template beside the messages.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        bare, prompt = (
            str(tokenizer.apply_chat_template(_QUESTION, tokenize=False, add_generation_prompt=asked, **settings))
            for asked in (False, True)
        )
        answered = [*_QUESTION, {"role": "assistant", "content": _ANSWER}]
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False, **settings))
    except TEMPLATE_FAILURES:
        return None  # of the rows that it fails on, each is rejected with the reason
    at = whole.rfind(_ANSWER)
    if at < 0:
        return None
    before, tail = whole[:at], whole[at + len(_ANSWER) :]
    between = before[len(prompt) :] if before.startswith(prompt) else ""
    header = between.rstrip(" ") if prompt == bare and between.strip() else ""
    opener = _opener(bare, prompt, before)
    end, end_id = _end_of_turn(tokenizer, tail)
    opens_next = prompt == bare == before and prompt.rstrip().endswith(tail.strip())  # the next answer, unasked
    if end_id is None and (not tail.strip() or opens_next):
        end = ""
    rest = between[len(header) :]
    blank, before_answer = (rest, "") if not rest.strip() else ("", rest)
    return AnswerForm(header, opener, blank, before_answer, end, tail[len(end) :], end_id)


def _opener(bare: str, prompt: str, before: str) -> str:
    """The part of a generation prompt that goes beyond the role, which is written before an answer, too."""
    common = 0
    while common < min(len(prompt), len(before)) and prompt[common] == before[common]:
        common += 1
    tag = prompt.rfind("<", 0, common)
    if prompt.rfind(">", 0, common) < tag:
        common = tag  # a tag is whole
    return prompt[common:] if prompt.startswith(bare) and common >= len(bare) else ""


def end_ids(tokenizer: PreTrainedTokenizerBase, configured: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The tokens that end an answer, ascending: `configured`, the tokenizer's eos, and its chat template's."""
    form = answer_form(tokenizer)
    turn = form.end_id if form is not None else None
    return tuple(sorted({*configured, *(i for i in (tokenizer.eos_token_id, turn) if i is not None)}))


def configured_ends(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> tuple[int, ...]:
    """The tokens that the model at `path` names as ends in its generation config; none where there is no model.

    A config that nobody wrote, but transformers derived from the model's, may hold the architecture's default in place
    of a token of this tokenizer: of such a one only special and added tokens count.
    """
    if (adapter := adapter_at(path)) is not None:
        path, revision = adapter.base, adapter.revision
    try:
        config = GenerationConfig.from_pretrained(str(path), revision=revision or "main")
        named, derived = config.eos_token_id, bool(getattr(config, "_from_model_config", False))
    except OSError:
        try:
            model = AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
        except (OSError, ValueError):
            return ()
        named, derived = getattr(model.get_text_config(), "eos_token_id", None), True
    return _as_ends(named, tokenizer if derived else None)


def keep_ends(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model's generation config name every token that ends an answer, for whoever serves the model."""
    derived = bool(getattr(config, "_from_model_config", False))
    named = _as_ends(config.eos_token_id, tokenizer if derived else None)
    ends = end_ids(tokenizer, named)
    if ends == _as_ends(config.eos_token_id, None):
        return
    config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    config._from_model_config = False


def load_ends(path: str | Path, tokenizer: PreTrainedTokenizerBase, revision: str | None = None) -> tuple[int, ...]:
    """The tokens that end an answer of the model at `path`, ascending."""
    return end_ids(tokenizer, configured_ends(path, tokenizer, revision))


def _as_ends(named: int | list[int] | None, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return named ids, ascending; with a `tokenizer` only those that are special or added tokens of it."""
    ids = {named} if isinstance(named, int) else set(named or ())
    known = None if tokenizer is None else tokenizer.added_tokens_decoder
    return tuple(sorted(i for i in ids if i >= 0 and (known is None or i in known)))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> tuple[str, int | None]:
    """`tail` up to and including its first special or added token, and that token; all of it where it has none."""
    if getattr(tokenizer, "split_special_tokens", False):
        return tail, None
    found: list[tuple[int, int, int]] = []  # start, minus length, id
    for number, token in tokenizer.added_tokens_decoder.items():
        is_start = number == tokenizer.bos_token_id != tokenizer.eos_token_id
        at = tail.find(token.content)
        if at >= 0 and token.content.strip() and not is_start:
            found.append((at, -len(token.content), number))
    if not found:
        return tail, None
    start, length, number = min(found)
    return tail[: start - length], number
