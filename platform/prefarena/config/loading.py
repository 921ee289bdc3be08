"""YAML and `--set` overrides in, a validated comparison out, or one sentence per problem."""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from prefarena.config.comparison import Comparison
from prefarena.config.problems import explain
from prefarena.errors import UserError

DEFAULT_CONFIG = Path(__file__).parents[1] / "default.yaml"


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Comparison:
    """Read a comparison from YAML; `overrides` are `key.path=value` with YAML values.

    Entries can be addressed by name: `entries.dpo.method.beta=0.3`. Raises UserError with one sentence per
    problem, naming the key, and for an unknown key the nearest known one.
    """
    source = Path(path) if path is not None else DEFAULT_CONFIG
    try:
        tree = _parse(source.read_text(encoding="utf-8"), str(source))
    except FileNotFoundError:
        raise UserError(f"{source}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a config must be a mapping of keys, but this is {type(tree).__name__}")
    return parse_config(tree, str(source), overrides or [])


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice in a mapping: YAML would silently keep the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise UserError(
                        f"{self.name}: key {key.value!r} is written twice, on lines {seen[key.value]} and {line}; "
                        "remove one"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def _parse(text: str, source: str) -> Any:
    """What YAML says. Raises yaml.YAMLError, and UserError for a key that is written twice."""
    loader = _Loader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_config(tree: dict[str, Any], source: str = "config", overrides: Sequence[str] = ()) -> Comparison:
    """Validate a mapping with its overrides, and leave it as it is. Raises UserError as `load_config` does."""
    if overrides:
        tree = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        # pydantic leaves invalid items out, and then calls the list too short.
        real = [problem for problem in problems if problem["type"] != "too_short"] or problems
        raise UserError("\n".join(explain(problem, source) for problem in real)) from None


def dump_config(config: Comparison, without: Collection[str] = ()) -> str:
    """The resolved configuration as YAML, every default written out, `without` some keys of its top."""
    tree = config.model_dump(mode="json", exclude=set(without))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


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
