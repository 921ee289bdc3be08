"""The text of a pair as a model sees it: the prompt, and what follows it up to the end of each answer.

Messages go through the tokenizer's chat template. A tokenizer without one gets them as a transcript: a blank line,
`System:`, `Human:` or `Assistant:`, and the content, as in HH-RLHF. Plain prompts stay plain whatever the tokenizer.

An answer must be what generation can give behind the prompt that generation is given. Where a template's rendering of
the whole conversation is not that, because it rewrites the prompt or leaves out thoughts, the answer is taken as it is
written; where its generation prompt opens what the answer does not go on with, the row is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from prefarena.data.formats import Message, Pair
from prefarena.data.rejections import NOT_CONTINUED, TEMPLATE_REFUSES, Unusable
from prefarena.data.template_inputs import TOOLS, Inputs, read_inputs
from prefarena.modeling.endings import TEMPLATE_FAILURES, AnswerForm, answer_form

_TURNS = {"user": "Human", "assistant": "Assistant", "system": "System", "developer": "System", "tool": "Tool"}
_ANSWER_LABEL = "\n\nAssistant:"
_TAG = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Texts:
    """A pair's texts. answers: chosen and rejected, each with the text of the token that ends it where it has one.

    end_id: the token that ends an answer without one; is_closed: an end token at an answer's end is its own, not one
    within a message. num_as_written: answers that the chat template would not render as they are written behind its
    generation prompt, and that are taken as they are written.
    """

    prompt: str
    answers: tuple[str, str]
    end_id: int
    is_closed: bool = True
    num_as_written: int = 0


@dataclass(frozen=True)
class Conversations:
    """Converts pairs to texts, for one tokenizer. ends: the tokens that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]

    @cached_property
    def form(self) -> AnswerForm | None:
        """The form of answers in the chat template, if there is one that shows them."""
        return answer_form(self.tokenizer)

    @cached_property
    def _forms(self) -> dict[str, AnswerForm | None]:
        """The forms found so far, by the settings that rows give the template."""
        return {}

    def _form_with(self, inputs: Inputs) -> AnswerForm | None:
        settings = {name: value for name, value in inputs.items() if name != TOOLS}
        if not settings:
            return self.form
        key = json.dumps(settings, sort_keys=True)
        if key not in self._forms:
            self._forms[key] = answer_form(self.tokenizer, settings)
        return self._forms[key]

    def texts(self, pair: Pair) -> Texts:
        """Return a pair's texts. Raises Unusable where the chat template does not accept it."""
        messages = pair.messages
        inputs = read_inputs(pair.inputs, self.tokenizer)
        if messages is None:
            prompt = str(pair.prompt)
            return Texts(prompt, (self._ended(pair.chosen), self._ended(pair.rejected)), self._end_of(prompt))
        if self.tokenizer.chat_template is None:
            prompt = _transcript(messages) + _ANSWER_LABEL
            return Texts(prompt, (f" {pair.chosen}", f" {pair.rejected}"), self._eos, is_closed=False)
        return self._rendered_pair(messages, pair, inputs)

    def prompt(self, pair: Pair) -> str:
        """The text of a pair's prompt alone, as generation is given it. Raises Unusable as `texts` does."""
        messages = pair.messages
        inputs = read_inputs(pair.inputs, self.tokenizer)
        if messages is None:
            return str(pair.prompt)
        if self.tokenizer.chat_template is None:
            return _transcript(messages) + _ANSWER_LABEL
        form = self._form_with(inputs)
        prompt = self._render(messages, inputs, True)
        if form is None or not form.header:
            return prompt
        whole = self._render([*messages, {"role": "assistant", "content": pair.chosen}], inputs, False)
        return prompt + form.header if whole.startswith(prompt + form.header) else prompt

    # ------------------------------------------------------------------------------------- messages

    def _rendered_pair(self, messages: list[Message], pair: Pair, inputs: Inputs) -> Texts:
        form = self._form_with(inputs)
        prompt = self._render(messages, inputs, True)
        contents = (pair.chosen, pair.rejected)
        wholes = [
            self._render([*messages, {"role": "assistant", "content": answer}], inputs, False) for answer in contents
        ]
        if form is None:
            answers = [
                whole[len(prompt) :] if whole.startswith(prompt) else content
                for whole, content in zip(wholes, contents, strict=True)
            ]
            return Texts(prompt, (answers[0], answers[1]), self._eos)
        if all(whole.startswith(prompt + form.header) for whole in wholes):
            prompt += form.header
        found = [_answer(prompt, whole, content, form) for whole, content in zip(wholes, contents, strict=True)]
        is_closed = form.end_id is not None
        end_id = self._eos if form.end_id is None else form.end_id
        return Texts(prompt, (found[0][0], found[1][0]), end_id, is_closed, sum(written for _, written in found))

    def _render(self, messages: list[Message], inputs: Inputs, for_generation: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=for_generation, **inputs
                )
            )
        except TEMPLATE_FAILURES as error:
            raise Unusable(TEMPLATE_REFUSES, f"{type(error).__name__}: {error}") from None

    # ---------------------------------------------------------------------------------------- text

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def _end_texts(self) -> dict[str, int]:
        """The texts of the tokens that end an answer, where the tokenizer reads them as such."""
        if getattr(self.tokenizer, "split_special_tokens", False):
            return {}
        known = self.tokenizer.added_tokens_decoder
        return {known[number].content: number for number in self.ends if number in known}

    def _end_of(self, prompt: str) -> int:
        """The end to add to an answer without one: the template's if the prompt is in the template's form."""
        turn = None if self.form is None else self.form.end_id
        inside = turn is not None and any(text in prompt for text, number in self._end_texts.items() if number == turn)
        return turn if inside and turn is not None else self._eos

    def _ended(self, text: str) -> str:
        """Return a plain answer, cut after the first of any end tokens that it ends with."""
        found, rest = text, text.rstrip()
        while end := next((end for end in self._end_texts if rest.endswith(end)), None):
            found = rest
            rest = rest[: -len(end)]
            if not rest.rstrip().endswith(tuple(self._end_texts)):
                break
            rest = rest.rstrip()
        return found


def _transcript(messages: list[Message]) -> str:
    return "".join(f"\n\n{_TURNS[message['role']]}: {message['content']}" for message in messages)


def _answer(prompt: str, whole: str, content: str, form: AnswerForm) -> tuple[str, bool]:
    """The text of an answer behind `prompt`, and whether it is as written. Raises Unusable where it cannot follow."""
    if whole.startswith(prompt):
        rendered = whole[len(prompt) :]
        opened = form.opener if prompt.endswith(form.opener) else ""
        if _squeezed(content) in _squeezed(opened + rendered):
            return _up_to_end(rendered, form), False
    return _continued(content, form) + form.end, True


def _up_to_end(rendered: str, form: AnswerForm) -> str:
    """Cut an answer at the end of its turn: what a template writes after that does not belong to it."""
    if rendered.endswith(form.end + form.after):
        return rendered[: len(rendered) - len(form.after)]
    at = rendered.rfind(form.end) if form.end_id is not None else -1
    return rendered if at < 0 else rendered[: at + len(form.end)]


def _continued(content: str, form: AnswerForm) -> str:
    """The content as it continues a generation prompt. Raises Unusable if that opens something the content lacks."""
    opener = form.opener.strip()
    if not opener:
        return form.blank + content
    start = content.lstrip()
    if start.startswith(opener):
        rest = start[len(opener) :]
        return rest if form.opener.endswith(opener) else rest.lstrip()
    tag = _TAG.fullmatch(opener)
    if tag is not None and f"</{tag[1]}>" in content:
        return content
    raise Unusable(NOT_CONTINUED, f"the generation prompt ends with {opener!r}, but the answer does not contain it")


def _squeezed(text: str) -> str:
    """The text without white space, which templates change."""
    return "".join(text.split())
