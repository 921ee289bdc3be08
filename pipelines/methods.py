"""What `prefarena methods` prints: every method and its settings, from the types that check them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from prefarena.config import OffPolicy
from prefarena.config.comparison import METHODS


def list_methods() -> str:
    """Name, first line of the description, and settings of each; what all off-policy ones share stands at the end."""
    return "\n".join([line for method in METHODS for line in (*_lines(method), "")] + list(_shared()))


def _lines(method: type[BaseModel]) -> Iterator[str]:
    yield f"{method.model_fields['kind'].default}: {(method.__doc__ or '').strip().splitlines()[0]}"
    if issubclass(method, OffPolicy):
        reference = "with" if method().needs_reference else "without"
        yield f"    (learns from {method.learns_from}, {reference} the reference's log-probs)"
        yield from (_line(*setting) for setting in _settings(method) if not _is_shared(setting))
    else:
        yield from (_line(*setting) for setting in _settings(method))


def _shared() -> Iterator[str]:
    yield "all off-policy methods (those that say what they learn from) also have:"
    yield from (_line(*setting) for setting in _settings(OffPolicy))


def _is_shared(setting: tuple[str, Any, str]) -> bool:
    return any(setting[:2] == shared[:2] for shared in _settings(OffPolicy))


def _line(name: str, default: Any, text: str) -> str:
    return f"    {name} = {default}" + (f"    # {text}" if text else "")


def _settings(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, default, description) of every setting of a config type."""
    found: list[tuple[str, Any, str]] = []
    for name, field in kind.model_fields.items():
        if name == "kind":
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            values = default.model_dump()
            inner = _settings(type(default), f"{prefix}{name}.")
            found += [(key, _at(values, key.removeprefix(f"{prefix}{name}.")), text) for key, _, text in inner]
        else:
            found.append((prefix + name, default, field.description or ""))
    return found


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
