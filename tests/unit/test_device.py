"""Where models compute is what the config says, whatever the machine has: Ray shows GPUs to tasks that have none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import EOS, save_tiny_policy

from pipelines.evaluate import sampled_job
from pipelines.plan import make_plan
from pipelines.reference import scoring_options
from pipelines.sampled import score_samples
from pipelines.sampled_values import SampledJob
from prefarena.config import Comparison, Evaluation, FunctionJudge, parse_config
from prefarena.generation.client import _environment
from prefarena.judges.spec import JudgeSpec
from prefarena.records import Rollout


def config(tmp_path: Path, **resources: object) -> Comparison:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    return parse_config(
        {
            "task": {"kind": "text", "data": str(data)},
            "output": str(tmp_path / "runs"),
            "model": {"kind": "scratch", "vocab_size": 300},
            "judge": {"kind": "function", "function": "rewards_that_fail:short"},
            "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
            "resources": resources,
        }
    )


@pytest.mark.parametrize(("use_gpu", "device"), [(False, "cpu"), (True, "cuda")])
def test_scorers_are_given_a_gpu_and_told_to_use_it_or_neither(tmp_path: Path, use_gpu: bool, device: str) -> None:
    asked = config(tmp_path, use_gpu=use_gpu)
    (plan,) = make_plan(asked)
    assert sampled_job(asked, plan, None, tmp_path).device == asked.resources.device == device
    assert scoring_options(asked.resources)["num_gpus"] == int(use_gpu)


def test_an_evaluation_without_gpus_leaves_alone_the_one_that_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This torch has no CUDA, so that whatever is moved to a GPU raises."""
    assert not torch.cuda.is_available()
    policy = save_tiny_policy(tmp_path / "policy")
    pairs = {"id": ["a"], "prompt_ids": [[1, 3]], "chosen_ids": [[4, EOS]], "rejected_ids": [[5, EOS]]}
    logps = {"ref_chosen_logp": [-1.0], "ref_rejected_logp": [-2.0]}
    (tmp_path / "test_pairs").mkdir()
    pq.write_table(pa.table(pairs | logps), tmp_path / "test_pairs" / "part-0.parquet")
    (tmp_path / "evaluation").mkdir()
    judge = JudgeSpec(FunctionJudge(function="rewards_that_fail:short"), None, policy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rollouts = [Rollout([1, 3], [6, EOS], [-1.0, -1.0], True, "0"), Rollout([1, 4], [7, EOS], [-1.0, -1.0], True, "0")]
    job = SampledJob(policy, policy, judge, tmp_path, tmp_path / "evaluation")
    score_samples(rollouts, job, Evaluation(), 0.0)
    row = json.loads((tmp_path / "evaluation" / "row.json").read_text(encoding="utf-8"))
    assert row["kl"] == 0.0 and math.isfinite(row["judge_score"])


def test_samples_of_another_engine_are_drawn_again(tmp_path: Path) -> None:
    """Their stages are of the engine's kind of numbers, and of whether what shares a batch changes them."""
    asked = config(tmp_path, use_gpu=True)
    keys = []
    for changed in ({}, {"dtype": "float32"}, {"batch_invariant": True}):
        generation = asked.generation.model_copy(update=changed)
        (plan,) = make_plan(asked.model_copy(update={"generation": generation}))
        keys.append([plan.evaluation.key, *(trained.evaluation.key for trained in plan.trained)])
    assert all(len(set(same)) == 3 for same in zip(*keys, strict=True))
    same = asked.generation.model_copy(update={"dtype": "bfloat16"})  # what auto is on a GPU
    (plan,) = make_plan(asked.model_copy(update={"generation": same}))
    assert plan.evaluation.key == keys[0][0]
    assert [asked.generation.dtype_on(use_gpu) for use_gpu in (False, True)] == ["float32", "bfloat16"]
    assert _environment(generation)["VLLM_BATCH_INVARIANT"] == "1"
    assert _environment(asked.generation)["VLLM_BATCH_INVARIANT"] == "0"
