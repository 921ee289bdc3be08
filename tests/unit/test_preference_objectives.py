"""The preference objectives against algebra: the facts that the methods' papers state, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefarena.config import DPO, IPO, MPO, SFT
from prefarena.objectives.likelihood import negative_log_likelihood
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.objectives.reward_model import bradley_terry

ONES = PairLogps(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def random_pairs(seed: int, size: int = 7) -> tuple[PairLogps, PairLogps, Tensor, PairLogps]:
    generator = torch.Generator().manual_seed(seed)
    draws = -5 * torch.rand(4, size, dtype=torch.float64, generator=generator)
    labels = torch.rand(size, dtype=torch.float64, generator=generator)
    counts = torch.randint(1, 9, (2, size), generator=generator).double()
    return PairLogps(draws[0], draws[1]), PairLogps(draws[2], draws[3]), labels, PairLogps(counts[0], counts[1])


def loss_of(output: ObjectiveOutput) -> Tensor:
    return output.loss.total / output.loss.count


@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 3.0))
@settings(max_examples=30, deadline=None)
def test_mpo_gradient_is_the_importance_sampled_policy_gradient(seed: int, beta: float) -> None:
    """grad(-sigma(h)) = -pi^p grad log pi^p, as arXiv 2312.16430 derives it."""
    policy, reference, _, counts = random_pairs(seed)
    labels = torch.ones_like(policy.chosen)
    leaves = [policy.chosen.clone().requires_grad_(), policy.rejected.clone().requires_grad_()]
    output = MPO(beta=beta).mean_loss(PairLogps(*leaves), reference, labels, counts)
    ours = torch.autograd.grad(output.loss.total, leaves)

    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    h = beta * ((again[0] - reference.chosen) - (again[1] - reference.rejected))
    preference_policy = torch.sigmoid(h)
    surrogate = -(preference_policy.detach() * torch.log(preference_policy)).sum()
    expected = torch.autograd.grad(surrogate, again)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_mpo_with_a_soft_label_is_the_mean_of_both_orderings() -> None:
    policy, reference, labels, counts = random_pairs(1)
    swapped = PairLogps(policy.rejected, policy.chosen), PairLogps(reference.rejected, reference.chosen)
    swapped_counts = PairLogps(counts.rejected, counts.chosen)
    soft = loss_of(MPO(beta=0.7).mean_loss(policy, reference, labels, counts))
    ones = torch.ones_like(labels[:1])
    parts = []
    for i, label in enumerate(labels):
        one = lambda pair, i=i: PairLogps(pair.chosen[i : i + 1], pair.rejected[i : i + 1])  # noqa: E731
        forward = loss_of(MPO(beta=0.7).mean_loss(one(policy), one(reference), ones, one(counts)))
        backward = loss_of(MPO(beta=0.7).mean_loss(one(swapped[0]), one(swapped[1]), ones, one(swapped_counts)))
        parts.append(label * forward + (1 - label) * backward)
    torch.testing.assert_close(soft, torch.stack(parts).mean())


def test_mpo_without_reference_ignores_it_in_the_loss_and_keeps_it_in_the_metrics() -> None:
    policy, reference, labels, counts = random_pairs(2)
    other = PairLogps(reference.rejected, reference.chosen - 1)
    free, moved = (MPO(reference="none").mean_loss(policy, given, labels, counts) for given in (reference, other))
    torch.testing.assert_close(free.loss.total, moved.loss.total, rtol=0, atol=0)
    assert float(free.metrics["logratio/chosen"].value) != float(moved.metrics["logratio/chosen"].value)
    h = policy.chosen - policy.rejected
    expected = -(labels / (1 + torch.exp(-h)) + (1 - labels) / (1 + torch.exp(h))).mean()
    torch.testing.assert_close(loss_of(free), expected)


def bandit_optimum(loss: Callable[[Tensor], Tensor], steps: int = 4000) -> float:
    """The probability of the preferred arm of a two-armed softmax bandit after minimising `loss`(log-probs [2])."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(torch.log_softmax(logits, 0))
        value.backward()
        return value

    for _ in range(steps // 200):
        optimizer.step(closure)
    return float(torch.softmax(logits, 0)[0].detach())


def arms(logps: Tensor) -> PairLogps:
    return PairLogps(logps[:1], logps[1:])


UNIFORM = PairLogps(torch.full((1,), math.log(0.5)).double(), torch.full((1,), math.log(0.5)).double())
CERTAIN = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.3, 1.0, 3.0])
def test_mpo_bandit_stationary_point(eta: float) -> None:
    """(2p - 1) / (p (1 - p)) = 2 / eta; p = 1/sqrt(2) at eta = 1."""

    def loss(logps: Tensor) -> Tensor:
        demonstrations = negative_log_likelihood(logps, torch.ones(2, dtype=torch.float64))
        preferred = MPO(beta=1.0).mean_loss(arms(logps), UNIFORM, CERTAIN, ONES)
        return loss_of(preferred) + eta * loss_of(demonstrations)

    p = bandit_optimum(loss)
    assert (2 * p - 1) / (p * (1 - p)) == pytest.approx(2 / eta, rel=1e-6)
    if eta == 1.0:
        assert p == pytest.approx(1 / math.sqrt(2), rel=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_dpo_never_lets_go_of_a_deterministic_preference(beta: float) -> None:
    p = bandit_optimum(lambda logps: loss_of(DPO(beta=beta).mean_loss(arms(logps), UNIFORM, CERTAIN, ONES)))
    assert p > 0.98


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2), (2.0, 0.4)])
def test_dpo_with_soft_and_smoothed_labels_is_the_mean_of_both_orderings(beta: float, smoothing: float) -> None:
    """Brute force: a label is kept with probability 1 - e and turned round with e, each pair by equation 7."""
    policy, reference, labels, counts = random_pairs(9)
    expected = 0.0
    for i, label in enumerate(labels.tolist()):
        h = beta * float(policy.minus(reference).margin[i])
        for as_labelled, share in ((label, 1 - smoothing), (1 - label, smoothing)):
            for wins, sign in ((as_labelled, 1), (1 - as_labelled, -1)):
                expected += share * wins * math.log1p(math.exp(-sign * h)) / len(labels)
    found = loss_of(DPO(beta=beta, label_smoothing=smoothing).mean_loss(policy, reference, labels, counts))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_bandit_optimum(tau: float) -> None:
    """p = sigma(1 / (2 tau)), arXiv 2310.12036."""
    p = bandit_optimum(lambda logps: loss_of(IPO(tau=tau).mean_loss(arms(logps), UNIFORM, CERTAIN, ONES)))
    assert p == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))), rel=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.25, 2.0])
def test_ipo_with_a_soft_label_is_the_mean_of_both_orderings_up_to_a_constant(tau: float) -> None:
    """Brute force over the orderings, each with its own square of arXiv 2310.12036, equation 17.

    The mean over orderings is larger by 4 p (1 - p) / (2 tau)^2, which no policy changes: the gradients are the same.
    """
    policy, reference, labels, counts = random_pairs(8)
    chosen, rejected = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    squares = []
    for winner, loser, sign in ((chosen, rejected, 1), (rejected, chosen, -1)):
        references = (reference.chosen, reference.rejected)[::sign]
        squares.append(((winner - references[0]) - (loser - references[1]) - 1 / (2 * tau)) ** 2)
    both = (labels * squares[0] + (1 - labels) * squares[1]).mean()
    soft = loss_of(IPO(tau=tau).mean_loss(PairLogps(chosen, rejected), reference, labels, counts))
    constant = (4 * labels * (1 - labels)).mean() / (2 * tau) ** 2
    torch.testing.assert_close(soft + constant, both)
    for found, wanted in zip(
        torch.autograd.grad(soft, [chosen, rejected]), torch.autograd.grad(both, [chosen, rejected]), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_dpo_starts_at_ln_2_and_matches_the_formula() -> None:
    policy, reference, _, counts = random_pairs(3)
    ones = torch.ones_like(policy.chosen)
    start = loss_of(DPO(beta=0.1).mean_loss(reference, reference, ones, counts))
    assert float(start) == pytest.approx(math.log(2))
    h = 0.3 * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    smoothed = loss_of(DPO(beta=0.3, label_smoothing=0.1).mean_loss(policy, reference, ones, counts))
    expected = (0.9 * torch.log1p(torch.exp(-h)) + 0.1 * torch.log1p(torch.exp(h))).mean()
    torch.testing.assert_close(smoothed, expected)


def test_length_normalisation_divides_each_log_ratio_by_its_own_tokens() -> None:
    policy, reference, _, counts = random_pairs(4)
    ones = torch.ones_like(policy.chosen)
    ratio_w = (policy.chosen - reference.chosen) / counts.chosen
    ratio_l = (policy.rejected - reference.rejected) / counts.rejected
    found = loss_of(IPO(tau=0.25, length_normalise=True).mean_loss(policy, reference, ones, counts))
    torch.testing.assert_close(found, ((ratio_w - ratio_l - 2.0) ** 2).mean())
    h = 0.7 * (ratio_w - ratio_l)
    found = loss_of(DPO(beta=0.7, length_normalise=True).mean_loss(policy, reference, ones, counts))
    torch.testing.assert_close(found, torch.log1p(torch.exp(-h)).mean())
    found = loss_of(MPO(beta=0.7, length_normalise=True).mean_loss(policy, reference, ones, counts))
    torch.testing.assert_close(found, -(1 / (1 + torch.exp(-h))).mean())
    h = 0.7 * (policy.chosen / counts.chosen - policy.rejected / counts.rejected)
    found = loss_of(MPO(beta=0.7, length_normalise=True, reference="none").mean_loss(policy, reference, ones, counts))
    torch.testing.assert_close(found, -(1 / (1 + torch.exp(-h))).mean())


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_loss_and_metrics_of_demonstrations_by_hand() -> None:
    """Two sequences of -2 and -7 nats with 1 and 4 tokens; both parts of each mean, and their types."""
    logps, counts = doubles(-2, -7), torch.tensor([1, 4])
    by_sequence = negative_log_likelihood(logps, counts)
    for output, count in ((by_sequence, 2.0), (negative_log_likelihood(logps, counts, mean="tokens"), 5.0)):
        torch.testing.assert_close([output.loss.total, output.loss.count], list(doubles(9, count)))
        assert {name: float(mean.value) for name, mean in output.metrics.items()} == {
            "demonstration/nll": 4.5,
            "demonstration/nll_token": pytest.approx(9 / 5),
        }
    assert float(negative_log_likelihood(logps, counts, mean="sequences").loss.value) == 4.5


def test_fine_tuning_on_the_chosen_responses_by_hand() -> None:
    policy, labels = PairLogps(doubles(-2, -7), doubles(-3, -1)), doubles(1, 0)
    reference = PairLogps(doubles(-2, -4), doubles(-3, -3))  # for the metrics alone: ratios 0 and -3, 0 and 2
    output = SFT().mean_loss(policy, reference, labels, ONES)
    assert float(output.loss.value) == 4.5
    assert {name: float(mean.value) for name, mean in output.metrics.items()} == {
        "logps/chosen": -4.5,
        "logps/rejected": -2.0,
        "preference/margin": -2.5,  # of 1 and -6
        "preference/saturated": 0.5,
        "logratio/chosen": -1.5,
        "logratio/rejected": 1.0,
        "preference/accuracy": 0.75,  # a tie, and a rejected response that became likelier, as its label has it
    }


def test_metrics_of_preferences_by_hand() -> None:
    """h is 2 (rho_w - rho_l): 4, 4.5, -6, 0 and 2 in turn; 4 itself is not saturated."""
    policy = PairLogps(doubles(-1, -1, -4, -2, -2), doubles(-3, -3, -1, -2, -2))
    reference = PairLogps(doubles(-1, -1, -1, -1, -1), doubles(-1, -0.75, -1, -1, 0))
    output = DPO(beta=2.0).mean_loss(policy, reference, doubles(1, 0, 0.3, 1, 0.5), ONES)
    assert {name: float(mean.value) for name, mean in output.metrics.items()} == {
        "logps/chosen": -2.0,
        "logps/rejected": pytest.approx(-11 / 5),
        "logratio/chosen": pytest.approx(-1.0),
        "logratio/rejected": pytest.approx(-7.25 / 5),
        "preference/margin": pytest.approx(4.5 / 5),
        "preference/saturated": pytest.approx(2 / 5),
        "preference/accuracy": pytest.approx((1 + 0 + 1 + 0.5 + 0.5) / 5),  # a tie, and a label without preference
    }


def test_metrics_mean_the_same_for_every_method() -> None:
    policy, reference, labels, counts = random_pairs(5)
    outputs = [
        MPO(beta=1.0).mean_loss(policy, reference, labels, counts),
        DPO(beta=0.1).mean_loss(policy, reference, labels, counts),
        IPO(tau=0.1).mean_loss(policy, reference, labels, counts),
        SFT().mean_loss(policy, reference, labels, counts),
    ]
    shared = {"logps/chosen", "logps/rejected", "logratio/chosen", "logratio/rejected", "preference/accuracy"}
    for name in shared:
        values = {float(output.metrics[name].value) for output in outputs}
        assert len(values) == 1, name
    margin = policy.minus(reference).margin
    agrees = ((margin > 0) == (labels > 0.5)).double().mean()
    assert float(outputs[0].metrics["preference/accuracy"].value) == pytest.approx(float(agrees))


def test_means_add_up_over_micro_batches() -> None:
    policy, reference, labels, counts = random_pairs(6, size=8)
    whole = DPO(beta=0.5).mean_loss(policy, reference, labels, counts)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        cut = [PairLogps(p.chosen[rows], p.rejected[rows]) for p in (policy, reference, counts)]
        parts.append(DPO(beta=0.5).mean_loss(cut[0], cut[1], labels[rows], cut[2]))
    torch.testing.assert_close((parts[0].loss + parts[1].loss).value, whole.loss.value)


def test_bradley_terry_matches_the_formula_and_centring_only_shifts() -> None:
    chosen, rejected = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.2, 0.5]).double()
    labels = torch.tensor([1.0, 0.25]).double()
    found = loss_of(bradley_terry(chosen, rejected, labels))
    d = chosen - rejected
    expected = (labels * torch.log1p(torch.exp(-d)) + (1 - labels) * torch.log1p(torch.exp(d))).mean()
    torch.testing.assert_close(found, expected)
    centred = loss_of(bradley_terry(chosen, rejected, labels, centre_weight=0.1))
    torch.testing.assert_close(centred - found, 0.1 * ((chosen + rejected) ** 2).mean())


def test_metrics_of_a_reward_model_by_hand() -> None:
    """Right, wrong, right (the second is preferred), a tie, and a label without a preference."""
    chosen, rejected = doubles(3, 1, -1, 2, 5), doubles(1, 2, 3, 2, 1)
    output = bradley_terry(chosen, rejected, doubles(1, 0.8, 0.2, 1, 0.5))
    assert {name: float(mean.value) for name, mean in output.metrics.items()} == {
        "reward_model/accuracy": pytest.approx((1 + 0 + 1 + 0.5 + 0.5) / 5),
        "reward_model/margin": pytest.approx(1 / 5),
        "reward_model/chosen": 2.0,
        "reward_model/rejected": pytest.approx(9 / 5),
    }
