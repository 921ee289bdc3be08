"""Labels of nodes, as settings, and what selects them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_LIST = re.compile(r"in\((.*)\)")


def _pairs(value: Any) -> Any:
    """A mapping as sorted pairs: settings are hashed, and a mapping cannot be."""
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


#: Label selectors by label, as Ray has them: `value`, `!value`, `in(a,b)`, `!in(a,b)`. Written as a mapping.
Labels = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs), PlainSerializer(dict, return_type=dict)]


def selected(selector: str) -> tuple[set[str], bool]:
    """The values that a selector names, and whether it takes them (True) or all others."""
    named = selector.removeprefix("!")
    listed = _LIST.fullmatch(named)
    values = [value.strip() for value in listed.group(1).split(",")] if listed else [named]
    return set(values), not selector.startswith("!")


def kept_apart(some: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]) -> bool:
    """Whether no node, whatever its labels, meets the label selectors of both."""
    for label, selector in some:
        values, takes = selected(selector)
        for other in (other for other_label, other in others if other_label == label):
            other_values, other_takes = selected(other)
            if takes and other_takes:
                common = values & other_values
            elif takes or other_takes:
                common = values - other_values if takes else other_values - values
            else:  # each takes whatever the other one does not name
                continue
            if not common:
                return True
    return False
