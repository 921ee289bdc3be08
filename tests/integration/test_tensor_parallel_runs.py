"""Engines over several devices beside nothing else: a real model, and a whole comparison.

They take more of the four CPUs of the tests' Ray than another engine of two devices would leave.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_end_to_end import LANGUAGE, run

from prefarena.config import Generation
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import Sampling
from prefarena.modeling.load import load_policy
from tests.helpers.real_model import smollm2

pytestmark = pytest.mark.long


def test_a_real_model_over_three_devices_generates_what_it_does_on_one(ray_session: None) -> None:
    """SmolLM2 has 9 heads and 3 of keys and values."""
    path, results = smollm2(), []
    policy = load_policy(path)
    prompts = [[1, 40 + 7 * i, 900 + 31 * i] for i in range(8)]
    for devices in (1, 3):
        settings = Generation(tensor_parallel=devices)
        running = Generators.start(path, settings, 64, use_gpu=False, names=(f"smol-{devices}",), seed=0)
        try:
            running.sync(policy.state_dict().items(), "stored")
            assert running.verified is not None and running.verified.share == 1
            results.append(running.generate(prompts, Sampling(16, 0.0, seed=0), "stored"))
        finally:
            running.stop()
    first, second = results
    assert [r.response_ids for r in first] == [r.response_ids for r in second]
    logps = [torch.tensor([logp for r in found for logp in r.token_logps]) for found in results]
    assert (logps[0] - logps[1]).abs().max() < 1e-4


def test_a_comparison_runs_to_its_report_with_engines_over_two_devices(ray_session: None, tmp_path: Path) -> None:
    entries = [entry for entry in LANGUAGE["entries"] if entry["name"] in ("dpo", "rlhf")]  # type: ignore[index]
    method = entries[1]["method"]
    entries.append({"name": "adapters", "method": {**method, "training": {**method["training"], "lora": {"rank": 4}}}})
    results = run({**LANGUAGE, "entries": entries, "generation": {"tensor_parallel": 2}}, tmp_path)
    assert {"dpo", "rlhf", "adapters"} <= {entry.name for entry in results.entries}
    for name in ("rlhf", "adapters"):
        assert results.entry(name).seeds["0"]["kl/all"] > 0
    assert (next((tmp_path / "runs").glob("*/report.html"))).is_file()
