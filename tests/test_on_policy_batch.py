"""What the on-policy methods learn from, against arithmetic on rollouts that fit on a page."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefarena.config import GRPOTraining, OnPolicyTraining, PPOTraining, RLOOTraining
from prefarena.modeling.logprobs import collate
from prefarena.training.experience import Experience
from prefarena.training.on_policy_batch import experience_metrics, learnable

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


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_learnt_from_a_rollout_without_a_score(method: str) -> None:
    """The others learn what they would without it, and its group's mean is of those that have a score."""
    settings = METHODS[method].model_copy(update={"group_size": 3} if method != "ppo" else {})
    scores, ended = [2.0, 0.0, -1.0, 3.0, 0.0, 0.0], [True] * 6
    silent = torch.tensor([0.0, 1, 0, 0, 1, 1])
    whole = replace(judged(scores, ended), silent=silent)
    targets = learnable(whole, settings, kl_coef=0.3)
    assert not targets.batch.mask[silent > 0].any() and not targets.batch.advantages[silent > 0].any()
    assert torch.isfinite(targets.batch.advantages).all()
    row = experience_metrics(whole, targets, None)
    assert row["reward/num_silent"] == 3 and row["reward/mean"] == pytest.approx(4 / 3)
    assert all(math.isfinite(value) for value in row.values()) and row["response_length"] == 2
    if method == "ppo":
        kept = [0, 2, 3]
        alone = learnable(judged([scores[place] for place in kept], [True] * 3), settings, kl_coef=0.3)
    else:
        kept = [0, 2]
        pair = METHODS[method].model_copy(update={"group_size": 2})
        alone = learnable(judged([scores[place] for place in kept], [True] * 2), pair, kl_coef=0.3)
        assert not targets.batch.advantages[3].any()  # alone in its group
    torch.testing.assert_close(targets.batch.advantages[kept], alone.batch.advantages)
    torch.testing.assert_close(targets.batch.weights[kept], alone.batch.weights)


def test_a_score_that_is_not_a_number_is_no_silence() -> None:
    """Of a judge that may not be silent it is a fault, which the guard of the optimizer's steps must see."""
    for settings in METHODS.values():
        targets = learnable(judged([2.0, math.nan, 1.0, 0.0], [True] * 4), settings, kl_coef=0.0)
        assert targets.batch.advantages.isnan().any()
