"""`prefarena methods`: prints every method and its settings, from the types that check them.

`--table` prints tables in Markdown, which docs/methods.md holds: the off-policy ones, and the on-policy ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from prefarena.config import OffPolicy, OnPolicy, OnPolicyTraining
from prefarena.config.comparison import METHODS
from prefarena.methods import discover, on_policy
from prefarena.settings.off_policy import Pairwise
from prefarena.settings.on_policy import CriticTraining


def list_methods() -> str:
    """Print each method's name, first line of its description, and settings; shared settings come at the end."""
    own = [line for method in METHODS for line in (*_lines(method), "")]
    return "\n".join([*own, *_shared(), "", *_shared_on_policy()])


def table() -> str:
    """The off-policy methods as a table in Markdown; docs/methods.md explains the notation of its formulas."""
    lines = [
        "| `kind` | what it is | loss | needs the reference | its own settings |",
        "|---|---|---|---|---|",
    ]
    for kind, method in discover().items():
        formula = f"$`{method.formula}`$" if method.formula else "yours"
        settings = ", ".join(f"`{name}` {default}" for name, default, _ in _own_settings(method))
        needs = "yes" if _with_defaults(method).needs_reference else "no"
        cells = [f"`{kind}`", _what(method), formula, needs, settings or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def on_policy_table() -> str:
    """The on-policy methods as a table in Markdown."""
    lines = ["| `kind` | what it is | advantage | critic | its own settings, in `training` |", "|---|---|---|---|---|"]
    for kind, method in on_policy.discover().items():
        own = (f"`{name.removeprefix('training.')}` {default}" for name, default, _ in _own_on_policy(method))
        cells = [f"`{kind}`", _what(method), f"$`{method.formula}`$", _critic(method), ", ".join(own) or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _what(method: type[BaseModel]) -> str:
    """The first line of a method's description."""
    return (method.__doc__ or "").strip().splitlines()[0]


def _reads(method: type[OffPolicy]) -> str:
    """The inputs that the loss depends on, with the defaults."""
    needed = _with_defaults(method).needs_reference
    return f"{method.learns_from}, {'with' if needed else 'without'} the reference's log-probs"


def _with_defaults(method: type[OffPolicy]) -> OffPolicy:
    """Make a method with its defaults, even if one of its settings has none."""
    return method.model_construct()


def _critic(method: type[OnPolicy]) -> str:
    return "yes" if isinstance(method.model_fields["training"].default, CriticTraining) else "no"


def _own_on_policy(method: type[OnPolicy]) -> list[tuple[str, Any, str]]:
    """The settings that not every on-policy method has, or not with this default."""
    shared = [setting[:2] for setting in _all_on_policy()]
    return [setting for setting in _settings(method) if setting[:2] not in shared]


def _all_on_policy() -> list[tuple[str, Any, str]]:
    return _settings(OnPolicy) + _settings(OnPolicyTraining, "training.")


def _own_settings(method: type[OffPolicy]) -> list[tuple[str, Any, str]]:
    """The settings that not every off-policy method has, or not with this default."""
    shared = [setting[:2] for setting in _settings(Pairwise)]
    return [setting for setting in _settings(method) if setting[:2] not in shared]


def _lines(method: type[BaseModel]) -> Iterator[str]:
    yield f"{method.model_fields['kind'].default}: {_what(method)}"
    if issubclass(method, OffPolicy):
        yield f"    (learns from {_reads(method)})"
        yield from (_line(*setting) for setting in _own_settings(method))
    elif issubclass(method, OnPolicy):
        yield f"    (learns from its own responses by a reward{', and a critic' if _critic(method) == 'yes' else ''})"
        yield from (_line(*setting) for setting in _own_on_policy(method))
    else:
        yield from (_line(*setting) for setting in _settings(method))


def _shared() -> Iterator[str]:
    shared = _settings(OffPolicy)
    yield "all off-policy methods (those that say what they learn from) also have:"
    yield from (_line(*setting) for setting in shared)
    yield "and of them those that learn from labelled pairs, not from their ranks, or from chosen responses:"
    yield from (_line(*setting) for setting in _settings(Pairwise) if setting not in shared)


def _shared_on_policy() -> Iterator[str]:
    yield "all on-policy methods (those that learn from their own responses) also have:"
    yield from (_line(*setting) for setting in _all_on_policy())


def _line(name: str, default: Any, text: str) -> str:
    return f"    {name} = {default}" + (f"    # {text}" if text else "")


def _settings(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, default, description) of every setting of a config type."""
    found: list[tuple[str, Any, str]] = []
    for name, field in kind.model_fields.items():
        if name == "kind":
            continue
        default = "(required)" if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            inner = _settings(type(default), f"{prefix}{name}.")
            found += [(key, _at(default, key.removeprefix(f"{prefix}{name}.")), text) for key, _, text in inner]
        else:
            found.append((prefix + name, default, field.description or ""))
    return found


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings
