"""The reference is scored in the arithmetic of the training that reads it: both agree before the first step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from off_policy import metric_rows, off_policy_job, write_inputs
from on_policy import LikedCount, LocalGenerator, make_job
from tiny import save_tiny_policy
from workers import OneOfMany

from pipelines.plan import make_plan
from pipelines.reference import ReferenceLogps
from prefarena.config import DPO, Comparison, LoRA, Optimisation, PPOTraining
from prefarena.data.tables import read_rows, write_rows
from prefarena.modeling import logprobs
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.records import REFERENCED_PAIRS
from prefarena.training.on_policy import OnPolicyTrainer, Phases
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

SHARDINGS: tuple[Literal["none", "fsdp"], ...] = ("none", "fsdp")
#: All pairs in the first step; their passes are those in which the reference is scored.
HALVED = Optimisation(num_steps=1, batch_size=48, precision="bfloat16", log_every=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def scored(inputs: Path, folder: Path, arithmetic: Arithmetic) -> Path:
    """The inputs, their pairs scored again in another arithmetic."""
    folder.mkdir()
    for name in ("model", "demonstrations"):
        (folder / name).symlink_to(inputs / name, target_is_directory=True)
    rows = read_rows(inputs / "pairs")
    num_threads = torch.get_num_threads()
    scores = ReferenceLogps(str(inputs / "model"), 8, "cpu", 1, arithmetic).score(rows.to_pydict())
    torch.set_num_threads(num_threads)
    for side, logps in (("chosen", scores.chosen), ("rejected", scores.rejected)):
        place = rows.schema.get_field_index(f"ref_{side}_logp")
        rows = rows.set_column(place, f"ref_{side}_logp", pa.array(logps, pa.float32()))
    write_rows(rows, folder / "pairs" / "part.parquet", REFERENCED_PAIRS)
    return folder


def first_row(folder: Path) -> dict[str, Any]:
    return metric_rows(folder)[0]


@pytest.mark.parametrize("recomputed", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_log_ratios_are_zero_before_the_first_step_in_bfloat16(
    inputs: Path, tmp_path: Path, path: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "padded":
        monkeypatch.setattr(logprobs, "why_not_packed", lambda *_: "this test pads")
    same, other = scored(inputs, tmp_path / "same", "bfloat16"), scored(inputs, tmp_path / "other", "float32")
    rows = {}
    for where in (same, other):
        training = HALVED.model_copy(update={"activation_checkpointing": recomputed})
        job = off_policy_job(where, where / "dpo", DPO(training=training))
        run_job(job, Worker(job.stage_dir))
        rows[where.name] = first_row(where / "dpo")
    assert rows["same"]["preference/margin"] == 0.0
    assert rows["same"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(rows["other"]["preference/margin"]) > 1e-5  # float32 log-probs are not those of the training


def run_as_one_of_two(rank: int, inputs: Path, root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    training = HALVED.model_copy(update={"num_steps": 4})
    for sharding in SHARDINGS:
        job = off_policy_job(inputs, root / sharding, DPO(training=training))
        run_job(job, OneOfMany(job.stage_dir, rank, 2, sharding))
    torch.distributed.destroy_process_group()


def test_log_ratios_of_two_workers_are_zero_before_the_first_step_and_sharding_changes_none(
    inputs: Path, tmp_path: Path
) -> None:
    halved = scored(inputs, tmp_path / "halved", "bfloat16")
    torch.multiprocessing.spawn(run_as_one_of_two, args=(halved, tmp_path), nprocs=2)
    whole, sharded = (metric_rows(tmp_path / sharding) for sharding in SHARDINGS)
    for row in (whole[0], sharded[0]):
        assert row["preference/margin"] == 0.0 and row["loss"] == pytest.approx(math.log(2), abs=1e-7)
    for one, other in zip(whole, sharded, strict=True):  # what is left is the order in which float32 numbers are added
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_each_entry_is_trained_on_log_probs_of_its_own_arithmetic(tmp_path: Path) -> None:
    def plan_of(precisions: list[str], **resources: Any) -> Any:
        entries = [
            {"name": f"dpo-{i}", "method": {"kind": "dpo", "training": {"precision": precision}}}
            for i, precision in enumerate(precisions)
        ]
        config = Comparison.model_validate({"output": str(tmp_path), "entries": entries, "resources": resources})
        return make_plan(config)[0]

    plain, mixed = plan_of(["float32"]), plan_of(["bfloat16", "float32"])
    assert list(plain.scored) == ["float32"] and list(mixed.scored) == ["float32", "bfloat16"]
    assert mixed.logps == plain.logps != mixed.scored["bfloat16"]
    assert list(plan_of(["bfloat16"]).scored) == ["bfloat16"]  # nothing is scored in float32 that nobody reads
    assert list(plan_of(["bfloat16"], sharding="fsdp", num_workers=2).scored) == ["bfloat16"]

    # A training that was interrupted goes on with another number of workers, sharded or not, in the same arithmetic.
    def trained(precision: str, **resources: Any) -> list[Any]:
        return [trained.training for trained in plan_of([precision], **resources).trained]

    assert trained("float32") == trained("float32", num_workers=2) == trained("float32", num_workers=4, sharding="fsdp")
    assert trained("float32") != trained("float32", cpus_per_worker=2)
    assert trained("bfloat16", num_workers=2) == trained("bfloat16", num_workers=2, sharding="fsdp")
    assert trained("bfloat16") != trained("float32")


def test_arithmetics_differ_by_what_would_be_taken_for_training(inputs: Path) -> None:
    rows = read_rows(inputs / "pairs").to_pydict()
    num_threads = torch.get_num_threads()
    found = {
        arithmetic: ReferenceLogps(str(inputs / "model"), 8, "cpu", 1, arithmetic).score(rows).chosen
        for arithmetic in ("float32", "bfloat16")
    }
    torch.set_num_threads(num_threads)
    assert 1e-4 < np.abs(found["bfloat16"] - found["float32"]).max() < 0.2


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "roles on one body"])
def test_an_on_policy_reference_computes_as_the_policy_does(tmp_path: Path, lora: LoRA | None) -> None:
    policy = save_tiny_policy(tmp_path / "policy")
    training = PPOTraining(
        num_iterations=1,
        rollouts_per_iteration=6,
        num_minibatches=1,
        micro_batch_size=2,
        precision="bfloat16",
        lora=lora,
    )
    job = make_job(tmp_path, policy, training)
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir), LocalGenerator(policy), reward=LikedCount())
    experience = trainer.make_experience(Phases())
    assert experience.old_logps.abs().max() > 0.1
    assert torch.equal(experience.old_logps, experience.reference_logps)
    assert (experience.old_logps - experience.generator_logps).abs().max() > 1e-5  # which are of float32
    trainer.run(0)
    for learner in trainer.learners.values():
        assert all(weight.dtype == torch.float32 for weight in learner.trained.values())
        assert learner.guard.num_skipped == 0
