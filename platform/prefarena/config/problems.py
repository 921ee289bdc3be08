"""One sentence for each thing that pydantic finds wrong with a configuration."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from prefarena.config.comparison import Comparison
from prefarena.config.hints import key_meant, value_meant
from prefarena.settings import section


def explain(problem: Any, source: str) -> str:
    """One sentence for one pydantic error of `Comparison`, naming the file, the key and, if any, a hint."""
    key = ".".join(str(part) for part in problem["loc"] if part not in _KINDS)
    given = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            near = key_meant(str(problem["loc"][-1]), known) or _one_below(str(problem["loc"][-1]), problem["loc"][:-1])
            hint = f"; did you mean {near!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            return f"{source}: unknown key {key!r}{hint}"
        case "missing":
            return f"{source}: key {key!r} is required"
        case "union_tag_not_found":
            return f"{source}: {key} needs a `kind` that says which it is"
        case "union_tag_invalid":
            kinds = [tag.strip().strip("'") for tag in problem["ctx"]["expected_tags"].split(",")]
            return f"{source}: {key}.kind: {_one_of(problem['ctx']['tag'], kinds)}"
        case section.TRUTH_VALUE:
            field = ".".join([*([key] if key else []), problem["ctx"]["field"]])
            return f"{source}: {field}: a number is wanted; YAML reads yes, no, on, off, true and false as booleans"
        case "literal_error":
            return f"{source}: {key}: {_one_of(given, _literals(problem['loc']))}"
    return f"{source}: {key or 'config'}: {_plain(problem, given)}"


def _plain(problem: Any, given: Any) -> str:
    """pydantic's own sentence, with what to write instead where a kind of value was mistaken for another."""
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    if problem["type"] == "string_type" and isinstance(given, (int, float, bool)):
        was = "a truth value" if isinstance(given, bool) else "a number"
        return f"text is wanted, but YAML reads what is written here as {was}; put it in quotes{shown}"
    if problem["type"] == "tuple_type":
        return f"a list is wanted; write [{given}]" if shown else message
    if problem["type"] == "int_parsing" and _is_whole(given):
        return f"a whole number is wanted; write {int(float(given))}{shown}"
    return message + shown


def _is_whole(given: Any) -> bool:
    try:
        return float(given).is_integer()
    except (TypeError, ValueError):
        return False


def _one_of(given: Any, possible: list[str]) -> str:
    near = value_meant(str(given), possible)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"{given!r} is not one of {', '.join(possible)}{hint}"


# ------------------------------------------------------------------------------- what is known at a place


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at `location`, which is a pydantic error location with union tags."""
    group = _section(_annotation(location))
    return list(group.model_fields) if group else []


def _one_below(written: str, location: tuple[Any, ...]) -> str | None:
    """The intended key, if it belongs to a group of settings at the same level: `training.learning_rate`."""
    for name in _known_keys(location):
        below = _known_keys((*location, name))
        near = written if written in below else key_meant(written, below)
        if near is not None:
            return f"{name}.{near}"
    return None


def _literals(location: tuple[Any, ...]) -> list[str]:
    return [str(value) for arm in _arms(_annotation(location)) if get_origin(arm) is Literal for value in get_args(arm)]


def _annotation(location: tuple[Any, ...]) -> Any:
    """The type expected at a place."""
    kind: Any = Comparison
    for part in location:
        group = _section(kind)
        if isinstance(part, int):
            kind = next(arm for arm in get_args(kind) if arm is not Ellipsis)
        elif part in _KINDS and (group is None or part not in group.model_fields):
            kind = next(arm for arm in _arms(kind) if _kind(arm) == part)
        elif group is not None:
            kind = group.model_fields[part].annotation
    return kind


def _section(kind: Any) -> type[BaseModel] | None:
    """The one group of settings that a type stands for; None where it is no group, or one of several."""
    groups = [arm for arm in _arms(kind) if isinstance(arm, type) and issubclass(arm, BaseModel)]
    return groups[0] if len(groups) == 1 else None


def _arms(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


def _kind(arm: Any) -> str | None:
    return arm.model_fields["kind"].default if hasattr(arm, "model_fields") and "kind" in arm.model_fields else None


def _kinds(group: type[BaseModel]) -> Iterator[str]:
    """Every `kind` that a group of settings or one inside it may have."""
    if kind := _kind(group):
        yield kind
    for field in group.model_fields.values():
        for arm in _inside(field.annotation):
            yield from _kinds(arm)


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for arm in get_args(annotation):
        yield from _inside(arm)


#: pydantic puts the `kind` of a union's arm into the location of an error.
_KINDS = frozenset(_kinds(Comparison))
