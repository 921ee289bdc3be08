"""Methods on the ranks of pairs: AOT's formula, soft labels, a batch in parts, and training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interrupted import rows_of_a_run_that_resumes_bit_for_bit
from off_policy import write_inputs
from sorted_pairs import aot
from torch import Tensor

from prefarena.methods import discover
from prefarena.methods.aot import AOT
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.settings.ranked import Ranked, StepPairs

METHODS = [AOT(beta=0.3), AOT(beta=0.3, form="unpaired")]
every = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.form)


def test_every_ranked_method_is_tried_here() -> None:
    assert {kind for kind, method in discover().items() if issubclass(method, Ranked)} == {"aot"}


def draw(seed: int, size: int = 9) -> tuple[PairLogps, PairLogps]:
    """The policy's and the reference's log-probs, float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = -12 * torch.rand(4, size, dtype=torch.float64, generator=generator) - 0.01
    return PairLogps(draws[0].requires_grad_(), draws[1].requires_grad_()), PairLogps(draws[2], draws[3])


def cut(pair: PairLogps, rows: Tensor) -> PairLogps:
    return PairLogps(pair.chosen[rows], pair.rejected[rows])


def in_parts(
    method: AOT, policy: PairLogps, reference: PairLogps, labels: Tensor, parts: list[Tensor]
) -> list[ObjectiveOutput]:
    """What each micro-batch finds, with the whole batch as the step."""
    known = PairLogps(policy.chosen.detach(), policy.rejected.detach()).double()
    step = StepPairs(known, reference.double(), labels.double(), torch.ones_like(labels).double())
    return [method.mean_loss(cut(policy, rows), cut(reference, rows), labels[rows], step, rows) for rows in parts]


def loss(method: AOT, policy: PairLogps, reference: PairLogps, labels: Tensor, parts: list[Tensor]) -> Tensor:
    outputs = in_parts(method, policy, reference, labels, parts)
    return torch.stack([output.loss.total for output in outputs]).sum() / len(labels)


def gradient(value: Tensor, policy: PairLogps) -> Tensor:
    return torch.stack(torch.autograd.grad(value, [policy.chosen, policy.rejected]))


CUTS = ([9], [4, 5], [1] * 9)


@every
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_loss_and_gradient_are_those_of_the_sorted_batch_however_it_is_cut(method: AOT, sizes: list[int]) -> None:
    for seed in range(4):
        policy, reference = draw(seed)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        found = loss(method, policy, reference, torch.ones(9).double(), list(order.split(sizes)))
        expected = aot(method, policy, reference, torch.ones(9).double())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        slopes = gradient(found, policy)
        torch.testing.assert_close(slopes, gradient(expected, policy), rtol=1e-12, atol=1e-14)
        assert float(slopes.abs().max()) > 1e-4


@every
def test_a_batch_that_sorts_its_own_rows_would_find_another_loss(method: AOT) -> None:
    """So that the test above can fail."""
    policy, reference = draw(0)
    ones = torch.ones(9).double()
    alone = [
        aot(method, cut(policy, rows), cut(reference, rows), ones[rows]) * len(rows)
        for rows in torch.arange(9).split([4, 5])
    ]
    difference = torch.stack(alone).sum() / 9 - aot(method, policy, reference, ones)
    assert abs(float(difference.detach())) > 1e-3


@every
def test_a_soft_label_is_a_batch_with_that_share_of_copies_turned_round(method: AOT) -> None:
    """Brute force: every pair stands in the batch twenty times, and the batch is sorted."""
    for seed in range(4):
        policy, reference = draw(seed)
        labels = torch.tensor([1.0, 0.0, 0.5, 0.95, 0.3, 0.75, 0.6, 0.1, 0.85], dtype=torch.float64)
        found = loss(method, policy, reference, labels, list(torch.arange(9).split([3, 6])))
        expected = aot(method, policy, reference, labels, parts=20)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient(found, policy), gradient(expected, policy), rtol=1e-12, atol=1e-14)
        assert abs(float((found - aot(method, policy, reference, labels.round())).detach())) > 1e-3


@every
def test_a_pair_that_is_twice_in_a_step_counts_twice(method: AOT) -> None:
    policy, reference = draw(2, size=5)
    rows, labels = torch.tensor([0, 1, 2, 3, 4, 1, 3]), torch.tensor([1.0, 0.5, 1.0, 1.0, 0.0]).double()
    expected = aot(method, cut(policy, rows), cut(reference, rows), labels[rows], parts=2)
    known = PairLogps(policy.chosen.detach(), policy.rejected.detach())
    step = StepPairs(known, reference, labels, torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]).double())
    found = method.mean_loss(cut(policy, rows), cut(reference, rows), labels[rows], step, rows).loss.value
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(found, policy), gradient(expected, policy), rtol=1e-12, atol=1e-14)


@every
def test_of_one_pair_it_is_dpo(method: AOT) -> None:
    policy, reference = draw(3, size=1)
    found = loss(method, policy, reference, torch.ones(1).double(), [torch.arange(1)])
    h = 0.3 * policy.minus(reference).margin
    torch.testing.assert_close(found, torch.log1p(torch.exp(-h)).mean())


@every
def test_far_log_probs_and_ties_give_numbers(method: AOT) -> None:
    far = torch.tensor([0.0, -1e-9, -400.0, -3000.0, -1.0, 0.0, -3000.0])
    policy = PairLogps(far.clone().requires_grad_(), far.flip(0).clone().requires_grad_())
    reference = PairLogps(far.roll(1), far.roll(2))
    for label in (0.0, 0.5, 1.0):
        found = loss(method, policy, reference, torch.full((7,), label), list(torch.arange(7).split([2, 5])))
        assert bool(torch.isfinite(found)) and bool(torch.isfinite(gradient(found, policy)).all()), label


@every
def test_the_margin_in_the_metrics_is_a_pairs_own(method: AOT) -> None:
    policy, reference = draw(4)
    (output,) = in_parts(method, policy, reference, torch.ones(9).double(), [torch.arange(9)])
    expected = 0.3 * (policy.chosen - reference.chosen - policy.rejected + reference.rejected).mean()
    assert float(output.metrics["preference/margin"].value) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@every
def test_training_lowers_the_loss_and_resumes_bit_for_bit(inputs: Path, tmp_path: Path, method: AOT) -> None:
    rows = rows_of_a_run_that_resumes_bit_for_bit(inputs, tmp_path, method)
    assert rows[-1]["loss/preference"] < rows[0]["loss/preference"]
    assert rows[-1]["preference/accuracy"] > 0.6
