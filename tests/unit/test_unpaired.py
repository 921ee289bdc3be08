"""Methods on single labelled responses: formulas, training, and pairs taken apart; their steps: test_whole_step.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from interrupted import rows_of_a_run_that_resumes_bit_for_bit
from off_policy import write_inputs, write_responses
from torch import Tensor
from unpaired_formulas import FORMULAS, METHODS, baseline_by_hand, named

from prefarena.data.responses import mismatch, taken_apart
from prefarena.errors import UserError
from prefarena.methods import discover
from prefarena.methods.kto import KTO
from prefarena.records import PAIRS
from prefarena.settings.unpaired import Unpaired

every = pytest.mark.parametrize("method", METHODS, ids=named)


def test_every_unpaired_method_is_tried_here() -> None:
    found = {kind for kind, method in discover().items() if issubclass(method, Unpaired)}
    assert found == {method.kind for method in METHODS}


# ---------------------------------------------------------------------------------------------- formulas


def draw(seed: int, size: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, the reference's, mismatched log-ratios and labels of 0 and 1, [B] float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = -12 * torch.rand(2, size, dtype=torch.float64, generator=generator) - 0.01
    mismatched = torch.randn(size, dtype=torch.float64, generator=generator) + (seed % 2)
    return draws[0].requires_grad_(), draws[1], mismatched, (torch.arange(size) % 3 > 0).double()


@every
def test_loss_and_gradient_are_the_papers_formula(method: Unpaired) -> None:
    for seed in range(6):
        policy, reference, mismatched, labels = draw(seed)
        ratio = policy - reference
        z = baseline_by_hand(method, ratio, mismatched, labels)
        expected = FORMULAS[method.kind](method, ratio, labels > 0.5, z).mean()
        first = mismatched if method.baseline_of == "mismatched responses" else ratio.detach()
        parts = [method.baseline_sums(first[rows], labels[rows]) for rows in (slice(0, 2), slice(2, None))]
        found = method.mean_loss(policy, reference, labels, method.baseline(parts[0] + parts[1]))
        torch.testing.assert_close(found.loss.value, expected, rtol=1e-12, atol=1e-14)
        gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (found.loss.value, expected)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)
        assert float(gradients[0].abs().max()) > 1e-5
        assert float(found.metrics["response/baseline"].value) == pytest.approx(float(z), abs=1e-12)


@every
def test_a_soft_label_is_the_mixture_of_both_kinds(method: Unpaired) -> None:
    policy, reference, _, _ = draw(1)
    labels, z = torch.linspace(0, 1, len(policy)).double(), torch.tensor(0.3).double()
    both = [method.mean_loss(policy[i : i + 1], reference[i : i + 1], torch.tensor([label]).double(), z).loss.value
            for i in range(len(policy)) for label in (1.0, 0.0)]  # fmt: skip
    mixed = (labels * torch.stack(both[0::2]) + (1 - labels) * torch.stack(both[1::2])).mean()
    torch.testing.assert_close(method.mean_loss(policy, reference, labels, z).loss.value, mixed)


@every
def test_far_log_probs_and_one_kind_alone_give_numbers(method: Unpaired) -> None:
    policy = torch.tensor([0.0, -1e-9, -400.0, -3000.0], requires_grad=True)
    reference = torch.tensor([-3000.0, 0.0, -1.0, -2.0])
    for label in (0.0, 1.0):
        labels = torch.full((4,), label)
        z = method.baseline(method.baseline_sums((policy - reference).detach().double(), labels.double())).float()
        loss = method.mean_loss(policy, reference, labels, z).loss.total
        (gradient,) = torch.autograd.grad(loss, policy)
        assert bool(torch.isfinite(z) & torch.isfinite(loss) & torch.isfinite(gradient).all())


def test_the_kl_baseline_is_never_below_zero() -> None:
    method = KTO()
    for mean, expected in ((-2.0, 0.0), (1.5, 1.5)):
        assert float(method.baseline(method.baseline_sums(torch.full((4,), mean), torch.ones(4)))) == expected


def test_metrics_by_hand() -> None:
    """log pi -1, -3, -2; log pi_ref -2, -1, -4; labels 1, 0, 0.5; beta 2, z0 1: h is 0, -6 and 2."""
    values = [torch.tensor(row).double() for row in ([-1, -3, -2], [-2, -1, -4], [1, 0, 0.5])]
    output = KTO(beta=2.0).mean_loss(values[0], values[1], values[2], torch.tensor(1.0).double())
    assert {name: float(mean.value) for name, mean in output.metrics.items()} == {
        "response/accuracy": pytest.approx((0.5 + 1 + 0.5) / 3),
        "response/baseline": pytest.approx(1.0),
        "response/saturated": pytest.approx(1 / 3),
        "logps/desirable": pytest.approx((-1 + 0.5 * -2) / 1.5),
        "logps/undesirable": pytest.approx((-3 + 0.5 * -2) / 1.5),
        "logratio/desirable": pytest.approx((1 + 0.5 * 2) / 1.5),
        "logratio/undesirable": pytest.approx((-2 + 0.5 * 2) / 1.5),
    }


# -------------------------------------------------------------------------------- pairs taken apart, mismatches


def pairs(prompts: list[int], label: float = 1.0) -> pa.Table:
    rows = [
        {"id": f"{i:02}", "prompt_ids": [1, prompt], "chosen_ids": [10 + i, 2], "rejected_ids": [40 + i, 2],
         "label": label, "source": "test"}
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, PAIRS)


def test_pairs_are_taken_apart_with_their_labels() -> None:
    rows = taken_apart(pairs([3, 4], label=0.75)).to_pylist()
    assert len({row["id"] for row in rows}) == 4
    found = {tuple(row["response_ids"]): (row["prompt_ids"], row["label"]) for row in rows}
    assert found == {(10, 2): ([1, 3], 0.75), (40, 2): ([1, 3], 0.25), (11, 2): ([1, 4], 0.75), (41, 2): ([1, 4], 0.25)}


@pytest.mark.parametrize("prompts", [[3, 4], [3, 3, 4, 5], [3] * 5 + [4, 5, 6, 7, 7], list(range(3, 20))])
def test_a_mismatched_response_is_to_another_prompt_and_every_one_is_used_once(prompts: list[int]) -> None:
    rows = taken_apart(pairs(prompts))
    order = mismatch(rows)
    assert sorted(order.tolist()) == list(range(rows.num_rows))
    names = [tuple(ids) for ids in rows["prompt_ids"].to_pylist()]
    assert all(names[i] != names[j] for i, j in enumerate(order))
    shuffled = np.random.default_rng(0).permutation(rows.num_rows)
    again = mismatch(rows.take(pa.array(shuffled)))  # decided by content: the order of rows plays no part
    assert [shuffled[j] for j in again] == [order[i] for i in shuffled]


def test_a_prompt_with_most_of_the_responses_is_refused() -> None:
    with pytest.raises(UserError, match="6 of 10 labelled responses answer the same prompt"):
        mismatch(taken_apart(pairs([3, 3, 3, 4, 5])))


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_responses(folder)
    return folder


@pytest.mark.parametrize("kind", ["kto", "bco"])
def test_training_lowers_the_loss_and_resumes_bit_for_bit(inputs: Path, tmp_path: Path, kind: str) -> None:
    rows = rows_of_a_run_that_resumes_bit_for_bit(inputs, tmp_path, discover()[kind]())
    assert rows[-1]["loss/responses"] < rows[0]["loss/responses"]
    assert rows[-1]["logratio/desirable"] > rows[-1]["logratio/undesirable"] + 0.1
    assert rows[-1]["response/accuracy"] > 0.6
