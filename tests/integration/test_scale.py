"""Several workers, whole or sharded, adapters and recomputation: what a run computes stays what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights, write_inputs
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel
from workers import DyingWorker, KilledError, OneOfMany, Sharding

from prefarena.config import MPO, LoRA, Optimisation, Resources, RewardModel
from prefarena.errors import UserError
from prefarena.judges.models import RewardModelJudge
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.modeling.lora import add_adapters
from prefarena.stages import read_manifest
from prefarena.training.jobs import Job, RewardModelJob
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

NUM_STEPS = 50
#: Micro-batches small enough that every step has several.
TRAINING = Optimisation(num_steps=NUM_STEPS, batch_size=16, micro_batch_tokens=64, log_every=1, checkpoint_every=20)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": LoRA(rank=4), "learning_rate": 3e-3},
    "recomputed": {"activation_checkpointing": True},
    "lora recomputed": {"lora": LoRA(rank=4), "learning_rate": 3e-3, "activation_checkpointing": True},
}


class DiesLate(DyingWorker):
    dies_at = 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def variant_job(inputs: Path, folder: Path, variant: str) -> Job:
    training = TRAINING.model_copy(update=VARIANTS[variant])
    return off_policy_job(inputs, folder / variant, MPO(demonstration_weight=0.1, training=training))


def reward_model_job(inputs: Path, folder: Path) -> RewardModelJob:
    training = TRAINING.model_copy(update={"lora": LoRA(rank=4), "num_steps": 8})
    return RewardModelJob(
        stage_dir=str(folder), name="rm", policy=str(inputs / "model"), seed=0, settings=RewardModel(training=training),
        pairs=str(inputs / "pairs"), test_pairs=str(inputs / "pairs"), samples=str(inputs / "demonstrations"),
    )  # fmt: skip


def all_jobs(inputs: Path, root: Path) -> list[Job]:
    return [*(variant_job(inputs, root, variant) for variant in VARIANTS), reward_model_job(inputs, root / "rm")]


def run_as_one_of_two(rank: int, inputs: Path, root: Path) -> None:
    torch.set_num_threads(1)
    for job in all_jobs(inputs, root / "one")[rank::2]:
        run_job(job, Worker(job.stage_dir))
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    shardings: tuple[Sharding, ...] = ("none", "fsdp")
    for sharding in shardings:
        for job in all_jobs(inputs, root / sharding):
            run_job(job, OneOfMany(job.stage_dir, rank, 2, sharding))
    broken = variant_job(inputs, root / "broken", "lora")
    with pytest.raises(KilledError):
        run_job(broken, DiesLate(broken.stage_dir, rank, 2, "fsdp"))
    run_job(broken, OneOfMany(broken.stage_dir, rank, 2, "fsdp"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/, none/ (two workers with whole copies), fsdp/ and broken/, each with all variants."""
    root = tmp_path_factory.mktemp("runs")
    torch.multiprocessing.spawn(run_as_one_of_two, args=(inputs, root), nprocs=2)
    return root


@pytest.mark.parametrize("workers", ["none", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_workers_have_the_losses_of_one(runs: Path, variant: str, workers: str) -> None:
    one, two = (metric_rows(runs / where / variant) for where in ("one", workers))
    for name in ("loss", "preference/margin"):
        np.testing.assert_allclose(column(two, name), column(one, name), rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(column(two, "grad_norm"), column(one, "grad_norm"), rtol=1e-4)
    assert len(one) == NUM_STEPS
    assert np.mean(column(one[-5:], "preference/margin")) > 0.3  # it has learnt something


@pytest.mark.parametrize("workers", ["one", "none", "fsdp"])
@pytest.mark.parametrize(("kept", "recomputed"), [("plain", "recomputed"), ("lora", "lora recomputed")])
def test_recomputed_layers_change_no_gradient(runs: Path, kept: str, recomputed: str, workers: str) -> None:
    rows, again = (metric_rows(runs / workers / variant) for variant in (kept, recomputed))
    np.testing.assert_allclose(column(again, "grad_norm"), column(rows, "grad_norm"), rtol=1e-6)


def test_an_interrupted_sharded_run_ends_in_the_same_weights_bit_for_bit(runs: Path) -> None:
    straight, resumed = (weights(runs / where / "lora") for where in ("fsdp", "broken"))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    (fault,) = read_manifest(runs / "broken" / "lora")["faults"]
    assert fault["kind"] == "resumed" and fault["step"] == 20


@pytest.mark.parametrize("variant", ["plain", "lora"])
def test_the_saved_model_is_whole_and_that_of_one_worker(inputs: Path, runs: Path, variant: str) -> None:
    start = load_policy(inputs / "model").state_dict()
    one, sharded = (weights(runs / where / variant) for where in ("one", "fsdp"))
    assert start.keys() == one.keys() == sharded.keys()  # no trace of adapters
    for name, value in one.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-5)
    folders = [runs / where / variant / "model" for where in ("one", "fsdp")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    moved = {name for name, value in one.items() if not torch.equal(value, start[name])}
    projections = {name for name in start if "_proj" in name}
    assert moved == (projections if variant == "lora" else set(start))


def test_the_adapter_beside_the_model_gives_the_same_policy(inputs: Path, runs: Path) -> None:
    adapted = PeftModel.from_pretrained(load_policy(inputs / "model"), str(runs / "fsdp" / "lora" / "adapter"))
    merged = load_policy(runs / "fsdp" / "lora" / "model")
    prompts, responses = [[1, 3, 4]], [[[5, 6, 2], [7, 2]]]
    ours = sequence_logps(LogProbs(merged), prompts, responses)[0]
    theirs = sequence_logps(LogProbs(cast(PreTrainedModel, adapted.get_base_model())), prompts, responses)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    before = sequence_logps(LogProbs(load_policy(inputs / "model")), prompts, responses)[0]
    assert (ours - before).abs().max() > 0.1


def test_checkpoints_of_adapters_hold_nothing_else(inputs: Path, tmp_path: Path) -> None:
    job = variant_job(inputs, tmp_path, "lora")
    with pytest.raises(KilledError):
        run_job(job, DiesLate(job.stage_dir, 0, 1, "none"))
    checkpoint = Worker(job.stage_dir).restore()
    assert checkpoint is not None
    kept = {name for name in checkpoint.tensors if name.startswith("model.")}
    assert kept and all("lora_" in name for name in kept)
    assert len(checkpoint.tensors) == 4 * len(kept)  # AdamW's two moments and its step


def test_a_policy_with_adapters_starts_at_its_reference(inputs: Path) -> None:
    policy = load_policy(inputs / "model")
    add_adapters(policy, LoRA(rank=4), seed=5)
    module, reference = LogProbs(policy), LogProbs(load_policy(inputs / "model"))
    assert module.packed and module.plain_head
    prompts, responses = [[1, 3, 4]], [[[5, 6, 2], [7, 2]]]
    ours, theirs = (sequence_logps(one, prompts, responses)[0] for one in (module, reference))
    assert torch.equal(ours, theirs)


def test_adapters_that_cannot_be_are_refused_with_a_sentence(inputs: Path) -> None:
    with pytest.raises(ValidationError, match="lm_head cannot have an adapter"):
        LoRA(targets=("q_proj", "lm_head"))
    policy = load_policy(inputs / "model")
    with pytest.raises(UserError, match=r"'query' is not a linear layer of this model, which has down_proj, .*v_proj"):
        add_adapters(policy, LoRA(targets=("q_proj", "query")), seed=0)
    policy.set_output_embeddings(policy.get_submodule("model.layers.0.mlp.down_proj"))
    with pytest.raises(UserError, match=r"model.layers.0.mlp.down_proj is the model's head"):
        add_adapters(policy, LoRA(targets=("layers.0.mlp.down_proj",)), seed=0)


@pytest.mark.parametrize("workers", ["none", "fsdp"])
def test_a_reward_model_with_adapters_is_that_of_one_worker(runs: Path, workers: str) -> None:
    one, two = (read_manifest(runs / where / "rm")["reward_model"] for where in ("one", workers))
    for name in ("accuracy", "log_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-4)
    files = [runs / where / "rm" / "model" / "config.json" for where in ("one", workers)]
    configs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert configs[0].keys() == configs[1].keys()
    for name, value in configs[0].items():  # mean and scale of the scores among them
        assert configs[1][name] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value)
    judge = RewardModelJudge(str(runs / workers / "rm" / "model"))
    assert np.isfinite(judge.score([[1, 3, 4]], [[5, 2]])).all()


def test_ray_train_runs_sharded_workers(ray_session: None, inputs: Path, runs: Path, tmp_path: Path) -> None:
    from prefarena.training.launch import run_jobs

    job = variant_job(inputs, tmp_path, "lora recomputed")
    run_jobs([job], Resources(num_workers=2, sharding="fsdp"), str(tmp_path / "ray"))
    ours, expected = (metric_rows(Path(folder)) for folder in (job.stage_dir, runs / "one" / "lora recomputed"))
    np.testing.assert_allclose(column(ours, "loss"), column(expected, "loss"), rtol=0, atol=1e-5)


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]
