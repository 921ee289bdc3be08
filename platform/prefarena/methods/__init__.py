"""The off-policy methods, one file each: settings with defaults, formula, and what it needs of the reference.

Nothing lists them. Every file of this package is one, so that a new one is in configurations, their hints and
`prefarena methods` as soon as it is there.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

from prefarena.settings.off_policy import OffPolicy


def discover() -> dict[str, type[OffPolicy]]:
    """Every method by its kind, sorted by it. Raises TypeError where a file of the package holds none, or not one."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: _method(name, importlib.import_module(f"{__name__}.{name}")) for name in names}


def _method(name: str, module: ModuleType) -> type[OffPolicy]:
    """The method that a file holds."""
    found = [kind for kind in vars(module).values() if _is_method(kind) and kind.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__file__}: one class that is an OffPolicy and has a loss is wanted")
    method: type[OffPolicy] = found[0]
    field = method.model_fields.get("kind")
    if field is None or field.default != name:
        raise TypeError(f"{module.__file__}: {method.__name__} needs `kind: Literal[{name!r}] = {name!r}`")
    if not method.__doc__:
        raise TypeError(f"{module.__file__}: {method.__name__} needs a docstring whose first line names its paper")
    return method


def _is_method(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, OffPolicy) and not inspect.isabstract(kind)
