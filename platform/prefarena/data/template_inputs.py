"""Inputs of the chat template that a row holds besides messages: tools, and settings such as `enable_thinking`."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefarena.data.rejections import LOST_COLUMN, WRONG_TYPE, Unusable

TOOLS, SETTINGS = "tools", "chat_template_kwargs"
Inputs = dict[str, Any]


def written_inputs(row: dict[str, Any]) -> str:
    """The row's tools and template settings as JSON, `{"tools": [...], "enable_thinking": ...}`; empty: it has none.

    Keys without a value, with which tables fill up what other rows' tools have, are left out. Raises Unusable where a
    column is no list of tools, or no mapping.
    """
    tools, settings = _value(row.get(TOOLS), TOOLS), _value(row.get(SETTINGS), SETTINGS)
    inputs: Inputs = {}
    if settings:
        if not isinstance(settings, dict):
            raise Unusable(WRONG_TYPE, f"{SETTINGS} is {type(settings).__name__}, not a mapping")
        if reserved := sorted({TOOLS, "messages"} & settings.keys()):
            raise Unusable(LOST_COLUMN, f"{SETTINGS} holds {reserved[0]}, which the row has in a column of its own")
        inputs |= settings
    if tools:
        if not isinstance(tools, list):
            raise Unusable(WRONG_TYPE, f"{TOOLS} is {type(tools).__name__}, not a list")
        inputs[TOOLS] = [_value(tool, TOOLS) for tool in tools]
        if not all(isinstance(tool, dict) for tool in inputs[TOOLS]):
            raise Unusable(WRONG_TYPE, f"{TOOLS} holds something that is not a mapping")
    try:
        return json.dumps(inputs, ensure_ascii=False) if inputs else ""
    except TypeError as error:  # a table's cell may be bytes or a date
        raise Unusable(WRONG_TYPE, f"{TOOLS} or {SETTINGS}: {error}") from None


def read_inputs(written: str, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """The inverse of `written_inputs`. Raises Unusable where the tokenizer's chat template does not use a part."""
    inputs: Inputs = json.loads(written) if written else {}
    if not inputs:
        return inputs
    if tokenizer.chat_template is None:
        raise Unusable(LOST_COLUMN, f"{', '.join(inputs)}: the tokenizer has no chat template")
    template = str(tokenizer.get_chat_template(tools=inputs.get(TOOLS)))
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in inputs:
        if name != TOOLS and name in own:
            raise Unusable(LOST_COLUMN, f"{SETTINGS} holds {name}, which rows cannot set")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise Unusable(LOST_COLUMN, f"{name}: the chat template does not use it")
    return inputs


def _value(value: Any, column: str) -> Any:
    """Read a column's value, also where it is stored as text, without keys that have no value."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(WRONG_TYPE, f"{column} holds text that is not JSON: {value[:60]}") from None
    return _filled(value)


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(inner) for name, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value
