"""Two comparisons at once in one storage, one of them with methods that fail."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_end_to_end import LANGUAGE, QUICK
from waiting import wait_until

from pipelines.compare import compare
from prefarena.config import Comparison, parse_config
from prefarena.errors import UserError
from prefarena.report.results import Results, load_results

SFT = {"name": "sft", "method": {"kind": "sft", "training": QUICK}}
WILD = {**QUICK, "learning_rate": 1e30, "warmup_steps": 0, "max_bad_steps": 3}
#: A step of a size that leaves no number, and a reward model that never comes to be.
FAILING = [
    {"name": "wild", "method": {"kind": "dpo", "training": WILD}},
    {"name": "rlhf", "method": {"kind": "rlhf", "reward": {"kind": "learned", "training": WILD}}},
    {"name": "best", "method": {"kind": "best_of_n", "reward": {"kind": "learned", "training": WILD}}},
]


def config(folder: Path, name: str, entries: list[dict[str, Any]]) -> Comparison:
    return parse_config({**LANGUAGE, "name": name, "entries": entries, "output": str(folder / "runs")})


Both = tuple[Comparison, list[Results], list[str], str]


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def both(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, list[Results], list[str], str]:
    """The failing comparison's config; results and terminal of both; what a second start said meanwhile."""
    folder = tmp_path_factory.mktemp("both")
    configs = [config(folder, "plain", [SFT]), config(folder, "failing", [SFT, *FAILING])]
    consoles = [Console(record=True, width=170, file=(folder / f"{i}.txt").open("w")) for i in range(2)]
    refused = ""
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(compare, *pair) for pair in zip(configs, consoles, strict=True)]
        wait_until(lambda: any((folder / "runs" / "leases").glob("failing-*")), "the comparison to begin")
        try:
            compare(configs[1], consoles[0])
        except UserError as error:
            refused = str(error)
        folders = [one.result(timeout=500) for one in running]
    return configs[1], [load_results(one) for one in folders], [one.export_text() for one in consoles], refused


def test_shared_stages_are_done_once_and_neither_is_disturbed(both: Both) -> None:
    _, (plain, failing), texts, refused = both
    for line in ("data (language) …", "training reference …", "pairs (language) …", "logps (language) …"):
        assert sum(text.count(line) for text in texts) == 1, line
    assert sum("sft" in line for text in texts for line in text.splitlines() if line.startswith("training")) == 1
    assert plain.entry("sft").seeds == failing.entry("sft").seeds
    assert "comparison 'failing' is already running: process" in refused


def test_a_failed_method_is_marked_and_the_others_go_on(both: Both) -> None:
    settings, (_, results), texts, _ = both
    (report,) = Path(settings.output).glob("failing-*/report.md")
    reasons = {entry.name: entry.failures for entry in results.entries if entry.failures}
    assert set(reasons) == {"wild", "rlhf", "best"}
    assert "not finite in" in reasons["wild"]["0"] and "its reward model failed" in reasons["rlhf"]["0"]
    assert all(not results.entry(name).seeds for name in reasons)
    text = report.read_text(encoding="utf-8")
    assert "| wild (failed) | – |" in text and "**wild failed** with seed 0: the loss or the gradient" in text
    assert results.win_matrix is not None and results.win_matrix.rows == ["reference", "sft"]
    assert results.entries[-1].name == "optimum at sft's KL"
    assert sorted(path.name for path in (report.parent / "checkpoints").iterdir()) == ["reference", "sft-s0"]
    assert "✗ wild-s0 failed" in texts[1]


def test_a_second_run_leaves_a_failed_method_alone_and_says_so(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = both[0]
    monkeypatch.setattr("pipelines.compare.checked_session", None)  # nothing is to do, so Ray is not asked for
    console = Console(record=True, width=1000, file=(Path(settings.output) / "again.txt").open("w"))
    compare(settings, console)
    text = console.export_text()
    assert "dpo (wild-s0) failed in an earlier run and is left as it is: the loss or the gradient" in text
    assert "--retry-failed tries again" in text and "delete /" in text
    (failure,) = Path(settings.output).glob("stages/dpo-wild-*/failure.json")
    assert json.loads(failure.read_text())["status"] == "failed"
