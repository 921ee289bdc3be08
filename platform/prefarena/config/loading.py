"""YAML and `--set` overrides in, a validated comparison out, or one sentence per problem."""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from prefarena.config.comparison import Comparison
from prefarena.errors import UserError

DEFAULT_CONFIG = Path(__file__).parents[1] / "default.yaml"


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Comparison:
    """Read a comparison from YAML; `overrides` are `key.path=value` with YAML values.

    Entries can be addressed by name: `entries.dpo.method.beta=0.3`. Raises UserError with one sentence per
    problem, naming the key, and for an unknown key the nearest known one.
    """
    source = Path(path) if path is not None else DEFAULT_CONFIG
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{source}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a config is a mapping of keys, this is {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, str(source))


def parse_config(tree: dict[str, Any], source: str = "config") -> Comparison:
    """Validate a mapping. Raises UserError as `load_config` does."""
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        # pydantic leaves invalid items out, and then calls the list too short.
        real = [problem for problem in problems if problem["type"] != "too_short"] or problems
        raise UserError("\n".join(_explain(problem, source) for problem in real)) from None


def dump_config(config: Comparison) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override!r}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override!r}: {'.'.join(parents)} is a value, not a group of settings")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if not isinstance(node, dict):
        raise UserError(f"--set {override!r}: {part} lies under a value, not under a group of settings")
    return node.setdefault(part, {})


def _index(items: list[Any], part: str, override: str) -> int:
    for i, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == part:
            return i
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name")) for item in items if isinstance(item, dict)]
    raise UserError(f"--set {override!r}: no entry {part!r}; there are {', '.join(names) or len(items)}")


def _explain(problem: Any, source: str) -> str:
    """One sentence for one pydantic error."""
    location = [part for part in problem["loc"] if part not in _UNION_TAGS]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
        return f"{source}: unknown key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"{source}: key {key!r} is required"
    if problem["type"] == "union_tag_not_found":
        return f"{source}: {key} needs a `kind` that says which it is"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{source}: {key or 'config'}: {message[:1].lower()}{message[1:]}{shown}"


#: The `kind`s of all unions, which pydantic puts into the location of an error.
_UNION_TAGS = {"language", "text", "scratch", "pretrained", "mpo", "dpo", "ipo", "sft", "rlhf", "grpo", "rloo"} | {
    "best_of_n",
    "learned",
    "gold",
    "function",
    "endpoint",
    "classifier",
}


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at `location`, which is a pydantic error location with union tags."""
    kind: Any = Comparison
    for part in location:
        if isinstance(part, int):
            kind = next(arg for arg in get_args(kind) if arg is not Ellipsis)
        elif part in _UNION_TAGS and not (isinstance(kind, type) and part in getattr(kind, "model_fields", {})):
            kind = next(arm for arm in _arms(kind) if arm.model_fields["kind"].default == part)
        else:
            kind = kind.model_fields[part].annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _arms(kind: Any) -> list[type[BaseModel]]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return list(get_args(kind))
    return [kind]
