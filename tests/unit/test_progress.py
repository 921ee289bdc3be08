"""What the terminal says while a stage is silent."""

from __future__ import annotations

import json
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipelines import progress
from pipelines.progress import Rate, Waiting, stage_line, waited_for, watch
from prefarena.stages import write_manifest
from prefarena.training.jobs import Job


def plain() -> tuple[Console, StringIO]:
    """A console that writes to a file, and the file."""
    text = StringIO()
    return Console(file=text, width=200), text


def job(folder: Path, name: str) -> Job:
    (folder / name).mkdir(parents=True)
    return Job(str(folder / name), name, policy="policy", seed=0)


def log(job: Job, step: int) -> None:
    with (Path(job.stage_dir) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "num_steps": 9}) + "\n")


def test_a_wait_says_soon_and_then_every_so_often_what_it_is_for() -> None:
    console, text = plain()
    with Waiting(console, "the first thing", patience_s=0.05, every_s=0.3) as waiting:
        time.sleep(0.2)
        assert text.getvalue().splitlines() == ["  waiting for the first thing: 0 s"]
        waiting.what = "the [second]"
        time.sleep(0.3)
        assert text.getvalue().splitlines()[1:] == ["  waiting for the [second]: 0 s"]
    said = text.getvalue()
    time.sleep(0.4)
    assert text.getvalue() == said


@pytest.mark.parametrize("waiting_for", ["rows", None])
def test_a_short_stage_has_two_lines_and_one_that_fails_has_one(waiting_for: str | None) -> None:
    console, text = plain()
    with stage_line(console, "data", waiting_for):
        pass
    assert [line.split("  ")[0] for line in text.getvalue().splitlines()] == ["data …", "✓ data"]
    console, text = plain()
    with pytest.raises(ZeroDivisionError), stage_line(console, "data", waiting_for):
        1 / 0  # noqa: B018
    assert text.getvalue().splitlines() == ["data …"]


def test_silent_trainings_are_waited_for_by_what_they_have_done(tmp_path: Path) -> None:
    one, two = job(tmp_path, "dpo"), job(tmp_path, "ipo")
    assert waited_for([one, two]) == "waiting for training workers to be placed, to start and to load the model"
    (tmp_path / "dpo" / "attempt.json").write_text("{}")
    assert waited_for([one, two]) == "waiting for the first row of metrics of dpo"
    log(one, 3)
    assert waited_for([one, two]) == "waiting for what follows step 3/9 of dpo"
    write_manifest(tmp_path / "dpo", {})
    assert waited_for([one, two]) == "waiting for training workers to be placed, to start and to load the model"


def test_the_rate_of_an_attempt_does_not_look_back_at_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the earlier attempt are there until the new one writes its first."""
    seconds = iter([0.0, 0.0, 20.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(seconds))
    rates, one = Rate(), job(tmp_path, "one")
    found = [rates.of(one, {"step": step}) for step in (6.0, 1.0, 3.0)]
    assert found == [0, 0, 0.2]


def test_a_log_has_a_line_for_each_interval_even_when_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(progress, "_PLAIN_INTERVAL_S", 0.1)
    console, text = plain()
    one = job(tmp_path, "dpo")
    with watch(console, [one]):
        time.sleep(0.8)
        log(one, 1)
        time.sleep(1.2)
    lines = text.getvalue().splitlines()
    assert lines[0] == "  waiting for training workers to be placed, to start and to load the model"
    assert sum("dpo: step 1/9" in line for line in lines) == 1
