"""On-policy training and judges read nothing back from the device in their passes.

Every such copy makes the host wait for all that it has asked of a GPU. Here the device is torch's meta device: tensors
on it have no numbers, so whatever needs one of them on the host (`item`, `tolist`, a copy) raises.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from on_policy import LikedCount, LocalGenerator, make_job
from tiny import BOS, EOS, FIRST_LETTER, save_tiny_policy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prefarena.config import GRPOTraining, OnPolicyTraining, PPOTraining, RLOOTraining
from prefarena.evaluation.sampled import response_logps
from prefarena.judges.models import RewardModelJudge
from prefarena.modeling import packing
from prefarena.modeling.load import load_policy, new_reward_model
from prefarena.modeling.logprobs import PackedModel
from prefarena.modeling.tree_attention import plan_trees
from prefarena.records import Rollout
from prefarena.training.experience import Experience
from prefarena.training.learner import Pass
from prefarena.training.on_policy import OnPolicyTrainer, Phases
from prefarena.training.on_policy_batch import Batch, learnable
from prefarena.training.rollouts import minibatches
from prefarena.training.worker import Worker

NUM = 12
SIZES = {"num_iterations": 1, "rollouts_per_iteration": NUM, "num_minibatches": 2, "micro_batch_size": 2}
METHODS: dict[str, OnPolicyTraining] = {
    "ppo": PPOTraining(**SIZES),
    "grpo": GRPOTraining(**SIZES, group_size=4, loss_mean="sequences", kl_in="loss"),
    "rloo": RLOOTraining(**SIZES, group_size=4),
}
PROMPTS = [[BOS, *[FIRST_LETTER + i % 9] * (1 + i % 4)] for i in range(NUM)]
RESPONSES = [[*[FIRST_LETTER + i % 7] * (1 + i % 5), EOS] for i in range(NUM)]
ROLLOUTS = [Rollout(x, y, [-1.0] * len(y), True, "0") for x, y in zip(PROMPTS, RESPONSES, strict=True)]


#: What makes the host wait on a GPU for how many numbers there are, and is let through on the meta device.
WAITS = ("nonzero", "masked_select", "masked_scatter_backward", "_local_scalar_dense", "unique", "_unique2")


class CopiesToHost(TorchDispatchMode):
    """Counts copies from the meta device to the host, and gives zeros for them; refuses what waits in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and to is not None and args[0].is_meta and to.type == "cpu":
            self.number += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func.overloadpacket.__name__ in WAITS and args[0].is_meta:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def beside_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees that a CPU attends to are laid out on the host, and no GPU has them; and transformers itself asks of padded
    rows, once a pass, whether they hold several sequences.
    """

    def on_device(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, tuple):
            return tuple(map(on_device, value))
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field.name: on_device(getattr(value, field.name)) for field in fields(value)})
        return value

    monkeypatch.setattr(packing, "plan_trees", lambda *args: on_device(plan_trees(*args)))
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None)


def on_meta(folder: Path, method: str, packed: bool) -> OnPolicyTrainer:
    policy = save_tiny_policy(folder / "policy")
    job = make_job(folder, policy, METHODS[method])
    trainer = OnPolicyTrainer(job, Worker(job.stage_dir, "meta"), LocalGenerator(policy), reward=LikedCount())
    for module in trainer.models.held():
        assert isinstance(module, PackedModel)
        module.packed = packed
    return trainer


def batch_of(experience: Experience, training: OnPolicyTraining) -> Batch:
    """What is learnt from. PPO whitens over the whole batch, once an iteration; any numbers do for its passes."""
    if not isinstance(training, PPOTraining):
        return learnable(experience, training, kl_coef=0.1).batch
    logps, values = experience.old_logps, experience.values
    mask = experience.sequences.response_mask
    return Batch(
        sequences=experience.sequences, mask=mask, old_logps=logps, advantages=logps, weights=logps, values=values,
        returns=values,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_scoring_and_updates_leave_the_device_alone(tmp_path: Path, method: str, packed: bool) -> None:
    trainer, num_parts = on_meta(tmp_path, method, packed), 0
    with CopiesToHost() as copies:
        experience = trainer.scorers.experience(ROLLOUTS, [0] * NUM, Phases())
        assert experience.old_logps.is_meta and experience.reference_logps.is_meta
        batch = batch_of(experience, METHODS[method])
        for rows in minibatches(NUM, 2, 0, 0, 0):
            parts, scale = trainer.parts(batch, rows), 1 / trainer.count(batch, rows)
            for learner, term in trainer.terms(kl_coef=0.1):
                outputs = learner.accumulate(Pass(partial(term, part), scale) for part in parts)
                norm = nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
                assert norm.is_meta and all(mean.total.is_meta for out in outputs for mean in out.metrics.values())
                num_parts += len(parts)
    assert num_parts == (12 if method == "ppo" else 6) and copies.number == 0


def test_a_judge_and_an_evaluation_copy_once_to_the_host(tmp_path: Path) -> None:
    policy = save_tiny_policy(tmp_path / "policy")
    classifier, model = new_reward_model(policy, 0), load_policy(policy)
    for one in (classifier, model):
        nn.Module.to(one, "meta")
    judge = RewardModelJudge.of(classifier, batch_size=2)
    for compute in (judge.score, lambda prompts, responses: response_logps(model, prompts, responses, 0, 2)):
        with CopiesToHost() as copies:
            found = compute(PROMPTS, RESPONSES)
        assert isinstance(found, np.ndarray) and found.shape == (NUM,)
        assert copies.number == 1
