"""How methods are found: every file of a package is one, named by its `kind`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from prefarena.settings.section import Section


def found_in(paths: Iterable[str], package: str, base: Any, wanted: str) -> dict[str, Any]:
    """The methods of a package by their kinds, sorted by them; packages within it are passed over.

    base: the class that all are made of. wanted: what a file must hold, for the TypeError that is raised where one
    holds none, or not one.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(paths) if not module.ispkg)
    return {name: _method(name, importlib.import_module(f"{package}.{name}"), base, wanted) for name in names}


def _method(name: str, module: ModuleType, base: type[Section], wanted: str) -> type[Section]:
    """The method that a file holds."""
    found = [kind for kind in vars(module).values() if _is_method(kind, base) and kind.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__file__}: {wanted}")
    method: type[Section] = found[0]
    field = method.model_fields.get("kind")
    if field is None or field.default != name:
        raise TypeError(f"{module.__file__}: {method.__name__} needs `kind: Literal[{name!r}] = {name!r}`")
    if not method.__doc__:
        raise TypeError(f"{module.__file__}: {method.__name__} needs a docstring whose first line names its paper")
    return method


def _is_method(kind: object, base: type[Section]) -> bool:
    return isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)
