"""A comparison whose processes are killed at random ends in table, weights and rows of an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos import VICTIMS, Disturbed, plan_kills, summary
from test_end_to_end import LANGUAGE, PPO

from pipelines.cli import main
from prefarena.report.results import Results, load_results

#: More of them: PREFARENA_CHAOS_KILLS=50 python -m pytest tests/test_chaos.py
NUM_KILLS = int(os.environ.get("PREFARENA_CHAOS_KILLS", "10"))
SEED = int(os.environ.get("PREFARENA_CHAOS_SEED", "0"))
STEPS = {"num_steps": 600, "batch_size": 16, "log_every": 10, "checkpoint_every": 50}
TRAINING = {
    **PPO,
    "num_iterations": 40,
    "checkpoint_every": 3,
    "critic_warmup_iterations": 2,
    "target_kl": 0.05,
    "kl_horizon": 200,
    "schedule": "linear",
}
LEARNED = {"kind": "learned", "training": STEPS}
ENTRIES: list[dict[str, Any]] = [
    {"name": "mpo", "method": {"kind": "mpo", "training": STEPS}},
    {"name": "dpo", "method": {"kind": "dpo", "training": STEPS}},
    {"name": "rlhf", "method": {"kind": "rlhf", "reward": LEARNED, "training": TRAINING}},
    {"name": "best-of-4", "method": {"kind": "best_of_n", "reward": LEARNED}},
]
TREE = {**LANGUAGE, "entries": ENTRIES, "resources": {"max_failures": NUM_KILLS}}
#: Of the four jobs the last, on-policy, has generation actors; the reference's stage is copied.
GENERATING = (0.83, 0.97)
_OWN = ("mpo-", "dpo-", "rlhf-", "reward_model-", "scores-", "evaluation-")
_CLOCKS = ("time/", "tokens_per_second", "steps_per_second")


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "output": str(folder / "runs")}), encoding="utf-8")
    return path


def results_of(config: Path) -> Results:
    return load_results(next((config.parent / "runs").glob("mini-*")))


def files(config: Path, pattern: str) -> dict[str, bytes]:
    stages = config.parent / "runs" / "stages"
    return {str(path.relative_to(stages)): path.read_bytes() for path in sorted(stages.rglob(pattern))}


def timeless(content: bytes) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in content.splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(_CLOCKS)} for row in rows]


@pytest.mark.timeout(1200)
def test_kills_of_every_kind_change_nothing(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = write_config(tmp_path / "whole"), write_config(tmp_path / "broken")
    assert main(["compare", str(whole)]) == 0
    shutil.copytree(whole.parent / "runs" / "stages", broken.parent / "runs" / "stages")
    for stage in (broken.parent / "runs" / "stages").iterdir():  # what entries share is there, their own is not
        if stage.name.startswith(_OWN):
            shutil.rmtree(stage)
    kills = plan_kills(NUM_KILLS, SEED, lambda source: source.uniform(*GENERATING))
    run = Disturbed(broken, kills)
    run.run()
    assert {kill.kind for kill in kills} == set(VICTIMS)
    assert all(kill.seconds > 0 for kill in kills)
    with capsys.disabled():
        print("\n" + summary(run))
    assert [entry.seeds for entry in results_of(broken).entries] == [entry.seeds for entry in results_of(whole).entries]
    weights = files(whole, "*.safetensors")
    assert len(weights) == 6 and files(broken, "*.safetensors") == weights
    rows, expected = (files(config, "metrics.jsonl") for config in (broken, whole))
    assert {name: timeless(rows[name]) for name in rows} == {name: timeless(expected[name]) for name in expected}
    assert any("was interrupted" in note for note in results_of(broken).notes)
