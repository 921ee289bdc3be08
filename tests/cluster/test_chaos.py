"""A comparison whose processes are killed at random ends in table, weights and rows of an undisturbed one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from chaos import VICTIMS, Disturbed, differences, generating_span, plan_kills, run_folder, summary, write_config
from test_end_to_end import LANGUAGE, PPO

from pipelines.cli import main
from prefarena.config import load_config
from prefarena.report.results import load_results

#: More of them: PREFARENA_CHAOS_KILLS=50 python -m pytest tests/cluster/test_chaos.py
NUM_KILLS = int(os.environ.get("PREFARENA_CHAOS_KILLS", "10"))
SEED = int(os.environ.get("PREFARENA_CHAOS_SEED", "0"))
STEPS = {"num_steps": 1500, "batch_size": 16, "log_every": 10, "checkpoint_every": 50}
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
ADAPTERS = {"lora": {"rank": 4}, "learning_rate": 3e-3, "activation_checkpointing": True}
SHARDED: list[dict[str, Any]] = [
    {
        "name": "rlhf",
        "method": {
            "kind": "rlhf",
            "reward": {"kind": "learned", "training": {**STEPS, **ADAPTERS, "num_steps": 500}},
            "training": {**TRAINING, **ADAPTERS},
        },
    }
]
#: What is compared, and how many weight files its stages leave: models, one on the way, and adapters beside them.
TREES: dict[str, tuple[dict[str, Any], int]] = {
    "every method": ({**LANGUAGE, "entries": ENTRIES, "resources": {"max_failures": NUM_KILLS}}, 7),
    "PPO with adapters, sharded": (
        {
            **LANGUAGE,
            "entries": SHARDED,
            "resources": {"max_failures": NUM_KILLS, "num_workers": 2, "sharding": "fsdp"},
            "generation": {"cpus": 0},  # two workers take both CPUs of the smallest machine that this is run on
        },
        7,
    ),
}
_OWN = ("mpo-", "dpo-", "rlhf-", "reward_model-", "scores-", "evaluation-")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TREES)
def test_kills_of_every_kind_change_nothing(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tree, num_weight_files = TREES[name]
    whole, broken = (write_config(tree, tmp_path / folder) for folder in ("whole", "broken"))
    assert main(["compare", str(whole)]) == 0
    shutil.copytree(whole.parent / "runs" / "stages", broken.parent / "runs" / "stages")
    for stage in (broken.parent / "runs" / "stages").iterdir():  # what entries share is there, their own is not
        if stage.name.startswith(_OWN):
            shutil.rmtree(stage)
    run = Disturbed(broken, plan_kills(NUM_KILLS, SEED, generating_span(load_config(str(broken), []))))
    run.run()
    assert {kill.kind for kill in run.kills} == set(VICTIMS)
    assert all(kill.seconds > 0 for kill in run.kills)
    with capsys.disabled():
        print("\n" + summary(run))
    assert differences(whole, broken) == []
    assert len(list((broken.parent / "runs" / "stages").rglob("*.safetensors"))) == num_weight_files
    assert any("was interrupted" in note for note in load_results(run_folder(broken)).notes)
