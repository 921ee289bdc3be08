"""A comparison with RLHF that is interrupted in every way ends in the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_end_to_end import LANGUAGE, LEARNED, PPO

from pipelines.cli import main
from prefarena.report.results import load_results

TRAINING = {
    **PPO,
    "num_iterations": 24,
    "checkpoint_every": 3,
    "num_snapshots": 1,
    "critic_warmup_iterations": 2,
    "target_kl": 0.05,
    "kl_horizon": 200,
    "schedule": "linear",
}
TREE = {**LANGUAGE, "entries": [{"name": "rlhf", "method": {"kind": "rlhf", "reward": LEARNED, "training": TRAINING}}]}
LIMIT_S = 240


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "output": str(folder / "runs")}), encoding="utf-8")
    return path


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows that training has logged, those being written left out."""
    files = list((folder / "runs" / "stages").glob("rlhf-*/metrics.jsonl"))
    lines = files[0].read_text(encoding="utf-8").splitlines(keepends=True) if files else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "tokens_per_second"}
        for row in rows
    ]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)


def kill_ray_process(run: psutil.Process, name: str) -> None:
    """End a Ray worker process of a run, by the name that Ray gives it, without warning."""
    found = [child for child in run.children(recursive=True) if child.name().startswith(f"ray::{name}"[:15])]
    assert len(found) == 1, [child.name() for child in run.children(recursive=True)]
    found[0].kill()


def interrupted(config: Path) -> None:
    """Run the comparison, and end its generation actor, then its training worker, then all of it."""
    folder = config.parent
    command = [sys.executable, "-m", "pipelines.cli", "compare", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    run = psutil.Process(process.pid)

    def logged(number: int) -> Callable[[], bool]:
        def holds() -> bool:
            assert process.poll() is None, (folder / "log.txt").read_text(encoding="utf-8")[-3000:]
            return len(metric_rows(folder)) >= number

        return holds

    wait_until(logged(4), "the first iterations")
    kill_ray_process(run, "GenerationActor")
    wait_until(logged(8), "iterations after the generation actor was killed")
    kill_ray_process(run, "RayTrainWorker")
    wait_until(lambda: len(metric_rows(folder)) < 8, "training to go back to its last checkpoint")
    wait_until(logged(14), "iterations after the training worker was killed")
    everything = [run, *run.children(recursive=True)]
    for victim in everything:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everything, timeout=30)


def test_an_interrupted_comparison_ends_in_the_same_bits(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = write_config(tmp_path / "whole"), write_config(tmp_path / "broken")
    assert main(["compare", str(whole)]) == 0
    shutil.copytree(whole.parent / "runs" / "stages", broken.parent / "runs" / "stages")
    for stage in (broken.parent / "runs" / "stages").iterdir():  # what training needs is there, itself is not
        if stage.name.startswith(("rlhf-", "evaluation-", "scores-")):
            shutil.rmtree(stage)
    interrupted(broken)
    assert 14 <= len(metric_rows(broken.parent)) < TRAINING["num_iterations"]  # type: ignore[operator]
    capsys.readouterr()
    assert main(["compare", str(broken)]) == 0

    def weights(config: Path) -> dict[str, bytes]:
        (stage,) = (config.parent / "runs" / "stages").glob("rlhf-*")
        files = sorted(stage.rglob("*.safetensors"))
        assert len(files) == 2  # the policy at the end, and the snapshot
        return {str(file.relative_to(stage)): file.read_bytes() for file in files}

    assert weights(broken) == weights(whole)
    assert timeless(metric_rows(broken.parent)) == timeless(metric_rows(whole.parent))
    coefficients = [row["kl/coef"] for row in metric_rows(broken.parent)]
    assert len(set(coefficients)) > 12  # the controller was at work all the while
    reports = [load_results(next((config.parent / "runs").glob("mini-*"))) for config in (whole, broken)]
    assert [entry.seeds for entry in reports[0].entries] == [entry.seeds for entry in reports[1].entries]
