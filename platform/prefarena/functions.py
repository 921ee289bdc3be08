"""Python functions of the user's, by name: found, tried for how they can be called, and their source hashed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefarena.errors import UserError

#: How a configuration names one: `module:function`.
NAME = r"^[\w.]+:[\w.]+$"


def load_function(name: str, what: str, arguments: Sequence[str], settings: Mapping[str, Any] | None = None) -> Any:
    """`module:function`, looked for where Python looks and in the working directory.

    what: the function's part, for messages. arguments: what it will be called with, in words; settings: by name.
    Raises UserError where it is not there or cannot be called so.
    """
    module_name, _, attribute = name.partition(":")
    _search_working_directory()
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module: whatever it raises, it cannot be used
        absent = isinstance(error, ModuleNotFoundError) and error.name == module_name
        hint = "; `prefarena submit --include` ships a file or folder with a job" if absent else ""
        raise UserError(f"{what} {name}: {module_name} cannot be imported ({error!r}){hint}") from None
    function = owner = module
    for part in attribute.split("."):
        owner = function
        try:
            function = getattr(owner, part)
        except AttributeError:
            raise UserError(f"{what} {name}: module {module_name} has no {attribute}") from None
    reason = _not_callable(function, owner, part, len(arguments), settings or {})
    if reason is not None:
        number = "one argument" if len(arguments) == 1 else f"{len(arguments)} arguments"
        raise UserError(f"{what} {name}: {reason}; it must be a function of {number}, {', '.join(arguments)}")
    return function


def _not_callable(
    function: object, owner: object, attribute: str, num_arguments: int, settings: Mapping[str, Any]
) -> str | None:
    """Say why an object cannot be called like this; None if it can, as far as can be seen."""
    if inspect.isclass(function):
        return "it is a class"
    if not callable(function):
        return f"it is a {type(function).__name__}, not a function"
    if inspect.isclass(owner) and inspect.isfunction(inspect.getattr_static(owner, attribute)):
        return f"it is a method, which needs an instance of {owner.__name__}"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return "it is a coroutine or a generator, which returns no result"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # some built-in functions do not tell
    try:
        signature.bind(*[None] * num_arguments, **settings)
    except TypeError as error:
        number = "one argument" if num_arguments == 1 else f"{num_arguments} arguments"
        given = f" and the settings {', '.join(settings)}" if settings else ""
        return f"it cannot be called with {number}{given}: its arguments are {signature} ({error})"
    return None


def source_digest(name: str) -> str | None:
    """Hash of the file that holds the function, so that an edited function makes new stages; None: no such file."""
    _search_working_directory()
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    path = Path(found.origin) if found is not None and found.origin else None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None and path.is_file() else None


def own_traceback(error: Exception) -> str:
    """Format what a user's function raised as Python shows it, without the frame that called it."""
    below = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, below)).rstrip()


def _search_working_directory() -> None:
    """Search the working directory, as Ray's workers do; an installed command does not by default."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
