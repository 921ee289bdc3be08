"""A short off-policy training that is killed and resumed, held against one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights
from workers import DyingWorker, KilledError

from prefarena.config import OffPolicyMethod, Optimisation
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker


def rows_of_a_run_that_resumes_bit_for_bit(inputs: Path, folder: Path, method: OffPolicyMethod) -> list[dict[str, Any]]:
    """The rows of twelve steps, after a run that was killed has ended in the same weights."""
    training = Optimisation(num_steps=12, batch_size=48, log_every=1, warmup_steps=0, checkpoint_every=5)
    method = method.model_copy(update={"training": training, "demonstration_weight": 0.01})
    straight, broken = (off_policy_job(inputs, folder / name, method) for name in ("straight", "broken"))
    run_job(straight, Worker(straight.stage_dir))
    with pytest.raises(KilledError):
        run_job(broken, DyingWorker(broken.stage_dir))
    run_job(broken, Worker(broken.stage_dir))
    found, expected = weights(folder / "broken"), weights(folder / "straight")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = metric_rows(folder / "straight")
    assert len(rows) == 12
    return rows
