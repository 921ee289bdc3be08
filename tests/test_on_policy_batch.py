"""What the on-policy methods learn from, against arithmetic on rollouts that fit on a page."""

from __future__ import annotations

import pytest
import torch

from prefarena.config import GRPOTraining, OnPolicyTraining, PPOTraining, RLOOTraining
from prefarena.modeling.logprobs import collate
from prefarena.training.experience import Experience
from prefarena.training.on_policy_batch import learnable

SIZES = {"rollouts_per_iteration": 4, "group_size": 2}
METHODS: dict[str, OnPolicyTraining] = {
    "ppo": PPOTraining(rollouts_per_iteration=4),
    "grpo": GRPOTraining(**SIZES),
    "rloo": RLOOTraining(**SIZES),
}


def judged(scores: list[float], finished: list[bool]) -> Experience:
    """One prompt token and two response tokens a row; policy, reference and generator agree."""
    sequences = collate([[1]] * len(scores), [[3, 4]] * len(scores), 0)
    logps = torch.full((len(scores), 2), -1.0)
    return Experience(
        sequences=sequences,
        generator_logps=logps,
        old_logps=logps,
        reference_logps=logps,
        entropy=torch.ones_like(logps),
        scores=torch.tensor(scores),
        finished=torch.tensor(finished).float(),
        staleness=torch.zeros(len(scores)),
        values=torch.zeros_like(logps),
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_response_cut_off_without_eos_is_worth_less_by_the_penalty(method: str) -> None:
    settings = METHODS[method].model_copy(update={"missing_eos_penalty": 0.75})
    targets = learnable(judged([2.0, 2.0, -1.0, -1.0], [True, False, False, True]), settings, kl_coef=0.3)
    assert targets.rewards.tolist() == [2.0, 1.25, -1.75, -1.0]
    totals = targets.batch.advantages.sum(1)
    assert totals[0] > totals[1] and totals[3] > totals[2]  # what is cut off is learnt away from


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_clipped_on_both_sides(method: str) -> None:
    settings = METHODS[method].model_copy(update={"reward_clip": 1.5})
    targets = learnable(judged([7.0, 1.0, -1.0, -7.0], [True] * 4), settings, kl_coef=0.3)
    assert targets.rewards.tolist() == [1.5, 1.0, -1.0, -1.5]


def test_the_penalty_comes_after_the_clip_and_is_not_clipped_itself() -> None:
    settings = METHODS["rloo"].model_copy(update={"reward_clip": 1.5, "missing_eos_penalty": 1.0})
    targets = learnable(judged([7.0, 7.0, -7.0, -7.0], [True, False, True, False]), settings, kl_coef=0.0)
    assert targets.rewards.tolist() == [1.5, 0.5, -1.5, -2.5]
