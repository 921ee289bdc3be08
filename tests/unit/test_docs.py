"""What the documents show: configs that validate, links that lead somewhere, commands that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import build_parser
from prefarena.config import load_config, parse_config
from prefarena.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def snippets() -> list[Any]:
    found = []
    for page in PAGES:
        for place, block in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8"))):
            found.append(pytest.param(block, id=f"{page.name}-{place}"))
    return found


def whole(tree: dict[str, Any]) -> dict[str, Any]:
    """A config of a part of one: `reward` belongs to a method, all else stands at the top."""
    if "reward" in tree:
        return {"entries": [{"name": "rlhf", "method": {"kind": "rlhf", **tree}}]}
    return {"entries": [{"name": "dpo", "method": {"kind": "dpo"}}], **tree}


@pytest.mark.parametrize("block", snippets())
def test_every_config_in_the_documents_validates(block: str) -> None:
    config = parse_config(whole(yaml.safe_load(block)))
    assert config.entries


# ------------------------------------------------------------------------------------------------ links


def anchor(heading: str) -> str:
    """What a heading is called in a link, as GitHub has it."""
    text = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).splitlines()
    return {anchor(line.lstrip("#")) for line in lines if re.match(r"#+ ", line)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    dead = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert not dead


def test_a_dead_link_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Of `this` & that\n[a](#of-this--that) [b](other.md) [c](#nowhere)\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"other\.md.*nowhere"):
        test_every_link_leads_to_a_file_and_a_heading_that_are_there(page)


# --------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[str]:
    """The command lines of indented blocks, without comments, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
        for part in re.split(r";|&&", line.split(" #")[0]):
            if re.match(r"(\.venv/bin/)?(prefarena|python) |make [a-z]", part.strip()) and "[--" not in part:
                yield part.strip()


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's config, whose entries its commands name."""
    path = tmp_path_factory.mktemp("config") / "mine.yaml"
    [block] = _BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[:1]
    path.write_text(block, encoding="utf-8")
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_parses(page: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        try:
            check(command, mine)
        except SystemExit:
            pytest.fail(f"{page.name}: `{command}` does not parse: {capsys.readouterr().err}")


def check(command: str, mine: Path) -> None:
    """Raise what is wrong with a command."""
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[0] in targets, f"there is no `make {words[0]}`"
    elif program.endswith("prefarena"):
        parsed = build_parser().parse_args(words)
        if overrides := getattr(parsed, "set", None):
            given = ROOT / parsed.config if parsed.config else None
            load_config(str(given) if given and given.exists() else str(mine), overrides)
    elif words[0] != "-m":
        script = ROOT / words[0]
        assert script.is_file(), f"there is no {words[0]}"
        for option in (word for word in words[1:] if word.startswith("--")):
            assert f'"{option}"' in script.read_text(encoding="utf-8"), f"{words[0]} has no option {option}"


@pytest.mark.parametrize(
    "command",
    [
        "prefarena compere",
        "prefarena compare mine.yaml --sett a=1",
        "prefarena compare mine.yaml --set entries.dpo.method.betta=1",
        "python benchmarks/ppo_step.py --nothing",
        "make nothing",
    ],
)
def test_a_command_that_does_not_parse_would_be_seen(command: str, mine: Path) -> None:
    with pytest.raises((SystemExit, AssertionError, UserError)):
        check(command, mine)
