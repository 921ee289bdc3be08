"""What the documents show: every config in them is one that validates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefarena.config import parse_config

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets() -> list[Any]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
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
