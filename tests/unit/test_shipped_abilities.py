"""The tasks for lm-eval that the repository has: items are what the script writes, and have one right choice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from prefarena.config import Abilities
from prefarena.evaluation.ability_tasks import load_tasks

DATA = Path(__file__).parents[2] / "pipelines" / "data"


def written(name: str) -> str:
    command = [sys.executable, str(DATA / "ability_items.py"), name]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(("name", "number", "num_choices"), [("knowledge", 128, 4), ("sentences", 32, 2)])
def test_the_shipped_items_are_what_the_script_writes(name: str, number: int, num_choices: int) -> None:
    text = written(name)
    assert text == (DATA / "abilities" / f"{name}.jsonl").read_text(encoding="utf-8")
    items = [json.loads(line) for line in text.splitlines()]
    assert len(items) == number
    assert all(len(set(item["choices"])) == len(item["choices"]) == num_choices for item in items)
    # The place of the right choice says nothing: always taking the same one is right about as often as chance.
    most_common = Counter(item["label"] for item in items).most_common(1)[0][1]
    assert most_common < 1.4 * number / num_choices


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra `abilities`")
def test_lm_eval_reads_the_shipped_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA.parents[1])
    tasks = load_tasks(Abilities(tasks=("knowledge", "sentences"), folder=str(DATA / "abilities")))["tasks"]
    assert {name: len(list(task.test_docs())) for name, task in tasks.items()} == {"knowledge": 128, "sentences": 32}
