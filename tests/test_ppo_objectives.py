"""PPO's pure functions against hand-computed values, brute force and invariances."""

from __future__ import annotations

import math

import pytest
import torch

from prefarena.objectives.kl import KLController, k1, k3
from prefarena.objectives.ppo import (
    effective_sample_size,
    explained_variance,
    generalised_advantages,
    importance_weights,
    masked_moments,
    penalised_rewards,
    policy_loss,
    value_loss,
    whiten,
)


def ragged(num_rows: int = 5, width: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rewards and values with garbage in the padding, and a mask of responses that start and end anywhere."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, num_rows, width, generator=generator, dtype=torch.float64).unbind()
    mask = torch.zeros(num_rows, width, dtype=torch.bool)
    for row in range(num_rows):
        start = row % 3
        mask[row, start : start + 1 + row % (width - 3)] = True
    return rewards, values, mask


def brute_force_advantage(rewards: list[float], values: list[float], t: int, discount: float, lam: float) -> float:
    """GAE's definition: the sum of (discount * lambda)^l times the TD errors from t on."""
    following = [*values[1:], 0.0]
    deltas = [r + discount * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return sum((discount * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0)])
def test_advantages_equal_the_definition_on_ragged_rows(discount: float, lam: float) -> None:
    rewards, values, mask = ragged()
    advantages, returns = generalised_advantages(rewards, values, mask, discount=discount, gae_lambda=lam)
    for row in range(len(mask)):
        inside = mask[row].nonzero()[:, 0].tolist()
        row_rewards, row_values = rewards[row, inside].tolist(), values[row, inside].tolist()
        for place, t in enumerate(inside):
            expected = brute_force_advantage(row_rewards, row_values, place, discount, lam)
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + row_values[place], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_advantages_by_hand() -> None:
    # Two tokens, values 0.5 and 1, score 2 at the end; gamma 1, lambda 0.95:
    # delta_2 = 2 - 1 = 1; delta_1 = 0 + 1 - 0.5 = 0.5; A_1 = 0.5 + 0.95 * 1 = 1.45.
    rewards, values = torch.tensor([[0.0, 2.0, 9.0]]), torch.tensor([[0.5, 1.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = generalised_advantages(rewards, values, mask, discount=1.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[1.45, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.95, 2.0, 0.0]]))


def test_a_hole_in_the_mask_is_skipped_over() -> None:
    rewards, values = (tensor[:, :3] for tensor in ragged(1)[:2])
    hole = torch.tensor([[True, False, True]])
    with_hole, _ = generalised_advantages(rewards, values, hole, discount=0.9, gae_lambda=0.8)
    dense, _ = generalised_advantages(
        rewards[:, ::2], values[:, ::2], torch.ones(1, 2, dtype=torch.bool), discount=0.9, gae_lambda=0.8
    )
    torch.testing.assert_close(with_hole[:, ::2], dense)


def test_rewards_hold_the_penalty_per_token_and_the_score_at_the_last() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    token_kl = torch.tensor([[7.0, 1.0, -2.0, 7.0], [3.0, 7.0, 7.0, 7.0]])
    rewards = penalised_rewards(torch.tensor([10.0, 20.0]), token_kl, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.5, 11.0, 0.0], [18.5, 0.0, 0.0, 0.0]]))


def test_whitening_is_of_the_whole_batch_and_blind_to_padding() -> None:
    values, _, mask = ragged()
    white = whiten(values, mask, *masked_moments(values, mask))
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    garbage = torch.where(mask, values, 1e6)
    torch.testing.assert_close(whiten(garbage, mask, *masked_moments(garbage, mask)), white)


def test_policy_loss_by_hand() -> None:
    # Ratios 1.5, 0.5, 1.5, 0.5 with advantages 1, 1, -1, -1 and clip 0.2:
    # min(1.5, 1.2), min(0.5, 0.8), min(-1.5, -1.2), min(-0.5, -0.8) = 1.2, 0.5, -1.5, -0.8; the first and last clip.
    logps = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    output = policy_loss(logps, torch.zeros(1, 4), advantages, mask, clip=0.2)
    assert output.loss.total.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8), abs=1e-6)
    assert output.loss.count.item() == 4
    assert output.metrics["policy/clip_fraction"].value.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(output.loss.total, logps)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.5, 1.5, 0.0]]))


def test_policy_loss_survives_a_ratio_beyond_exp() -> None:
    logps = torch.tensor([[500.0]], requires_grad=True)
    output = policy_loss(logps, torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.ones(1, 1, dtype=torch.bool), clip=0.2)
    assert output.loss.total.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_value_loss_by_hand() -> None:
    # v = 1, old 0, R = 2, clip 0.2: free (1-2)^2 = 1, clipped (0.2-2)^2 = 3.24 -> half of it, without a gradient.
    # v = 0.1, old 0, R = 0: not clipped, 0.01 / 2.
    values = torch.tensor([[1.0, 0.1, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    output = value_loss(values, torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]]), mask, clip=0.2)
    assert output.loss.total.item() == pytest.approx(1.62 + 0.005, abs=1e-6)
    assert output.metrics["value/clip_fraction"].value.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(output.loss.total, values)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.1, 0.0]]))


@pytest.mark.parametrize("parts", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_any_split_into_micro_batches_gives_the_same_gradient(parts: list[int]) -> None:
    advantages, old, mask = ragged()
    weights = importance_weights(old, old + 0.3 * advantages, 2.0)
    logps = (old + 0.4 * torch.sin(advantages * 3)).requires_grad_()

    def gradient(sizes: list[int]) -> torch.Tensor:
        outputs = [
            policy_loss(new, before, gain, inside, clip=0.2, weights=weight)
            for new, before, gain, inside, weight in zip(
                *(tensor.split(sizes) for tensor in (logps, old, advantages, mask, weights)), strict=True
            )
        ]
        count = torch.stack([output.loss.count for output in outputs]).sum()
        total = torch.stack([output.loss.total for output in outputs]).sum()
        return torch.autograd.grad(total / count, logps)[0]

    torch.testing.assert_close(gradient(parts), gradient([5]), rtol=0, atol=1e-12)


def test_k1_and_k3_estimate_the_exact_divergence() -> None:
    policy, reference = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(
        -1
    )
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)
    assert (k3(policy, reference) >= 0).all() and (k1(policy, reference) < 0).any()


def test_controller_moves_towards_its_target_by_the_stated_rule() -> None:
    controller = KLController(coef=0.1, target=2.0, horizon=1000)
    assert controller.update(2.2, 100).coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert controller.update(20.0, 100).coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert controller.update(-1.0, 100).coef == pytest.approx(0.1 * (1 - 0.2 * 0.1))
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
