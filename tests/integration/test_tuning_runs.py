"""A tuning in miniature, by the command: trials, the comparison of the winners, and a kill in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_end_to_end import LANGUAGE, QUICK

from pipelines.cli import main
from prefarena.config import load_config
from prefarena.report.comparison import load_results
from prefarena.report.tuning_results import TuningResults, load_tuning

ROOT = Path(__file__).parents[2]
ENTRIES = [
    {"name": "dpo", "method": {"kind": "dpo", "beta": 0.5, "training": QUICK}},
    {"name": "mpo", "method": {"kind": "mpo", "training": QUICK}},
]


def config(folder: Path, entries: list[dict], **tuning: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    tree = {**LANGUAGE, "entries": entries, "tuning": tuning, "output": str(folder / "runs")}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_trials_are_stages_and_the_best_of_them_is_chosen(ray_session: None, tmp_path: Path) -> None:
    assert main(["tune", config(tmp_path, ENTRIES[:1], num_trials=2, seeds=[100], kl_limit=2.0), "--only-trials"]) == 0
    (record,) = (tmp_path / "runs").glob("mini-tuning-*/tuning.json")
    found = load_tuning(record)
    assert [trial.state for trial in found.trials] == ["complete", "complete"]
    assert found.entries[0].best == max((0, 1), key=lambda number: found.trials[number].value or 0.0)
    winner = load_config(record.with_name("tuned.yaml"))
    assert winner.tuned == str(record)
    assert getattr(winner.entries[0].method, "beta", None) == found.entries[0].settings["beta"]
    assert trained(tmp_path) == {"dpo-dpo-t0-s100", "dpo-dpo-t1-s100"}


def trained(folder: Path) -> set[str]:
    """The trainings of DPO that there are, without their hashes."""
    return {stage.name.rsplit("-", 1)[0] for stage in (folder / "runs" / "stages").glob("dpo-*")}


def tuned(path: str, log: Path, *, kill_after: int | None = None) -> TuningResults | None:
    """Run the trials in a process of their own; with `kill_after` end it once so many trials of a seed are trained."""
    runs = Path(path).parent / "runs"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "tune", path, "--only-trials"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            done = len(list(runs.glob("stages/*-t*-s*/manifest.json")))
            if kill_after is not None and done >= kill_after:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
                return None
            time.sleep(0.2)
    assert process.returncode == 0, log.read_text(encoding="utf-8")[-4000:]
    (record,) = runs.glob("mini-tuning-*/tuning.json")
    return load_tuning(record)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_killed_tuning_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    settings = {"num_trials": 4, "batch_size": 2, "seeds": [100, 101], "kl_limit": 1.0}
    whole = tuned(config(tmp_path / "whole", ENTRIES, **settings), tmp_path / "whole.log")
    path, log = config(tmp_path / "killed", ENTRIES, **settings), tmp_path / "killed.log"
    assert tuned(path, log, kill_after=3) is None
    resumed = tuned(path, log)
    assert whole is not None and resumed is not None
    assert without_seconds(resumed) == without_seconds(whole)
    assert {trial.state for trial in whole.trials} == {"complete", "stopped"}


def without_seconds(results: TuningResults) -> dict:
    """What is the same in every run: all but the times."""
    tree = json.loads(results.model_dump_json())
    for part in [*tree["trials"], *tree["entries"]]:
        del part["device_seconds"]
    return tree


@pytest.mark.long
def test_the_winner_is_compared_on_a_language_that_no_trial_saw(ray_session: None, tmp_path: Path) -> None:
    assert main(["tune", config(tmp_path, ENTRIES[:1], num_trials=2, seeds=[100], kl_limit=2.0)]) == 0
    (record,) = (tmp_path / "runs").glob("mini-tuning-*/tuning.json")
    (report,) = (tmp_path / "runs").glob("*/results.json")
    result = load_results(report.parent)
    assert result.results.tuning == load_tuning(record)
    assert any("2 trials" in sentence for sentence in result.findings)
    assert trained(tmp_path) == {"dpo-dpo-t0-s100", "dpo-dpo-t1-s100", "dpo-dpo-s0"}
