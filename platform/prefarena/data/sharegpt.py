"""Messages as ShareGPT writes them, `from` and `value`, brought to `role` and `content`."""

from __future__ import annotations

from typing import Any

from prefarena.data.rejections import TOOL_CALLS, Unusable

Row = dict[str, Any]

#: The column with the conversation before `chosen` and `rejected`.
CONVERSATION = "conversations"
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_COLUMNS = ("prompt", "chosen", "rejected")


def has_conversation(row: Row) -> bool:
    """Whether the row's prompt is the conversation in a separate column: it has no other, and two single answers."""
    if row.get("prompt") is not None or not isinstance(row.get(CONVERSATION), list) or not row[CONVERSATION]:
        return False
    answers = [row.get(name) for name in ("chosen", "rejected")]
    return all(isinstance(answer, (str, dict)) or (isinstance(answer, list) and len(answer) == 1) for answer in answers)


def with_roles(row: Row) -> Row:
    """The row with its messages as `role` and `content`; a single message is a list of one, and the conversation before
    two answers is their prompt. Raises Unusable at a call of a tool.
    """
    if has_conversation(row):
        row = {**row, "prompt": row[CONVERSATION]}
    found = {name: _listed(row[name]) for name in _COLUMNS if _is_messages(row.get(name))}
    return {**row, **{name: [_with_role(message, name) for message in value] for name, value in found.items()}}


def _is_messages(value: Any) -> bool:
    if isinstance(value, dict):
        return {"from", "value"} <= value.keys() or {"role", "content"} <= value.keys()
    return isinstance(value, list)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _with_role(message: Any, column: str) -> Any:
    """The message with a role and content; anything that is not a ShareGPT message stays as it is."""
    if not isinstance(message, dict) or message.get("role") is not None or not isinstance(message.get("from"), str):
        return message
    if message["from"] in _CALLS:
        raise Unusable(TOOL_CALLS, column)
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    role = _ROLES.get(message["from"], message["from"])
    return {**others, "role": role, "content": message.get("value")}
