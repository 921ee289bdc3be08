"""The architecture, as imports show it."""

from __future__ import annotations

import ast
import platform
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "prefarena"
BOTTOM = {
    "records", "config", "settings", "errors", "failures", "functions", "stages", "stage_files", "stores", "mirror",
}  # fmt: skip
#: What each part may import of the package, beside itself and the bottom.
ALLOWED: dict[str, set[str]] = {
    "config": {"methods"},
    "modeling": {"objectives"},
    "data": {"modeling", "objectives"},
    "tasks": {"data", "modeling", "objectives"},
    "judges": {"tasks", "data", "modeling", "objectives"},
    "generation": {"tasks", "data", "modeling", "objectives"},
    "evaluation": {"judges", "tasks", "data", "modeling", "objectives"},
    "training": {"generation", "judges", "tasks", "data", "modeling", "objectives"},
    "trackers": set(),
    "report": {"tasks", "data", "modeling", "objectives"},
    "cluster": {"training", "judges", "tasks", "data", "modeling", "objectives"},
    "tuning": set(),
    "estimate": {"cluster", "training", "evaluation", "judges", "tasks", "data", "modeling", "objectives"},
}
#: What `config` is made of, and may therefore not import it.
BELOW_CONFIG = {
    "objectives": {"objectives"},
    "settings": {"settings", "objectives", "functions"},
    "methods": {"methods", "settings", "objectives", "errors", "functions"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert found <= set(project["tool"]["setuptools"]["packages"])


def test_the_source_root_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.python_version()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    names = imported(path)
    part = path.relative_to(PACKAGE).parts[0]
    inside = {name.split(".")[1] for name in names if name.startswith("prefarena.")}
    if part in BELOW_CONFIG:
        assert inside <= BELOW_CONFIG[part]
    elif part in ALLOWED:
        assert inside - {part} - BOTTOM <= ALLOWED[part]
    else:
        assert inside - ({"report"} if path == PACKAGE / "__init__.py" else set()) <= BOTTOM
    is_front_door = path == PACKAGE / "__init__.py"  # which offers the pipelines' `compare` to users
    assert not any(name.split(".")[0] == "pipelines" for name in names) or is_front_door
    if part in ("objectives", "settings", "methods", "modeling", "data", "tasks", "report"):
        assert not any(name.split(".")[0] == "ray" for name in names)
    if part == "objectives":
        tops = {name.split(".")[0] for name in names}
        assert tops <= {"torch", "prefarena", "__future__", "dataclasses", "typing", "collections", "math"}
    if any(name.split(".")[0] == "vllm" for name in names):
        assert path.parent == PACKAGE / "generation" / "engine"


def test_the_pipelines_import_each_other_one_way() -> None:
    """Imports inside functions count: a circle that they hide is a circle."""
    paths = sorted((ROOT / "pipelines").glob("*.py"))
    needs = {
        path.stem: {name.split(".")[1] for name in imported(path) if name.startswith("pipelines.")} for path in paths
    }
    order: list[str] = []
    while left := set(needs) - set(order):
        ready = sorted(name for name in left if needs[name] <= set(order))
        assert ready, f"these import each other in a circle: {', '.join(sorted(left))}"
        order += ready
    assert not any(name.split(".")[0] in ("tests", "benchmarks") for path in paths for name in imported(path))


@pytest.mark.parametrize(
    "path", [*modules(), *sorted((ROOT / "pipelines").glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_asks_the_machine_for_a_gpu(path: Path) -> None:
    """The device is the config's (`resources.use_gpu`): Ray shows a machine's GPUs to tasks that were given none."""
    asks = {"is_available", "device_count", "current_accelerator"}
    found = {
        node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }
    # Weights that go from GPU to GPU are sent by a thread, which is to be on its process's own.
    assert not found & asks or path == PACKAGE / "generation" / "transfer.py"


def test_modules_of_tests_have_names_of_their_own() -> None:
    """Tests import each other by name, wherever they are, so pytest takes two of one name for the same module."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
