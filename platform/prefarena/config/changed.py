"""A method with other values of some of its settings, by their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prefarena.errors import UserError
from prefarena.settings.search import Value

Settings = TypeVar("Settings", bound=BaseModel)


def with_settings(method: Settings, changed: Mapping[str, Value], where: str) -> Settings:
    """The method with other values of some settings, by their dotted names.

    Raises UserError, which begins with `where`, for a name that the method has not, and for a value that it refuses.
    """
    tree = method.model_dump(mode="json")
    for name, value in changed.items():
        *parents, last = name.split(".")
        node: Any = tree
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            known = f"; there are {', '.join(sorted(node))}" if isinstance(node, dict) else ""
            raise UserError(f"{where}: the method has no setting {name!r}{known}")
        node[last] = value
    try:
        return type(method).model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "method"
        message = str(problem["msg"]).removeprefix("Value error, ")
        raise UserError(f"{where}: {place}: {message[:1].lower()}{message[1:]}") from None
