"""A training that was killed and went on shows each step once, whatever tracker follows it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from off_policy import metric_rows, write_inputs

from prefarena.config.tracking import WandB
from prefarena.trackers.interface import Run
from tests.helpers.tracked_training import FINAL
from tests.helpers.trackers import KINDS, Stored, check_same, needs, points, read

ROOT = Path(__file__).parents[2]
#: What must not be found in any file.
CANARY = "canary-5f1c0e"


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was killed after step 8, with a checkpoint of step 6, and gone on with."""
    folder = tmp_path_factory.mktemp("tracked")
    inputs = write_inputs(folder / "inputs")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # W&B's own process is named there by whoever used it before, and outlives the training that is killed.
    environment.pop("WANDB_SERVICE", None)
    environment |= dict.fromkeys(("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "MY_SECRET"), CANARY)
    command = [
        sys.executable,
        str(ROOT / "tests" / "helpers" / "tracked_training.py"),
        str(inputs),
        str(folder / "out"),
    ]
    first = subprocess.run([*command, "8"], env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert [row["step"] for row in metric_rows(folder / "out" / "stage")] == list(range(1, 9))
    second = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    return folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_shown_once_after_a_kill_with_the_row_that_counted(kind: str, killed_and_resumed: Path) -> None:
    needs(kind)
    rows = metric_rows(killed_and_resumed / "stage")
    assert [row["step"] for row in rows] == list(range(1, 13))
    final: Stored = [(f"final/{name}", 12, value) for name, value in FINAL.items()]
    check_same(read(kind, killed_and_resumed), [*points(rows), *final])


def test_nothing_of_the_environment_is_written(killed_and_resumed: Path) -> None:
    for path in (killed_and_resumed / "tracking").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert CANARY.encode() not in content and b"PYTHONPATH" not in content, path


def test_wandb_offers_nothing_of_its_own_where_a_client_of_language_models_is_imported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    import openai

    from prefarena.trackers.wandb import WandBTracker

    assert sys.modules["openai"] is openai  # which judges behind endpoints use
    monkeypatch.delenv("WANDB_DISABLE_WEAVE", raising=False)
    run = Run("mine", "dpo", 0, "dpo", "0" * 8, {})
    WandBTracker(WandB(kind="wandb", mode="offline"), tmp_path).open(run, [{"step": 1, "loss": 0.5}]).close()
    printed = capfd.readouterr()
    assert "weave" not in (printed.out + printed.err).lower()
    assert "WANDB_DISABLE_WEAVE" not in os.environ  # for the user's own runs
