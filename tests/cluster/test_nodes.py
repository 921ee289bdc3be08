"""A comparison on three nodes outlives the loss of one, and uses it again when it is back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_end_to_end import LANGUAGE

from pipelines.cli import main
from prefarena.report.results import load_results

TRAINING = {"num_steps": 1000, "batch_size": 16, "log_every": 10, "checkpoint_every": 25}
TREE = {
    **LANGUAGE,
    "reference": {"train": False},
    "entries": [{"name": "dpo", "method": {"kind": "dpo", "training": TRAINING}}],
    "resources": {"num_workers": 2, "cpus_per_worker": 2, "start_timeout_s": 400},
}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_that_goes_and_comes_back(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**TREE, "output": str(tmp_path / "runs")}), encoding="utf-8")
    here = Path(__file__).parents[1] / "helpers"
    path = os.pathsep.join([str(here), str(here.parents[1]), *sys.path])
    ended = subprocess.run(
        [sys.executable, str(here / "lost_node.py"), str(config)],
        env={**os.environ, "PYTHONPATH": path, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    resumed = json.loads(ended.stdout.splitlines()[-1])
    assert len(resumed) == 1 and resumed[0]["step"] > 0
    results = load_results(next((tmp_path / "runs").glob("mini-*")))
    assert results.entry("dpo").seeds["0"]["preference_accuracy"] > 0.5
    assert main(["compare", str(config)]) == 0  # all is reused
