"""The on-policy objectives against enumeration: every action, every group and every sequence with its probability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefarena.objectives.advantages import group_advantages, leave_one_out_advantages
from prefarena.objectives.kl import k1, k2, k3, k3_straight_through
from prefarena.objectives.ppo import (
    generalised_advantages,
    importance_weights,
    kl_loss,
    penalised_rewards,
    policy_loss,
)

Estimator = Callable[[Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=tolerance)


class TestOneAction:
    """A categorical policy over six actions and its reference."""

    logits = normal(6, seed=0)
    reference = normal(6, seed=1).log_softmax(0)

    def policy(self) -> tuple[Tensor, Tensor]:
        logits = self.logits.clone().requires_grad_()
        return logits, logits.log_softmax(0)

    def divergence(self) -> tuple[Tensor, Tensor]:
        """KL(policy || reference) and its gradient."""
        logits, logps = self.policy()
        exact = (logps.exp() * (logps - self.reference)).sum()
        return exact.detach(), torch.autograd.grad(exact, logits)[0]

    def expected(self, estimator: Estimator) -> tuple[Tensor, Tensor]:
        """An estimator's mean over the policy's samples, and the gradient of that mean with the samples held fixed."""
        logits, logps = self.policy()
        mean = (logps.exp().detach() * estimator(logps, self.reference)).sum()
        return mean.detach(), torch.autograd.grad(mean, logits)[0]

    @pytest.mark.parametrize("estimator", [k1, k3, k3_straight_through])
    def test_unbiased_estimators_have_the_exact_divergence_as_mean(self, estimator: Estimator) -> None:
        assert close(self.expected(estimator)[0], self.divergence()[0])

    def test_k1_can_be_negative_and_k3_cannot(self) -> None:
        logps = self.policy()[1]
        assert (k1(logps, self.reference) < 0).any() and (k3(logps, self.reference) >= 0).all()

    def test_k2_is_biased(self) -> None:
        assert not close(self.expected(k2)[0], self.divergence()[0], 0.01)

    @pytest.mark.parametrize("estimator", [k2, k3_straight_through])
    def test_k2_and_the_straight_through_k3_have_the_gradient_of_the_divergence(self, estimator: Estimator) -> None:
        assert close(self.expected(estimator)[1], self.divergence()[1])

    def test_k1_in_a_loss_has_no_gradient_on_average(self) -> None:
        assert close(self.expected(k1)[1], torch.zeros(6, dtype=torch.float64))
        assert self.divergence()[1].abs().max() > 0.1

    def test_k3_in_a_loss_has_the_gradient_of_the_reverse_divergence(self) -> None:
        logits, logps = self.policy()
        reverse = (self.reference.exp() * (self.reference - logps)).sum()
        found = self.expected(k3)[1]
        assert close(found, torch.autograd.grad(reverse, logits)[0])
        assert not close(found, self.divergence()[1], 0.05)

    @pytest.mark.parametrize("estimator", [k2, k3, k3_straight_through])
    def test_the_kl_loss_is_the_estimator_that_it_names(self, estimator: Estimator) -> None:
        logits, logps = self.policy()
        mask = torch.ones(6, 1, dtype=torch.bool)
        loss = kl_loss(
            logps[:, None],
            self.reference[:, None],
            mask,
            estimator=estimator.__name__,
            weights=logps.exp()[:, None],
        ).loss
        value, gradient = self.expected(estimator)
        assert close(loss.total, value) and loss.count == 6
        assert close(torch.autograd.grad(loss.total, logits)[0], gradient)

    @pytest.mark.parametrize("seed", range(3))
    def test_weights_without_a_cap_turn_the_generator_s_mean_into_the_trainer_s(self, seed: int) -> None:
        trainer, generator, values = self.policy()[1], self.reference, normal(6, seed=seed)
        weights = importance_weights(trainer, generator, math.inf)
        assert close((generator.exp() * weights * values).sum(), (trainer.exp() * values).sum())

    @pytest.mark.parametrize("cap", [0.5, 1.0, 2.0])
    def test_a_cap_takes_from_the_mean_what_lies_above_it(self, cap: float) -> None:
        trainer, generator, values = self.policy()[1].exp(), self.reference.exp(), normal(6, seed=2).abs()
        found = (generator * importance_weights(trainer.log(), generator.log(), cap) * values).sum()
        missing = ((trainer - cap * generator).clamp(min=0) * values).sum()
        assert missing > 0.01
        assert close(found, (trainer * values).sum() - missing)

    def test_no_correction_leaves_the_generator_s_mean(self) -> None:
        trainer, generator, values = self.policy()[1], self.reference, normal(6, seed=2)
        weights = importance_weights(trainer, generator, None)
        assert close((generator.exp() * weights * values).sum(), (generator.exp() * values).sum())


class TestGroups:
    """Every group of three samples of a policy over three actions."""

    rewards = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
    groups = torch.tensor(list(itertools.product(range(3), repeat=3)))

    def gradient(self, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Expected policy gradient with these advantages [27 * 3] in the loss, and the exact gradient of E[reward]."""
        logits = normal(3, seed=3).requires_grad_()
        logps = logits.log_softmax(0)
        probability = logps[self.groups].sum(1).exp().detach()
        rows = logps[self.groups].view(-1, 1)
        loss = policy_loss(
            rows,
            rows.detach(),
            advantages[:, None],
            torch.ones_like(rows, dtype=torch.bool),
            clip=0.2,
            weights=probability.repeat_interleave(3)[:, None] / 3,
        ).loss.total
        (found,) = torch.autograd.grad(-loss, logits)
        (exact,) = torch.autograd.grad((logits.softmax(0) * self.rewards).sum(), logits)
        return found, exact

    @property
    def scores(self) -> Tensor:
        return self.rewards[self.groups].flatten()

    def test_leave_one_out_is_an_unbiased_policy_gradient(self) -> None:
        found, exact = self.gradient(leave_one_out_advantages(self.scores, 3))
        assert exact.abs().max() > 0.1
        assert close(found, exact)

    def test_the_group_s_own_mean_shrinks_the_gradient_by_one_part_in_its_size(self) -> None:
        found, exact = self.gradient(group_advantages(self.scores, 3, normalise_std=False))
        assert close(found, (1 - 1 / 3) * exact)

    def test_dividing_by_the_group_s_deviation_biases_the_gradient(self) -> None:
        found, exact = self.gradient(group_advantages(self.scores, 3, normalise_std=True))
        assert (found.sign() != exact.sign()).any()

    @pytest.mark.parametrize("group_size", [2, 3, 6])
    def test_group_means_are_leave_one_out_scaled_row_by_row(self, group_size: int) -> None:
        scores = normal(12, seed=4)
        leave_one_out = leave_one_out_advantages(scores, group_size)
        centred = group_advantages(scores, group_size, normalise_std=False)
        assert close(centred, (1 - 1 / group_size) * leave_one_out)
        for row in range(12):
            first = row // group_size * group_size
            others = [scores[i].item() for i in range(first, first + group_size) if i != row]
            assert leave_one_out[row].item() == pytest.approx(scores[row].item() - sum(others) / len(others))


class TestSequences:
    """Every response of up to three tokens out of three, of which 0 ends it, under policies that look at the prefix."""

    responses = tuple(
        response
        for length in (1, 2, 3)
        for response in itertools.product(range(3), repeat=length)
        if 0 not in response[:-1] and (response[-1] == 0 or length == 3)
    )
    mask = torch.tensor([[t < len(response) for t in range(3)] for response in responses])
    #: The rows of a table of next-token log-probs.
    prefixes = tuple(prefix for length in (0, 1, 2) for prefix in itertools.product((1, 2), repeat=length))
    reference = normal(len(prefixes), 3, seed=5).log_softmax(1)
    scores = normal(len(responses), seed=6)

    def tokens(self, table: Tensor) -> Tensor:
        """[responses, 3]: each token's log-prob under a table of log-probs, NaN outside."""
        rows = [
            [table[self.prefixes.index(r[:t]), r[t]] if t < len(r) else table.new_tensor(math.nan) for t in range(3)]
            for r in self.responses
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def policy(self) -> tuple[Tensor, Tensor]:
        logits = normal(len(self.prefixes), 3, seed=7).requires_grad_()
        return logits, logits.log_softmax(1)

    def probability(self, logps: Tensor) -> Tensor:
        return logps.nansum(1).exp()

    def divergence(self, table: Tensor) -> Tensor:
        """KL(policy || reference) by the chain rule: each prefix's probability times the KL of its next token."""
        reach: dict[tuple[int, ...], Tensor] = {(): table.new_ones(())}
        total = table.new_zeros(())
        for row, prefix in enumerate(self.prefixes):
            total = total + reach[prefix] * (table[row].exp() * (table[row] - self.reference[row])).sum()
            for token in (1, 2):
                reach[(*prefix, token)] = reach[prefix] * table[row, token].exp()
        return total

    def test_the_responses_are_all_there_are(self) -> None:
        logps = self.tokens(self.policy()[1])
        assert close(self.probability(logps).sum(), torch.ones((), dtype=torch.float64))

    @pytest.mark.parametrize("estimator", [k1, k3])
    def test_sums_over_tokens_have_the_sequence_s_divergence_as_mean(self, estimator: Estimator) -> None:
        table = self.policy()[1].detach()
        logps = self.tokens(table)
        per_sequence = estimator(logps, self.tokens(self.reference)).nansum(1)
        assert close((self.probability(logps) * per_sequence).sum(), self.divergence(table))

    def test_penalised_rewards_have_the_penalised_objective_as_mean(self) -> None:
        table = self.policy()[1].detach()
        logps = self.tokens(table)
        token_kl = k1(logps, self.tokens(self.reference))
        rewards = penalised_rewards(self.scores, token_kl, self.mask, kl_coef=0.7)
        expected = (self.probability(logps) * self.scores).sum() - 0.7 * self.divergence(table)
        assert close((self.probability(logps) * rewards.sum(1)).sum(), expected)

    @pytest.mark.parametrize("critic", [0.0, 1.0])
    def test_ppo_s_first_step_is_the_gradient_of_the_penalised_objective(self, critic: float) -> None:
        """With discount and lambda 1 any critic of prefixes is a baseline, so the gradient is exact on average."""
        logits, table = self.policy()
        logps = self.tokens(table)
        old = logps.detach()
        prefix_values = critic * normal(len(self.prefixes), seed=8)
        values = self.tokens(prefix_values[:, None].expand(-1, 3))
        rewards = penalised_rewards(self.scores, k1(old, self.tokens(self.reference)), self.mask, kl_coef=0.7)
        advantages, _ = generalised_advantages(rewards, values, self.mask, discount=1.0, gae_lambda=1.0)
        weights = self.probability(old)[:, None].expand(-1, 3)
        loss = policy_loss(logps, old, advantages, self.mask, clip=0.2, weights=weights).loss.total
        (found,) = torch.autograd.grad(-loss, logits, retain_graph=True)

        objective = (self.probability(logps) * self.scores).sum() - 0.7 * self.divergence(table)
        (exact,) = torch.autograd.grad(objective, logits)
        assert exact.abs().max() > 0.05
        assert close(found, exact)
