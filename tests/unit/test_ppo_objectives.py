"""The on-policy objectives against values worked out by hand, garbage outside the mask and splits of a batch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator

import pytest
import torch

from prefarena.objectives.advantages import group_advantages
from prefarena.objectives.kl import KLController, k3
from prefarena.objectives.output import Mean, ObjectiveOutput, mean_of
from prefarena.objectives.ppo import (
    effective_sample_size,
    explained_variance,
    generalised_advantages,
    importance_weights,
    kl_loss,
    masked_moments,
    overlong_penalties,
    penalised_rewards,
    policy_loss,
    sequence_mean_weights,
    value_loss,
    whiten,
)

#: A prompt before, padding behind, a hole, a row without any token.
MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force_advantage(rewards: list[float], values: list[float], t: int, discount: float, lam: float) -> float:
    """GAE's definition: the sum of (discount * lambda)^l times the TD errors from t on."""
    following = [*values[1:], 0.0]
    deltas = [r + discount * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return sum((discount * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0)])
def test_advantages_equal_the_definition_on_ragged_rows(discount: float, lam: float) -> None:
    rewards, values = normal(5, 5, seed=0), normal(5, 5, seed=1)
    advantages, returns = generalised_advantages(rewards, values, MASK, discount=discount, gae_lambda=lam)
    for row in range(len(MASK)):
        inside = MASK[row].nonzero()[:, 0].tolist()
        row_rewards, row_values = rewards[row, inside].tolist(), values[row, inside].tolist()
        for place, t in enumerate(inside):
            expected = brute_force_advantage(row_rewards, row_values, place, discount, lam)
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + row_values[place], abs=1e-12)
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_advantages_by_hand() -> None:
    # Two tokens, values 0.5 and 1, score 2 at the end; gamma 1, lambda 0.95:
    # delta_2 = 2 - 1 = 1; delta_1 = 0 + 1 - 0.5 = 0.5; A_1 = 0.5 + 0.95 * 1 = 1.45.
    rewards, values = torch.tensor([[0.0, 2.0, 9.0]]), torch.tensor([[0.5, 1.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = generalised_advantages(rewards, values, mask, discount=1.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[1.45, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.95, 2.0, 0.0]]))


def test_a_hole_in_the_mask_is_skipped_over() -> None:
    # Discount 0.9, lambda 0.5; the middle token is not there. delta_3 = 4 - 1 = 3; delta_1 = 1 + 0.9 * 1 - 2 = -0.1;
    # A_1 = -0.1 + 0.45 * 3 = 1.25.
    rewards, values = torch.tensor([[1.0, math.nan, 4.0]]), torch.tensor([[2.0, math.nan, 1.0]])
    mask = torch.tensor([[True, False, True]])
    advantages, returns = generalised_advantages(rewards, values, mask, discount=0.9, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.25, 0.0, 3.0]]))
    torch.testing.assert_close(returns, torch.tensor([[3.25, 0.0, 4.0]]))


def test_rewards_hold_the_penalty_per_token_and_the_score_at_the_last() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    token_kl = torch.tensor([[7.0, 1.0, -2.0, 7.0], [3.0, 7.0, 7.0, 7.0]])
    rewards = penalised_rewards(torch.tensor([10.0, 20.0]), token_kl, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.5, 11.0, 0.0], [18.5, 0.0, 0.0, 0.0]]))


def test_penalised_rewards_of_a_row_sum_to_its_score_less_its_penalty() -> None:
    scores, token_kl = normal(5, seed=0), normal(5, 5, seed=1)
    rewards = penalised_rewards(scores, token_kl, MASK, kl_coef=0.3)
    for row in range(5):
        kl = sum(token_kl[row, t].item() for t in range(5) if MASK[row, t])
        expected = scores[row].item() - 0.3 * kl if MASK[row].any() else 0.0
        assert rewards[row].sum().item() == pytest.approx(expected, abs=1e-12)
    assert not rewards[~MASK].any()


def test_whitening_is_of_the_whole_batch_by_hand() -> None:
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5. By row they would be -1, 1, -1, 1.
    values = torch.tensor([[1.0, 3.0, math.nan], [math.inf, 5.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    mean, variance = masked_moments(values, mask)
    assert (mean.item(), variance.item()) == (4.0, 5.0)
    expected = torch.tensor([[-3.0, -1.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(whiten(values, mask, mean, variance), expected, rtol=1e-8, atol=0)


def test_equal_advantages_are_whitened_to_none_at_all() -> None:
    values, mask = torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool)
    white = whiten(values, mask, *masked_moments(values, mask))
    torch.testing.assert_close(white, torch.zeros(2, 3), rtol=0, atol=0)  # in float32, as the values are


def test_scores_of_another_type_leave_rewards_in_the_type_of_the_log_probs() -> None:
    scores, mask = torch.tensor([2.0], dtype=torch.float64), torch.tensor([[True, True]])
    rewards = penalised_rewards(scores, torch.tensor([[1.0, 3.0]]), mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, 0.5]]), rtol=0, atol=0)


def test_rewards_are_made_on_the_device_of_their_tokens() -> None:
    """The meta device stands for any that is not the processor: tensors of both do not mix."""
    scores, mask = torch.ones(2, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    rewards = penalised_rewards(scores, torch.ones(2, 3, device="meta"), mask, kl_coef=0.5)
    assert rewards.device.type == "meta" and rewards.shape == (2, 3)


# The gradient is with respect to the log-prob: -A * ratio where the ratio is free, 0 where clipping decides.
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clips"),
    [
        (2.0, 1.5, -2.4, 0.0, True),
        (2.0, 1.1, -2.2, -2.2, False),
        (2.0, 0.5, -1.0, -1.0, False),
        (-2.0, 1.5, 3.0, 3.0, False),
        (-2.0, 0.9, 1.8, 1.8, False),
        (-2.0, 0.5, 1.6, 0.0, True),
    ],
)
def test_policy_loss_by_hand(advantage: float, ratio: float, loss: float, gradient: float, clips: bool) -> None:
    old = torch.tensor([[-3.0]], dtype=torch.float64)
    logps = (old + math.log(ratio)).requires_grad_()
    inside = torch.tensor([[True]])
    output = policy_loss(logps, old, torch.full_like(old, advantage), inside, clip=0.2)
    assert output.loss.total.item() == pytest.approx(loss, abs=1e-12)
    assert output.metrics["policy/loss"].value.item() == pytest.approx(loss, abs=1e-12)
    assert output.metrics["policy/clip_fraction"].value.item() == clips
    assert output.metrics["policy/update_kl"].value.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12)
    (found,) = torch.autograd.grad(output.loss.total, logps)
    assert found.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(("ratio", "loss"), [(1.25, -2.5), (1.5, -2.6), (0.5, -1.0)])
def test_a_higher_clip_acts_on_ratios_above_one_alone(ratio: float, loss: float) -> None:
    old, inside = torch.tensor([[-3.0]], dtype=torch.float64), torch.tensor([[True]])
    good, logps = torch.full_like(old, 2.0), old + math.log(ratio)
    found = policy_loss(logps, old, good, inside, clip=0.2, clip_high=0.3).loss.total
    assert found.item() == pytest.approx(loss, abs=1e-12)
    bad = policy_loss(logps, old, -good, inside, clip=0.2, clip_high=0.3).loss.total
    assert bad.item() == pytest.approx(2 * max(ratio, 0.8), abs=1e-12)


def test_long_responses_are_punished_in_proportion() -> None:
    found = overlong_penalties(torch.tensor([1, 12, 14, 16, 20]), limit=20, tokens=8)
    assert found.tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]


def test_importance_weights_multiply_a_token_s_loss_and_get_no_gradient() -> None:
    # Ratios 1.5 and 0.5 with advantage 1: losses -1.2 and -0.5, times 2 and 3. k2 of log-ratios 1 and 2: 0.5 and 2.
    weights = torch.tensor([[2.0, 3.0]], requires_grad=True)
    inside = torch.ones(1, 2, dtype=torch.bool)
    logps = torch.tensor([[1.5, 0.5]]).log().requires_grad_()
    policy = policy_loss(logps, torch.zeros(1, 2), torch.ones(1, 2), inside, clip=0.2, weights=weights)
    assert policy.loss.total.item() == pytest.approx(-2.4 - 1.5)
    penalty = kl_loss(logps, logps.detach() - torch.tensor([[1.0, 2.0]]), inside, estimator="k2", weights=weights)
    assert penalty.loss.total.item() == pytest.approx(1.0 + 6.0)
    (gradient,) = torch.autograd.grad(policy.loss.total + penalty.loss.total, weights, allow_unused=True)
    assert gradient is None


def test_policy_loss_survives_a_ratio_beyond_exp() -> None:
    logps = torch.tensor([[500.0]], requires_grad=True)
    output = policy_loss(logps, torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.ones(1, 1, dtype=torch.bool), clip=0.2)
    assert output.loss.total.item() == pytest.approx(math.exp(20), rel=1e-5)


# The old value is 1 and the clip 0.2, so a value of 1.5 is held at 1.2 and one of 0.5 at 0.8; the larger error counts.
@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clips"),
    [
        (1.1, 3.0, 1.9**2 / 2, -1.9, False),
        (1.5, 3.0, 1.8**2 / 2, 0.0, True),
        (1.5, 1.4, 0.2**2 / 2, 0.0, True),
        (1.5, 1.25, 0.25**2 / 2, 0.25, False),
        (1.5, 0.0, 1.5**2 / 2, 1.5, False),
        (0.9, -1.0, 1.9**2 / 2, 1.9, False),
        (0.5, -1.0, 1.8**2 / 2, 0.0, True),
        (0.5, 3.0, 2.5**2 / 2, -2.5, False),
    ],
)
def test_value_loss_by_hand(value: float, target: float, loss: float, gradient: float, clips: bool) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.ones_like(values), torch.full_like(values, target)
    output = value_loss(values, old, returns, torch.tensor([[True]]), clip=0.2)
    assert output.loss.total.item() == pytest.approx(loss, abs=1e-12)
    assert output.metrics["value/loss"].value.item() == pytest.approx(loss, abs=1e-12)
    assert output.metrics["value/clip_fraction"].value.item() == clips
    (found,) = torch.autograd.grad(output.loss.total, values)
    assert found.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -math.exp(-20)), (-1.0, 0.8)])
def test_a_ratio_below_exp_is_held_at_the_limit(advantage: float, loss: float) -> None:
    """The clip at 0.8 counts where the advantage is negative."""
    logps = torch.full((1, 1), -500.0, dtype=torch.float64)
    inside, advantages = torch.ones(1, 1, dtype=torch.bool), torch.full_like(logps, advantage)
    output = policy_loss(logps, torch.zeros_like(logps), advantages, inside, clip=0.2)
    assert output.loss.total.item() == pytest.approx(loss, rel=1e-12)


def test_k3_and_importance_weights_are_held_where_exp_would_leave_its_range() -> None:
    logps = torch.tensor([-500.0, 0.0, 500.0], dtype=torch.float64)
    zeros = torch.zeros_like(logps)
    expected = [math.exp(20) - 21, 0.0, math.exp(-20) + 19]  # exp(x) - 1 - x of the reverse ratios 20, 0, -20
    assert k3(logps, zeros).tolist() == pytest.approx(expected, rel=1e-12)
    expected = [math.exp(-20), 1.0, math.exp(20)]
    assert importance_weights(logps, zeros, math.inf).tolist() == pytest.approx(expected, rel=1e-12)
    assert importance_weights(logps, zeros, 3.0).tolist() == pytest.approx([math.exp(-20), 1, 3], rel=1e-12)


def test_shares_of_clipped_tokens_are_of_all_tokens_inside() -> None:
    """Of four tokens, three policy ratios and one value are clipped; a fifth is outside."""
    inside = torch.tensor([[True, True, True, True, False]])
    ones = torch.ones(1, 5, dtype=torch.float64)
    ratios = torch.tensor([[1.5, 1.1, 2.0, 1.3, 9.0]], dtype=torch.float64)
    policy = policy_loss(ratios.log(), 0 * ones, ones, inside, clip=0.2)
    assert policy.metrics["policy/clip_fraction"].value.item() == 0.75
    assert set(policy.metrics) == {"policy/loss", "policy/clip_fraction", "policy/update_kl"}
    values = torch.tensor([[1.1, 1.5, 1.0, 0.9, 9.0]], dtype=torch.float64)
    value = value_loss(values, ones, 3 * ones, inside, clip=0.2)
    assert value.metrics["value/clip_fraction"].value.item() == 0.25
    assert set(value.metrics) == {"value/loss", "value/clip_fraction"}


def test_k3_of_a_small_update_is_exact_in_float32() -> None:
    log_ratios = normal(10_000, seed=0) * 1e-4
    found = k3(log_ratios.float(), torch.zeros(()))
    assert (found >= 0).all()
    torch.testing.assert_close(found.double().mean(), (log_ratios**2).mean() / 2, rtol=1e-3, atol=0)


def test_controller_moves_towards_its_target_by_the_stated_rule() -> None:
    # Target 2, horizon 1000, 100 rollouts per step. Errors 10 %, 20 % (of 900 %), -20 % (of -150 %), 0, -5 %.
    controller = KLController(coef=0.1, target=2.0, horizon=1000)
    found = []
    for observed in (2.2, 20.0, -1.0, 2.0, 1.9):
        controller = controller.update(observed, 100)
        found.append(controller.coef)
    factors = (1.01, 1.01 * 1.02, 1.01 * 1.02 * 0.98, 1.01 * 1.02 * 0.98, 1.01 * 1.02 * 0.98 * 0.995)
    assert found == pytest.approx([0.1 * factor for factor in factors], rel=1e-12)


def test_twenty_percent_is_where_the_controller_clips() -> None:
    controller = KLController(coef=1.0, target=10.0, horizon=1)
    found = [controller.update(kl, 1).coef for kl in (7.9, 8.0, 8.1, 11.9, 12.0, 12.1)]
    assert found == pytest.approx([0.8, 0.8, 0.81, 1.19, 1.2, 1.2], rel=1e-12)


def test_a_controller_without_a_target_stands_still() -> None:
    assert KLController(coef=0.1, target=None, horizon=1000).update(20.0, 100).coef == 0.1


def test_importance_weights_are_truncated_above_only() -> None:
    logps = torch.log(torch.tensor([[0.5, 0.5, 0.5]]))
    generator = torch.log(torch.tensor([[0.5, 0.1, 1.0]]))
    torch.testing.assert_close(importance_weights(logps, generator, 2.0), torch.tensor([[1.0, 2.0, 0.5]]))
    torch.testing.assert_close(importance_weights(logps, generator, None), torch.ones(1, 3))


def test_effective_sample_size_and_explained_variance_by_hand() -> None:
    assert effective_sample_size(torch.zeros(4)).item() == pytest.approx(1)
    # weights 3 and 1: (3 + 1)^2 / (2 * (9 + 1)) = 0.8
    assert effective_sample_size(torch.tensor([3.0, 1.0]).log()).item() == pytest.approx(0.8)
    returns = torch.tensor([[1.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1)
    # residuals 0 and 1 (variance 1/4) of returns 1 and 3 (variance 1)
    assert explained_variance(torch.tensor([[1.0, 2.0, 0.0]]), returns, mask).item() == pytest.approx(0.75)
    # residuals 0 and 2 (variance 1) of returns 1 and 5 (variance 4)
    returns = torch.tensor([[1.0, 5.0, 100.0]])
    assert explained_variance(torch.tensor([[1.0, 3.0, 0.0]]), returns, mask).item() == pytest.approx(0.75)
    # returns that do not vary have no variance to explain
    assert explained_variance(torch.tensor([[1.0, 2.0, 0.0]]), torch.ones(1, 3), mask).item() == 0
    assert explained_variance(torch.ones(1, 3), torch.ones(1, 3), mask).item() == 0


def test_group_advantages_by_hand() -> None:
    # 0, 0, 0, 4: mean 1, variance (1 + 1 + 1 + 9) / 4 = 3. 5, 5, 7, 7: mean 6, std 1.
    scores = torch.tensor([0.0, 0.0, 0.0, 4.0, 5.0, 5.0, 7.0, 7.0], dtype=torch.float64)
    centred = torch.tensor([-1.0, -1.0, -1.0, 3.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    deviations = torch.tensor([3**0.5] * 4 + [1.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(scores, 4, normalise_std=False), centred)
    torch.testing.assert_close(group_advantages(scores, 4, normalise_std=True), centred / (deviations + 1e-6))


@pytest.mark.parametrize("group_size", [2, 3, 5, 8, 16])
def test_equal_scores_have_no_advantage_at_all(group_size: int) -> None:
    scores = (normal(1000, seed=0) * 5).float().repeat_interleave(group_size)
    for normalise_std in (False, True):
        advantages = group_advantages(scores, group_size, normalise_std)
        assert advantages.dtype == torch.float32 and not advantages.any()


def test_both_parts_of_a_mean_have_the_type_of_its_values() -> None:
    found, expected = mean_of(normal(5, 5, seed=0), MASK), torch.tensor(12.0, dtype=torch.float64)
    torch.testing.assert_close(found.count, expected, rtol=0, atol=0)
    assert found.total.dtype == torch.float64


def test_sequence_mean_weights_turn_a_sum_over_tokens_into_one_of_means() -> None:
    values = normal(5, 5, seed=0)
    means = [values[row][MASK[row]].mean().item() for row in range(5) if MASK[row].any()]
    assert (values * sequence_mean_weights(MASK)).sum().item() == pytest.approx(sum(means), abs=1e-6)


#: What is differentiated comes first.
LOSSES: dict[str, Callable[[list[torch.Tensor], torch.Tensor], ObjectiveOutput]] = {
    "policy": lambda x, mask: policy_loss(x[0], x[1], x[2], mask, clip=0.2, weights=x[3]),
    "policy without weights": lambda x, mask: policy_loss(x[0], x[1], x[2], mask, clip=0.2),
    "value": lambda x, mask: value_loss(x[0], x[1], x[2], mask, clip=0.2),
    "k2": lambda x, mask: kl_loss(x[0], x[1], mask, estimator="k2", weights=x[3]),
    "k3": lambda x, mask: kl_loss(x[0], x[1], mask, estimator="k3", weights=x[3]),
    "k3 straight-through": lambda x, mask: kl_loss(x[0], x[1], mask, estimator="k3_straight_through"),
}


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("places", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_garbage_outside_the_mask_reaches_no_loss_metric_or_gradient(
    loss: str, places: tuple[int, ...], garbage: float
) -> None:
    clean = [0.5 * normal(5, 5, seed=seed) for seed in range(4)]
    dirty = [torch.where(MASK | (i not in places), tensor, garbage) for i, tensor in enumerate(clean)]
    found = []
    for inputs in (dirty, clean):
        inputs[0].requires_grad_()
        output = LOSSES[loss](inputs, MASK)
        (gradient,) = torch.autograd.grad(output.loss.total, inputs[0])
        means = [output.loss, *output.metrics.values()]
        found.append([gradient, *(mean.total.detach() for mean in means), *(mean.count for mean in means)])
    assert found[0][0][MASK].any()
    assert not found[0][0][~MASK].any()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_outside_the_mask_reaches_no_advantage(garbage: float) -> None:
    def results(outside: float) -> list[torch.Tensor]:
        token_kl, values = (torch.where(MASK, normal(5, 5, seed=seed), outside) for seed in (1, 2))
        scores = torch.where(MASK.any(1), normal(5, seed=0), outside)
        rewards = penalised_rewards(scores, token_kl, MASK, kl_coef=0.3)
        raw = torch.where(MASK, rewards, outside)
        advantages, returns = generalised_advantages(raw, values, MASK, discount=0.9, gae_lambda=0.8)
        dirty = torch.where(MASK, advantages, outside)
        white = whiten(dirty, MASK, *masked_moments(dirty, MASK))
        explained = explained_variance(values, torch.where(MASK, returns, outside), MASK)
        return [rewards, advantages, returns, white, explained, mean_of(values, MASK).value]

    found = results(garbage)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found, results(0.0), rtol=0, atol=0)


def test_garbage_inside_the_mask_is_not_hidden() -> None:
    for loss in LOSSES.values():
        for place in (0, 1):
            inputs = [normal(5, 5, seed=seed) for seed in range(4)]
            inputs[place][0, 1] = math.nan
            assert loss(inputs, MASK).loss.total.isnan()


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put rows into micro-batches."""
    if not rows:
        yield []
        return
    for partition in partitions(rows[1:]):
        yield [rows[:1], *partition]
        for i, part in enumerate(partition):
            yield [*partition[:i], [rows[0], *part], *partition[i + 1 :]]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_split_into_micro_batches_has_the_same_loss_metrics_and_gradient(loss: str) -> None:
    inputs = [0.5 * normal(5, 5, seed=seed) for seed in range(4)]
    inputs[0].requires_grad_()
    ends = (MASK * torch.arange(1, 6)).amax(1)

    def means(part: list[int]) -> list[Mean]:
        """Loss and metrics of a micro-batch that is no wider than its longest row."""
        width = int(ends[part].amax())
        output = LOSSES[loss]([tensor[part, :width] for tensor in inputs], MASK[part, :width])
        return [output.loss, *output.metrics.values()]

    def step(parts: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        sums = [functools.reduce(operator.add, column) for column in zip(*map(means, parts), strict=True)]
        return [mean.value for mean in sums], torch.autograd.grad(sums[0].value, inputs[0])[0]

    whole, splits = step([list(range(5))]), list(partitions(list(range(5))))
    assert len(splits) == 52
    for split in splits:
        torch.testing.assert_close(step(split), whole, rtol=0, atol=1e-12)
    mean_of_means = torch.stack([means([row])[0].value for row in range(5)]).mean()
    assert (mean_of_means - whole[0][0]).abs() > 1e-3
