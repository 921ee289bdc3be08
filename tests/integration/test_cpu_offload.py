"""Parts of a sharded model in the host's memory: FSDP2's offloading, on a mesh of one worker whose device is the CPU.

Copies between a GPU and its host are none here; everything else is what runs on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights, write_inputs
from on_policy import LikedCount, LocalGenerator, make_job
from tiny import save_tiny_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig
from workers import DyingWorker, KilledError, OneOfMany

from pipelines.memory import refuse_what_cannot_fit
from prefarena.cluster.doctor import judge_host
from prefarena.cluster.needs import Heaviest, Lengths, heaviest_training, trainings
from prefarena.cluster.probe import NodeReport
from prefarena.config import DPO, Comparison, LoRA, Optimisation, PPOTraining, parse_config
from prefarena.errors import UserError
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.memory import Spread, on_shapes, sum_of_pass, training_memory
from prefarena.training.learner import Learner
from prefarena.training.on_policy import OnPolicyTrainer
from prefarena.training.run_job import run_job
from prefarena.training.sharding import clip_parts
from prefarena.training.worker import Worker

GIB = 2**30
SETTINGS = LlamaConfig(num_hidden_layers=4, hidden_size=256, intermediate_size=512, vocab_size=512)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, as Ray Train makes one for a single worker."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Dies(DyingWorker):
    dies_at = 7


def offloading(folder: str | Path, kind: type[OneOfMany] = OneOfMany) -> OneOfMany:
    return kind(str(folder), sharding="fsdp", offloads=True)


def dpo(**changed: Any) -> DPO:
    settings = {"num_steps": 10, "batch_size": 16, "micro_batch_tokens": 64, "log_every": 1, "checkpoint_every": 5}
    return DPO(training=Optimisation(**{**settings, "learning_rate": 3e-3, **changed}))


@pytest.mark.parametrize(
    "changed",
    [{}, {"lora": LoRA(rank=4)}, {"precision": "bfloat16", "activation_checkpointing": True}],
    ids=["full", "adapters", "bfloat16, recomputed"],
)
def test_a_run_is_that_of_a_worker_that_offloads_nothing(inputs: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    """Killed at a step and gone on with, too; one worker alone is enough to offload."""
    rows, models = [], []
    for name, worker in (("plain", Worker), ("offloaded", offloading)):
        job = off_policy_job(inputs, tmp_path / name, dpo(**changed))
        if name == "offloaded":
            with pytest.raises(KilledError):
                run_job(job, offloading(job.stage_dir, Dies))
        run_job(job, worker(job.stage_dir))
        rows.append(metric_rows(tmp_path / name))
        models.append(weights(tmp_path / name))
    for key in ("loss", "grad_norm"):
        found, expected = ([row[key] for row in one] for one in reversed(rows))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=key)
    assert models[0].keys() == models[1].keys() and len(rows[1]) == 10
    for key, weight in models[0].items():
        torch.testing.assert_close(models[1][key], weight, rtol=0, atol=1e-5)


def test_an_iteration_of_ppo_is_that_of_a_worker_that_offloads_nothing(tmp_path: Path) -> None:
    """Policy, critic and reference are parts on the host; what the generators get is whole."""
    policy, rows = save_tiny_policy(tmp_path / "policy"), []
    for name, worker in (("plain", Worker), ("offloaded", offloading)):
        job = make_job(tmp_path / name, policy, PPOTraining(num_iterations=2, rollouts_per_iteration=16))
        generator = LocalGenerator(job.policy)
        trainer = OnPolicyTrainer(job, worker(job.stage_dir), generator, LikedCount())
        rows.append([trainer.run(iteration) for iteration in range(2)])
        if name == "offloaded":
            modules = [learner.module for learner in trainer.learners.values()]
            assert all(isinstance(one, FSDPModule) for one in [*modules, trainer.models.reference])
            assert all(isinstance(one, DTensor) for module in modules for one in module.parameters())
        assert generator.num_syncs == 2
    for found, expected in zip(rows[1], rows[0], strict=True):
        measured = [key for key in expected if not key.startswith("time/") and key != "tokens_per_second"]
        assert {"loss/policy", "kl/k1", "policy/grad_norm"} & {*measured}
        for key in measured:
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_gradients_on_the_host_are_clipped_as_others_are(tmp_path: Path) -> None:
    """Norms of several workers add up on their devices; a worker without rows of anything has part in it."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    layer(torch.randn(4, 5)).square().sum().backward()
    gradients = [one.grad.clone() for one in layer.parameters() if one.grad is not None]
    expected = nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
    clipped = [one.grad.clone() for one in layer.parameters() if one.grad is not None]
    for one, gradient in zip(layer.parameters(), gradients, strict=True):
        one.grad = gradient.clone()
    norm = clip_parts(layer.parameters(), 0.5, lambda square: square)
    torch.testing.assert_close(norm, expected)
    for one, gradient in zip(layer.parameters(), clipped, strict=True):
        torch.testing.assert_close(one.grad, gradient)
    asked: list[float] = []

    def of_two(square: Tensor) -> Tensor:
        asked.append(float(square))
        return square + 9.0

    before = [float(one.grad.norm()) for one in layer.parameters() if one.grad is not None]
    norm = clip_parts(layer.parameters(), 1.0, of_two)
    assert float(norm) == pytest.approx((sum(size**2 for size in before) + 9) ** 0.5)
    assert asked[0] == pytest.approx(sum(size**2 for size in before))
    assert float(clip_parts([], 1.0, of_two)) == 3.0


def test_a_step_that_is_no_number_is_left_out_on_the_host_too(inputs: Path, tmp_path: Path) -> None:
    worker = offloading(tmp_path)
    layer = nn.Linear(2, 1)
    learner = Learner("model", layer, dpo().training, worker)
    before = learner.tensors()
    for one in layer.parameters():
        one.grad = torch.full_like(one, torch.nan)
    _, skipped = learner.apply(0.1)
    assert bool(skipped) and learner.guard.num_skipped == 1
    after = learner.tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)


# -------------------------------------------------------------------------------------------- memory


def comparison(num_workers: int = 1, **resources: Any) -> Comparison:
    resources = {"use_gpu": True, "sharding": "fsdp", "num_workers": num_workers, **resources}
    return parse_config({"entries": [{"name": "dpo", "method": {"kind": "dpo"}}], "resources": resources})


def test_what_is_offloaded_is_counted_on_the_host_and_not_on_the_device() -> None:
    module = on_shapes(lambda: LogProbs(AutoModelForCausalLM.from_config(SETTINGS, dtype=torch.float32).eval()))
    size = 4 * sum(one.numel() for one in module.parameters())

    def loss(one: nn.Module) -> Tensor:
        return sum_of_pass(one, 8, [8], 2)

    spread, offloaded = (training_memory(module, [loss], spread=Spread(2, on_host)) for on_host in (False, True))
    assert spread is not None and offloaded is not None and spread.host == 0
    assert offloaded.gradients == offloaded.optimizer == 0 and offloaded.activations == spread.activations
    assert offloaded.host == pytest.approx(4 * size // 2, abs=1000)  # weights, gradients and two moments
    assert offloaded.total + offloaded.host == spread.total
    tree: dict[str, Any] = {"reference": {"train": False}}
    tree |= {"entries": [{"name": "ppo", "method": {"kind": "rlhf", "reward": {"kind": "gold"}}}]}
    needs = [
        heaviest_training(parse_config({**comparison(2, cpu_offload=on).model_dump(mode="json"), **tree}),
                          SETTINGS, Lengths(8, 8))
        for on in (False, True)
    ]  # fmt: skip
    assert needs[0] is not None and needs[1] is not None
    # Policy and critic with all of theirs, and the reference; the critic has no head over the vocabulary.
    assert 0.8 < needs[1].host / ((4 + 4 + 1) * size / 2) < 1
    assert needs[1].memory + needs[1].host == needs[0].memory


def test_the_doctor_looks_at_the_memory_of_each_node_for_all_its_workers() -> None:
    config = comparison(2, cpu_offload=True)
    memory = Heaviest(GIB, "x", host=16 * GIB)
    one = NodeReport("a", {}, None, [("H100", 80 * GIB)], True, GIB, 32 * 1024.0)
    two = replace(one, gpus=[("H100", 80 * GIB)] * 2)
    (fits,), (fails,) = (judge_host(config, [report], memory) for report in (one, two))
    assert fits.problem is False and "up to 1 training workers" in fits.text
    assert fails.problem is True and "resources.cpu_offload" in fails.text and "more memory" in fails.text
    assert judge_host(config, [two], Heaviest(GIB, "x")) == []
    (training,) = [found for found in trainings(config) if found.where.startswith("entries.dpo")]
    small = replace(one, memory_mib=1.0)
    with pytest.raises(UserError, match=r"keeps .* in its host's memory \(resources.cpu_offload\)"):
        refuse_what_cannot_fit(config, training, SETTINGS, [small])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"use_gpu": False}, "without resources.use_gpu: true everything is there already"),
        ({"sharding": "none"}, "applies to what resources.sharding: fsdp cuts into parts"),
    ],
)
def test_offloading_where_it_makes_no_sense_is_one_sentence(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        comparison(**{"cpu_offload": True, **changed})
