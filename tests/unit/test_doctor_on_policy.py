"""What the doctor predicts of on-policy trainings is what a worker predicts before its first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_policy import make_job
from test_roles import reward_model, write_inputs
from transformers import AutoConfig, LlamaConfig

from pipelines.memory import refuse_what_cannot_fit, to_do
from pipelines.plan import make_plan
from prefarena.cluster.doctor import judge_memory
from prefarena.cluster.needs import Heaviest, Lengths, num_parameters, trainings
from prefarena.cluster.probe import NodeReport
from prefarena.config import Comparison, LoRA, RewardModel, parse_config
from prefarena.errors import UserError
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.memory import Spread
from prefarena.stages import write_failure
from prefarena.training.learner import prepare
from prefarena.training.on_policy_memory import memory_need
from prefarena.training.on_policy_models import load_models
from prefarena.training.worker import Worker

GIB = 2**30
ADAPTERS = {"rank": 4}
LENGTHS = Lengths(5, 6)


class OneOfTwo(Worker):
    """Of two sharded workers; nothing is sent between them before models are distributed."""

    world_size, sharding = 2, "fsdp"


def comparison(kind: str, training: dict[str, Any], reward: dict[str, Any], num_workers: int) -> Comparison:
    method = {"kind": kind, "training": {"micro_batch_size": 4, **training}, "reward": reward}
    resources = {"num_workers": num_workers, "sharding": "fsdp"}
    return parse_config(
        {"reference": {"train": False}, "entries": [{"name": "x", "method": method}], "resources": resources}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's inputs, and two reward models: trained in full, and as adapters."""
    root = tmp_path_factory.mktemp("folders")
    inputs = write_inputs(root / "inputs")
    for name, lora in (("full", None), ("adapters", LoRA(rank=4))):
        reward_model(root / name, inputs, lora)
    return root


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "training", "trained"),
    [
        ("rlhf", {}, "full"),
        ("rlhf", {"precision": "bfloat16", "activation_checkpointing": True}, "full"),
        ("rlhf", {"lora": ADAPTERS}, "full"),
        ("rlhf", {"lora": ADAPTERS}, "adapters"),
        ("rlhf", {"lora": ADAPTERS, "precision": "bfloat16"}, "adapters"),
        ("grpo", {}, "full"),
        ("grpo", {"precision": "bfloat16", "reference_every": 1, "reference_mix": 0.1}, "full"),
        ("rlhf", {"lora": ADAPTERS, "reference_every": 5}, "adapters"),
        ("grpo", {"lora": ADAPTERS, "activation_checkpointing": True}, "adapters"),
    ],
)
def test_the_doctor_predicts_what_a_worker_does(
    folders: Path, tmp_path: Path, kind: str, training: dict[str, Any], trained: str, num_workers: int
) -> None:
    settings = {"kind": "learned"} | ({"training": {"lora": ADAPTERS}} if trained == "adapters" else {})
    config = comparison(kind, training, settings, num_workers)
    method: Any = config.entries[0].method
    policy, reward = str(folders / "inputs" / "model"), str(folders / trained / "model")
    job = make_job(tmp_path, policy, method.training)
    job = replace(
        job, reward=JudgeSpec(RewardModel.model_validate(settings), reward, policy), critic=reward, monitor=None,
        response_limit=LENGTHS.response, max_length=LENGTHS.total,
    )  # fmt: skip
    worker = OneOfTwo(job.stage_dir) if num_workers > 1 else Worker(job.stage_dir)
    models = load_models(job, worker)
    for module in models.to_prepare():
        prepare(module, job.training, worker)
    by_worker = memory_need(job, models, LENGTHS.prompt, 4, Spread(num_workers), on_gpu=False)
    [of_training] = [one for one in trainings(config) if one.on_policy]
    assert by_worker is not None and by_worker == of_training.need(AutoConfig.from_pretrained(policy), LENGTHS, 4)
    assert of_training.key == "entries.x.method.training.micro_batch_size"


NODE = NodeReport("a", {}, None, [("H100", 80 * GIB), ("L4", 24 * GIB)], True, GIB, 32 * 1024.0)
#: Of 7 billion parameters, in two layers.
SHALLOW = LlamaConfig(
    hidden_size=16384, intermediate_size=50_000, num_hidden_layers=2, num_attention_heads=128, vocab_size=8192,
    tie_word_embeddings=False,
)  # fmt: skip


def of_gpus(training: dict[str, Any], **changed: Any) -> Comparison:
    method = {"kind": "rlhf", "training": training, "reward": {"kind": "gold"}}
    resources = {"use_gpu": True, **changed.pop("resources", {})}
    tree = {"reference": {"train": False}, "entries": [{"name": "ppo", "method": method}], "resources": resources}
    return parse_config({**tree, **changed})


def refused(config: Comparison) -> str:
    [training] = trainings(config)
    try:
        refuse_what_cannot_fit(config, training, SHALLOW, [NODE])
    except UserError as error:
        return str(error)
    return ""


def test_what_no_card_can_hold_is_refused_with_the_settings_to_change() -> None:
    told = refused(of_gpus({}))
    assert told.startswith("entries.ppo.method.training: a worker needs at least ")
    for part in ("offers 80.0 GiB", "sharding: fsdp", "training.lora", "precision: bfloat16", "check_memory: false"):
        assert part in told
    many = of_gpus({"precision": "bfloat16"}, resources={"num_workers": 2, "sharding": "fsdp"})
    told = refused(many)
    assert "raise resources.num_workers" in told and "precision" not in told
    assert not refused(of_gpus({"lora": {"rank": 4}}))  # on the largest card, whatever the smallest has
    halved = {"lora": {"rank": 4}, "precision": "bfloat16"}
    shared = {"resources": {"gpus_per_worker": 0.5}}
    engine = {"gpus": 0.5, "weight_sync": "ipc", "gpu_memory_utilization": 0.8}
    told = refused(of_gpus(halved, **shared, generation=engine))
    assert "offers 16.0 GiB" in told and "lower generation.gpu_memory_utilization" in told
    assert not refused(of_gpus(halved, **shared, generation=engine | {"gpu_memory_utilization": 0.3}))


def test_an_engine_on_the_workers_card_takes_its_part_of_it() -> None:
    memory = Heaviest(30 * GIB, "entries.ppo.method.training.micro_batch_size", on_policy=True)
    card = replace(NODE, gpus=[("H100", 80 * GIB)])
    generation = {"gpus": 0.3, "gpu_memory_utilization": 0.7}
    [found] = judge_memory(of_gpus({}, resources={"gpus_per_worker": 0.7}, generation=generation), [card], memory)
    assert found.problem and "24.0 GiB beside an engine (generation.gpu_memory_utilization: 0.7)" in found.text
    [found] = judge_memory(of_gpus({}, generation=generation), [card], memory)  # a card of its own
    assert found.problem is False and "80.0 GiB" in found.text
    off_policy = memory._replace(on_policy=False)
    [found] = judge_memory(of_gpus({}, resources={"gpus_per_worker": 0.7}, generation=generation), [card], off_policy)
    assert found.problem is False and "56.0 GiB" in found.text


def test_weights_on_their_way_take_what_gradients_and_passes_left_on_a_gpu() -> None:
    adapters = {"lora": {"rank": 4}, "precision": "bfloat16", "micro_batch_size": 1}
    [training] = trainings(of_gpus(adapters))
    by_host = training.need(SHALLOW, Lengths(1, 1), 1)
    [training] = trainings(of_gpus(adapters, generation={"weight_sync": "nccl"}))
    need = training.need(SHALLOW, Lengths(1, 1), 1)
    weights, largest = 4 * num_parameters(SHALLOW), 4 * 16384 * 50_000
    assert need is not None and weights / 2 < need.weights < 0.6 * weights
    assert need.activations == 2 * largest + 3 * GIB < weights / 2  # merged one by one in float32, packed on rank 0
    assert by_host is not None and by_host.weights == need.weights and by_host.activations < need.activations
    whole = trainings(of_gpus({"micro_batch_size": 1}))[0].need(SHALLOW, Lengths(1, 1), 1)
    assert whole is not None and whole.weights < 3.05 * weights  # policy, critic, reference; none is copied
    assert whole.gradients < 2.01 * weights
    two = {"num_workers": 2, "sharding": "fsdp"}
    spread = trainings(of_gpus({"micro_batch_size": 1}, resources=two))[0].need(SHALLOW, Lengths(1, 1), 1)
    assert spread is not None and 0.9 * weights < spread.gradients < 1.01 * weights  # a half of two models'


def test_only_what_is_still_to_be_trained_is_looked_at(tmp_path: Path) -> None:
    config = parse_config({"output": str(tmp_path), "entries": [{"name": "ppo", "method": {"kind": "rlhf"}}]})
    plans = make_plan(config)
    method = "entries.ppo.method"
    assert to_do(plans) == {"reference.training", f"{method}.reward.training", f"{method}.training"}
    assert to_do(plans) <= {one.where for one in trainings(config)}
    write_failure(plans[0].trained[0].training.folder, "it failed", label="", seed=0, faults=[])  # type: ignore[union-attr]
    assert to_do(plans) == {"reference.training", f"{method}.reward.training"}
