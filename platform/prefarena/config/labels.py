"""Labels of nodes, as settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer


def _pairs(value: Any) -> Any:
    """A mapping as sorted pairs: settings are hashed, and a mapping cannot be."""
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


#: Label selectors by label, as Ray has them: `value`, `!value`, `in(a,b)`, `!in(a,b)`. Written as a mapping.
Labels = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs), PlainSerializer(dict, return_type=dict)]
