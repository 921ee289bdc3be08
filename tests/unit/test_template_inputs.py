"""Tools and settings that rows give the chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from templates import CHATML, tokenizer

from prefarena.config import TextTask
from prefarena.data import rejections as why
from prefarena.data.formats import normalise
from prefarena.data.rejections import Unusable
from prefarena.data.tokenization import Tokenizer, TokenPair

Row = dict[str, Any]

#: Prints tools, and closes a thought before an answer where none is wanted, as Qwen3 does.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)  # fmt: skip
CHAT = {
    "prompt": [{"role": "user", "content": "Blue?"}],
    "chosen": [{"role": "assistant", "content": "Yes."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}
FILLED = {**TOOL, "function": {**TOOL["function"], "strict": None}, "id": None}  # type: ignore[dict-item]
MADE = tokenizer("bytes", TEMPLATE)
TASK = TextTask(data="x", max_prompt_tokens=400)


def tokens(row: Row, template: str | None = TEMPLATE) -> TokenPair:
    made = MADE if template == TEMPLATE else tokenizer("bytes", template)
    return Tokenizer(made, TASK).pair(normalise(row))


@pytest.mark.parametrize("tools", [[TOOL], [FILLED], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_stand_in_the_prompt(tools: Any) -> None:
    found = tokens({**CHAT, "tools": tools})
    prompt = str(MADE.decode(found.prompt_ids[1:]))
    assert prompt.startswith("<|im_start|>system\n[" + json.dumps(TOOL) + "]<|im_end|>\n<|im_start|>user\nBlue?")
    assert MADE.decode(found.chosen_ids) == "Yes.<|im_end|>"
    assert found.num_responses_as_written == 0


@pytest.mark.parametrize("settings", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_settings_are_the_templates(settings: Any) -> None:
    found = tokens({**CHAT, "chat_template_kwargs": settings})
    assert str(MADE.decode(found.prompt_ids)).endswith("assistant\n<think></think>")
    assert MADE.decode(found.chosen_ids) == "Yes.<|im_end|>"
    plain = tokens({**CHAT, "chat_template_kwargs": {"enable_thinking": True}})
    assert plain.prompt_ids == tokens(CHAT).prompt_ids != found.prompt_ids


@pytest.mark.parametrize("empty", [None, "", [], {}, "[]", {"enable_thinking": None}])
def test_nothing_is_nothing(empty: Any) -> None:
    for column in ("tools", "chat_template_kwargs"):
        if column == "tools" and isinstance(empty, dict) and empty:
            continue
        pair = normalise({**CHAT, column: empty})
        assert pair == normalise(CHAT) and pair.id == normalise(CHAT).id


def test_rows_that_differ_in_their_tools_alone_are_no_repeats() -> None:
    other = {**TOOL, "function": {"name": "sea"}}
    assert len({normalise({**CHAT, "tools": tools}).id for tools in (None, [TOOL], [other])}) == 3


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("more", [{"tools": [TOOL]}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_what_a_template_does_not_use_refuses_the_row(template: str | None, more: Row) -> None:
    with pytest.raises(Unusable) as refused:
        tokens({**CHAT, **more}, template)
    assert refused.value.reason == why.LOST_COLUMN


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": "{broken"}, why.WRONG_TYPE),
        ({"tools": {"name": "sky"}}, why.WRONG_TYPE),
        ({"tools": [3]}, why.WRONG_TYPE),
        ({"tools": 3}, why.WRONG_TYPE),
        ({"chat_template_kwargs": [1]}, why.WRONG_TYPE),
        ({"chat_template_kwargs": {"enable_thinking": b"x"}}, why.WRONG_TYPE),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, why.LOST_COLUMN),
        ({"chat_template_kwargs": {"tokenize": True}}, why.LOST_COLUMN),
        ({"chat_template_kwargs": {"messages": []}}, why.LOST_COLUMN),
        ({"chat_template_kwargs": {"tools": [TOOL]}}, why.LOST_COLUMN),
    ],
)
def test_what_cannot_be_given_to_a_template_refuses_the_row(more: Row, reason: str) -> None:
    with pytest.raises(Unusable) as refused:
        tokens({**CHAT, **more})
    assert refused.value.reason == reason
