"""Policy, reference, critic and reward model on one copy of the weights: each computes what it would on its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from off_policy import off_policy_job, write_inputs
from on_policy import make_job
from torch import nn

from prefarena.config import DPO, LoRA, Optimisation, PPOTraining, RewardModel
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.heads import ValueHead, token_values
from prefarena.modeling.load import load_policy, load_reward_model
from prefarena.modeling.logprobs import LogProbs, Sequences, token_logps
from prefarena.training.jobs import OnPolicyJob, RewardModelJob
from prefarena.training.on_policy_models import OnPolicyModels, load_models
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

PROMPTS, RESPONSES = [[1, 3, 4], [1, 5, 6]], [[5, 6, 2], [7, 2]]


def reward_model(folder: Path, inputs: Path, lora: LoRA | None) -> str:
    """A reward model that was trained from the policy at `inputs`, in full or as adapters of it."""
    training = Optimisation(num_steps=8, batch_size=16, lora=lora, learning_rate=3e-3)
    run_job(
        RewardModelJob(
            stage_dir=str(folder), name="rm", policy=str(inputs / "model"), seed=0,
            settings=RewardModel(training=training), pairs=str(inputs / "pairs"), test_pairs=str(inputs / "pairs"),
            samples=str(inputs / "demonstrations"),
        ),
        Worker(str(folder)),
    )  # fmt: skip
    return str(folder / "model")


def models_of(folder: Path, lora: LoRA | None) -> tuple[OnPolicyModels, OnPolicyJob]:
    """Of a PPO job with adapters, whose reward model was trained with `lora`."""
    inputs = write_inputs(folder / "inputs")
    policy = str(inputs / "model")
    reward = reward_model(folder / "rm", inputs, lora)
    job = make_job(folder, policy, PPOTraining(lora=LoRA(rank=4)))
    job = replace(job, reward=JudgeSpec(RewardModel(), reward, policy), critic=reward)
    return load_models(job, Worker(job.stage_dir)), job


def disturb(models: OnPolicyModels, name: str) -> None:
    """As if the policy or the critic had learnt something."""
    role = models.learned[name]
    with torch.no_grad():
        for parameter in role.trained().values():  # type: ignore[operator]
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)


def test_a_reward_model_of_adapters_scores_as_its_merged_copy_does(tmp_path: Path) -> None:
    models, job = models_of(tmp_path, LoRA(rank=4))
    disturb(models, "policy")
    assert models.reward is not None
    found = RewardModelJudge.of(models.reward).score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(found, RewardModelJudge(str(job.reward.path)).score(PROMPTS, RESPONSES), atol=1e-5)
    assert abs(found[0] - found[1]) > 1e-2


def test_the_critic_starts_from_a_reward_model_of_adapters(tmp_path: Path) -> None:
    models, job = models_of(tmp_path, LoRA(rank=4))
    disturb(models, "policy")
    sequences = Sequences.of(PROMPTS, RESPONSES, torch.device("cpu"))
    assert models.critic is not None
    expected = token_values(ValueHead(load_reward_model(str(job.critic))), sequences)
    torch.testing.assert_close(token_values(models.critic, sequences), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1e-2
    reward = RewardModelJudge.of(models.reward).score(PROMPTS, RESPONSES) if models.reward else None
    disturb(models, "critic")
    assert (token_values(models.critic, sequences) - expected).abs().max() > 1e-2
    np.testing.assert_array_equal(RewardModelJudge.of(models.reward).score(PROMPTS, RESPONSES), reward)  # type: ignore[arg-type]


def test_the_reference_stays_what_it_was_bit_for_bit(tmp_path: Path) -> None:
    models, job = models_of(tmp_path, LoRA(rank=4))
    sequences = Sequences.of(PROMPTS, RESPONSES, torch.device("cpu"))
    expected = token_logps(LogProbs(load_policy(job.policy)), sequences)
    assert torch.equal(token_logps(models.policy, sequences), expected)  # adapters add nothing at first
    disturb(models, "policy")
    disturb(models, "critic")
    assert torch.equal(token_logps(models.reference, sequences), expected)
    assert (token_logps(models.policy, sequences) - expected).abs().max() > 1e-2


def test_a_reward_model_trained_in_full_is_a_model_of_its_own(tmp_path: Path) -> None:
    models, _ = models_of(tmp_path, None)
    assert models.reward is None and models.critic is not None
    sequences = Sequences.of(PROMPTS, RESPONSES, torch.device("cpu"))
    assert token_values(models.critic, sequences).abs().max() == 0


def test_roles_hold_the_weights_once_and_train_adapters_alone(tmp_path: Path) -> None:
    models, job = models_of(tmp_path, LoRA(rank=4))
    assert models.body is not None
    whole = sum(one.numel() for one in load_policy(job.policy).parameters())
    adapters = sum(one.numel() for name, one in models.body.named_parameters() if "lora_" in name)
    heads = sum(one.numel() for name, one in models.body.named_parameters() if "score" in name)
    assert sum(one.numel() for one in models.body.parameters()) == whole + adapters + heads
    trained = {name for name, one in models.body.named_parameters() if one.requires_grad}
    assert trained and all(".policy." in name or ".critic." in name or "critic.model.score" in name for name in trained)
    assert not set(map(id, models.policy.trained().values())) & set(map(id, models.critic.trained().values()))  # type: ignore


def test_a_policy_that_cannot_be_shared_is_refused_with_a_sentence(tmp_path: Path) -> None:
    from prefarena.errors import UserError
    from prefarena.modeling.load import reward_model_on

    inputs = write_inputs(tmp_path / "inputs")
    policy = load_policy(inputs / "model")
    policy.model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="cannot share the body"):
        reward_model_on(policy, inputs / "model")


def test_the_adapters_of_an_off_policy_method_are_no_reward(tmp_path: Path) -> None:
    """A stage's adapters are used only where they belong to the model that the job starts from."""
    from prefarena.modeling.lora import adapter_of

    inputs = write_inputs(tmp_path / "inputs")
    training = Optimisation(num_steps=2, batch_size=16, lora=LoRA(rank=4))
    job = off_policy_job(inputs, tmp_path / "dpo", DPO(training=training))
    run_job(job, Worker(job.stage_dir))
    assert adapter_of(job.model_dir, job.policy) is not None
    assert adapter_of(job.model_dir, str(tmp_path / "another")) is None
