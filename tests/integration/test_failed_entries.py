"""An entry that cannot go on is a failed row with its reason; the others are trained, measured and reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from judge_server import Server, server
from on_policy import LocalGenerator, make_job
from test_end_to_end import LANGUAGE, PPO, QUICK

from prefarena.config import GRPOTraining
from prefarena.errors import JudgeError
from prefarena.generation.interface import GeneratorLostError
from prefarena.report.results import load_results
from prefarena.stages import failure_of, is_settled
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

__all__ = ["server"]  # a fixture


def compare(config: Path) -> str:
    """What the command prints, in a process of its own: so Ray's workers find the functions beside this file."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pipelines", "compare", str(config)]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_others_go_on_to_the_report(tmp_path: Path) -> None:
    training = {**PPO, "group_size": 4, "num_snapshots": 0}

    def by(function: str) -> dict:
        return {"kind": "function", "function": f"rewards_that_fail:{function}"}

    entries = [
        {"name": "dpo", "method": {"kind": "dpo", "training": QUICK}},
        {"name": "killed", "method": {"kind": "grpo", "reward": by("killed"), "training": training}},
        {"name": "hungry", "method": {"kind": "grpo", "reward": by("hungry"), "training": training}},
        {"name": "unscored", "method": {"kind": "best_of_n", "reward": by("hungry")}},
        {"name": "gold", "method": {"kind": "grpo", "reward": {"kind": "gold"}, "training": training}},
    ]
    tree = {**LANGUAGE, "output": str(tmp_path / "runs"), "entries": entries, "resources": {"max_failures": 0}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    compare(config)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/results.json"))
    results = load_results(folder)
    for name in ("dpo", "gold"):
        assert "reward/all" in results.entry(name).seeds["0"] and not results.entry(name).failures
    reasons = {name: results.entry(name).failures["0"] for name in ("killed", "hungry", "unscored")}
    assert "training workers died 1 times" in reasons["killed"]
    for name in ("hungry", "unscored"):  # the user's own traceback
        assert "rewards_that_fail:hungry raised an error" in reasons[name]
        assert "in hungry" in reasons[name] and "can't allocate memory" in reasons[name]
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert all(f"{name}" in page for name in reasons) and "failed" in page
    # What failed is not tried again, and what is finished is reused.
    assert "failed in an earlier run and is left as it is" in compare(config)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_entry_of_a_text_task_that_cannot_be_measured_is_a_row_too(server: Server, tmp_path: Path) -> None:
    """The other is compared with the reference by a pairwise judge, which likes the response that it is shown first."""
    server.answer = "I like the first one. Verdict: A"
    rows = [
        {"prompt": f"say {word} {number}", "chosen": f"{word} it is", "rejected": "no"}
        for number in range(30)
        for word in ("red", "green")
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def best(name: str, function: str) -> dict:
        reward = {"kind": "function", "function": f"rewards_that_fail:{function}"}
        return {"name": name, "method": {"kind": "best_of_n", "n": 2, "reward": reward}}

    tree = {
        "name": "text", "output": str(tmp_path / "runs"), "entries": [best("killed", "killed"), best("fine", "short")],
        "task": {"kind": "text", "data": str(data), "max_prompt_tokens": 24, "max_response_tokens": 8},
        "model": {"kind": "scratch", "vocab_size": 300}, "reference": {"training": QUICK},
        "judge": {"kind": "pairwise", "base_url": server.url, "model": "m"},
        "evaluation": {"num_prompts": 4, "samples_per_prompt": 2},
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    compare(config)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/results.json"))
    results = load_results(folder)
    assert "its process died" in results.entry("killed").failures["0"]
    row = results.entry("fine").seeds["0"]
    assert "judge_score" not in row and row["win_rate"] == 0.5 and row["position_bias"] == 1.0
    assert row["num_pairs"] == 8 and row["num_silent_pairs"] == 0
    assert results.win_matrix is not None and results.win_matrix.rows == ["reference", "fine"]
    assert results.win_matrix.win_rate == [[0.5, 0.5], [0.5, 0.5]]
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        "position bias +1.000" in page and "judge score" not in page and not re.search(r"\bnan\b", page, re.IGNORECASE)
    )
    # The comparison with the reference is made again without asking the judge.
    paid = len(server.requests)
    assert 0 < paid <= 2 * (8 - row["num_identical"])  # equal questions are asked once
    (wins,) = (tmp_path / "runs" / "stages").glob("wins-fine-s0-*/manifest.json")
    wins.unlink()
    compare(config)
    assert len(server.requests) == paid and load_results(folder).entry("fine").seeds["0"] == row


class LosesItsEngine(LocalGenerator):
    """A generator that is gone for good at its second batch."""

    num_batches = 0

    def submit(self, *arguments):  # type: ignore[no-untyped-def]
        self.num_batches += 1
        if self.num_batches > 1:
            raise GeneratorLostError("generator 'one' is gone, while waiting to generate")
        return super().submit(*arguments)


def test_a_lost_generator_leaves_the_stage_to_new_ones(
    tiny_policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no failure of the job: the pipeline starts new actors, and fails the entry when that does not help."""
    from prefarena.training import on_policy

    training = GRPOTraining(num_iterations=3, rollouts_per_iteration=16, group_size=4)
    job = make_job(tmp_path, tiny_policy, training)
    source = LosesItsEngine(tiny_policy)
    monkeypatch.setattr(on_policy, "_connect", lambda job: source)
    with pytest.raises(GeneratorLostError):
        run_job(job, Worker(job.stage_dir))
    assert not is_settled(job.stage_dir)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (JudgeError("the endpoint answers 404"), "the endpoint answers 404"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "the GPU ran out of memory"),
        (MemoryError(), "the process ran out of memory"),
    ],
)
def test_a_job_that_cannot_go_on_fails_with_its_reason(
    tiny_policy: str, tmp_path: Path, error: Exception, reason: str
) -> None:
    class Raises:
        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            raise error

    training = GRPOTraining(num_iterations=2, rollouts_per_iteration=16, group_size=4)
    job = make_job(tmp_path, tiny_policy, training)
    run_job(job, Worker(job.stage_dir), LocalGenerator(tiny_policy), Raises())
    assert reason in str(failure_of(job.stage_dir))
    other = replace(job, stage_dir=str(tmp_path / "bug"))
    error = KeyError("a bug")
    with pytest.raises(KeyError):
        run_job(other, Worker(other.stage_dir), LocalGenerator(tiny_policy), Raises())
    assert failure_of(other.stage_dir) is None
