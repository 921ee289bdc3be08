"""Every off-policy method that is there: labels, micro-batches, reference and training; and each one's formula.

The first tests take what `prefarena.methods` finds, so that a new method is in them. The formulas are written a second
time here, in other terms and in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from off_policy import example, metric_rows, off_policy_job, write_inputs
from torch import Tensor
from torch.nn.functional import softplus

from prefarena.config import DPO, IPO, Optimisation
from prefarena.methods import discover
from prefarena.methods.apo_down import APODown
from prefarena.methods.apo_zero import APOZero
from prefarena.methods.cpo import CPO
from prefarena.methods.discopop import DiscoPOP
from prefarena.methods.exo_pair import EXOPair
from prefarena.methods.f_dpo import FDPO
from prefarena.methods.hinge import Hinge
from prefarena.methods.nca_pair import NCAPair
from prefarena.methods.odpo import ODPO
from prefarena.methods.orpo import ORPO
from prefarena.methods.robust_dpo import RobustDPO
from prefarena.methods.simpo import SimPO
from prefarena.methods.sppo_hard import SPPOHard
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import Pairwise
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

#: On pairs, by kind.
METHODS = {kind: method for kind, method in discover().items() if issubclass(method, Pairwise)}
#: Each method with its defaults, and those that have another form with it; weights are tried on one.
EVERY: list[Pairwise] = [example(method) for method in METHODS.values()]
EVERY += [
    example(method, **{name: value})
    for method in METHODS.values()
    for name, value in (("length_normalise", True), ("reference", "none"))
    if name in method.model_fields
]
EVERY += [FDPO(divergence="reverse_kl"), FDPO(divergence="forward_kl"), FDPO(divergence="alpha")]
EVERY += [DPO(pair_weight="likelihood"), DPO(pair_weight="ratio"), DPO(tail_weight=0.4)]
EVERY += [ODPO(scaling="linear"), ODPO(scaling="linear", tail_weight=0.4, pair_weight="ratio")]


def named(method: Pairwise) -> str:
    own = method.model_dump(exclude_defaults=True)
    return "-".join([method.kind, *map(str, own)])


every = pytest.mark.parametrize("method", EVERY, ids=named)
LEARNS_FROM_LABELS = [method for method in EVERY if method.learns_from == "labelled pairs"]


class Batch:
    """Random log-probs [B] of both responses, a reference's, labels and lengths, in float64.

    share: of each log-prob, that of as many first tokens as the shorter response has. gaps: between the scores of both.
    """

    def __init__(self, seed: int, size: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        draws = -12 * torch.rand(4, size, dtype=torch.float64, generator=generator) - 0.01
        self.policy = PairLogps(draws[0].requires_grad_(), draws[1].requires_grad_())
        self.reference = PairLogps(draws[2], draws[3])
        self.labels = torch.rand(size, dtype=torch.float64, generator=generator)
        self.num_tokens = PairLogps(*torch.randint(1, 9, (2, size), generator=generator).double())
        self.share = PairLogps(*torch.rand(2, size, dtype=torch.float64, generator=generator))
        self.gaps = torch.randn(size, dtype=torch.float64, generator=generator)

    def output(self, method: Pairwise, labels: Tensor | None = None) -> ObjectiveOutput:
        labels = self.labels if labels is None else labels
        shared = times(self.policy, self.share), times(self.reference, self.share)
        return method.mean_loss(self.policy, self.reference, labels, self.num_tokens, shared, self.gaps)

    def loss(self, method: Pairwise, labels: Tensor | None = None) -> Tensor:
        mean = self.output(method, labels).loss
        return mean.total / mean.count

    def gradient(self, loss: Tensor) -> Tensor:
        """[2, B]; zero where the loss does not depend on a log-prob."""
        leaves = [self.policy.chosen, self.policy.rejected]
        return torch.stack(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    def rows(self, rows: slice | list[int], turned_round: bool = False) -> Batch:
        """Some of the pairs, or the same with rejected and chosen exchanged; their gradients reach this batch."""
        found = Batch.__new__(Batch)
        every = (self.policy, self.reference, self.num_tokens, self.share)
        cut = [PairLogps(p.chosen[rows], p.rejected[rows]) for p in every]
        found.policy, found.reference, found.num_tokens, found.share = [p.swapped if turned_round else p for p in cut]
        found.labels, found.gaps = self.labels[rows], -self.gaps[rows] if turned_round else self.gaps[rows]
        return found


def times(one: PairLogps, other: PairLogps) -> PairLogps:
    return PairLogps(one.chosen * other.chosen, one.rejected * other.rejected)


@pytest.mark.parametrize("method", LEARNS_FROM_LABELS, ids=named)
def test_a_soft_label_is_the_mixture_of_both_orderings(method: Pairwise) -> None:
    """Brute force, pair by pair. IPO's mixture is larger by a constant, 4 p (1 - p) / (2 tau)^2."""
    batch, certain = Batch(1), torch.ones(1, dtype=torch.float64)
    mixed = []
    for row, label in enumerate(batch.labels):
        as_given, turned_round = (batch.rows([row], turned).loss(method, certain) for turned in (False, True))
        mixed.append(label * as_given + (1 - label) * turned_round)
    expected, found = torch.stack(mixed).mean(), batch.loss(method)
    gradient = batch.gradient(found)
    torch.testing.assert_close(gradient, batch.gradient(expected), rtol=1e-12, atol=1e-14)
    assert float(gradient.abs().max()) > 1e-4
    if isinstance(method, IPO):
        found = found + (4 * batch.labels * (1 - batch.labels)).mean() / (2 * method.tau) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@every
def test_labels_matter_where_a_method_says_that_it_learns_from_them(method: Pairwise) -> None:
    batch = Batch(2)
    same = torch.equal(batch.loss(method), batch.loss(method, 1 - batch.labels))
    assert same == (method.learns_from == "chosen responses")


@every
def test_the_loss_depends_on_the_reference_where_a_method_says_so(method: Pairwise) -> None:
    batch, other = Batch(3), Batch(3)
    other.reference = PairLogps(batch.reference.chosen - 1.0, batch.reference.rejected + 0.5)
    assert torch.equal(batch.loss(method), other.loss(method)) == (not method.needs_reference)


@every
def test_micro_batches_add_up(method: Pairwise) -> None:
    batch = Batch(4, size=8)
    whole, parts = batch.output(method), [batch.rows(rows).output(method) for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close((parts[0].loss + parts[1].loss).value, whole.loss.value, rtol=1e-12, atol=1e-14)
    assert float(whole.loss.count) == 8
    for name, mean in whole.metrics.items():
        both = parts[0].metrics[name] + parts[1].metrics[name]
        torch.testing.assert_close(both.value, mean.value, rtol=1e-12, atol=1e-14, msg=name)


@every
def test_float32_and_far_log_probs_give_numbers(method: Pairwise) -> None:
    """Also of responses that are certain, and of labels that are."""
    far = torch.tensor([0.0, -1e-9, -400.0, -3000.0, -1.0, 0.0, -3000.0])
    policy = PairLogps(far.clone().requires_grad_(), far.flip(0).clone().requires_grad_())
    reference, counts = PairLogps(far.roll(1), far.roll(2)), PairLogps(torch.ones(7), torch.full((7,), 30.0))
    for label in (0.0, 0.5, 1.0):
        shared = times(policy, PairLogps(far / 4000 + 1, far / 4000 + 1)), reference
        loss = method.mean_loss(policy, reference, torch.full((7,), label), counts, shared, far.double() + 2).loss.total
        leaves = [policy.chosen, policy.rejected]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert all(bool(torch.isfinite(values).all()) for values in (loss, *gradients)), label


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def minus_log_sigma(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x))


def exo(h: Tensor, e: float) -> Tensor:
    """KL(q || p) as a sum over the two orderings."""
    total = torch.zeros_like(h)
    for q, p in ((sigma(h), 1 - e), (sigma(-h), e)):
        total = total + q * torch.log(q / p)
    return total


def odds(logps: Tensor) -> Tensor:
    return torch.exp(logps) / (1 - torch.exp(logps))


#: f(u) of a divergence E_ref[f(pi / pi_ref)]; its derivative is taken by torch.
DIVERGENCES: dict[Any, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u * torch.log(u),
    "forward_kl": lambda u: -torch.log(u),
    "jensen_shannon": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
    "alpha": lambda u: (u**0.75 - 0.75 * u - 0.25) / (0.25 * (0.25 - 1)),
}


def slopes(f: Callable[[Tensor], Tensor], *ratios: Tensor) -> Tensor:
    """0.3 (f'(u_w) - f'(u_l)), differentiable."""
    found = []
    for ratio in ratios:
        u = torch.exp(ratio)
        if not u.requires_grad:
            u.requires_grad_()
        found.append(torch.autograd.grad(f(u).sum(), u, create_graph=True)[0])
    return 0.3 * (found[0] - found[1])


Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
#: a, b: log pi of chosen and rejected; r, s: their log-ratios to the reference; n, m: their tokens; all [B].
FORMULAS: list[tuple[Pairwise, Formula]] = [
    (Hinge(beta=0.3, margin=0.8), lambda a, b, r, s, n, m: (0.8 - 0.3 * (r - s)).clamp(min=0)),
    (Hinge(beta=1.0, reference="none"), lambda a, b, r, s, n, m: (1 - a + b).clamp(min=0)),
    (
        Hinge(beta=2.0, length_normalise=True),
        lambda a, b, r, s, n, m: (1 - 2 * (r / n - s / m)).clamp(min=0),
    ),
    (SimPO(beta=2.5, margin=0.7), lambda a, b, r, s, n, m: minus_log_sigma(2.5 * a / n - 2.5 * b / m - 0.7)),
    (
        ORPO(odds_weight=0.4),
        lambda a, b, r, s, n, m: -a / n + 0.4 * torch.log1p(odds(b / m) / odds(a / n)),
    ),
    (CPO(beta=0.2), lambda a, b, r, s, n, m: minus_log_sigma(0.2 * (a - b)) - a),
    (CPO(beta=0.2, likelihood_weight=0.3), lambda a, b, r, s, n, m: minus_log_sigma(0.2 * (a - b)) - 0.3 * a),
    (
        RobustDPO(beta=0.2, flip_rate=0.25),
        lambda a, b, r, s, n, m: 1.5 * minus_log_sigma(0.2 * (r - s)) - 0.5 * minus_log_sigma(0.2 * (s - r)),
    ),
    (
        RobustDPO(beta=2.0, flip_rate=0.0, length_normalise=True),
        lambda a, b, r, s, n, m: minus_log_sigma(2 * (r / n - s / m)),
    ),
    (EXOPair(beta=0.3, label_smoothing=0.01), lambda a, b, r, s, n, m: exo(0.3 * (r - s), 0.01)),
    (
        NCAPair(beta=0.3),
        lambda a, b, r, s, n, m: (
            minus_log_sigma(0.3 * r) + minus_log_sigma(-0.3 * r) / 2 + minus_log_sigma(-0.3 * s) / 2
        ),
    ),
    (SPPOHard(beta=0.25), lambda a, b, r, s, n, m: (r - 2) ** 2 + (s + 2) ** 2),
    (APOZero(beta=0.3), lambda a, b, r, s, n, m: sigma(-0.3 * r) - sigma(-0.3 * s)),
    (APODown(beta=0.3), lambda a, b, r, s, n, m: sigma(0.3 * r) - 1 + sigma(0.3 * (s - r))),
    (
        DiscoPOP(beta=0.1, temperature=0.2),
        lambda a, b, r, s, n, m: (
            sigma(-0.5 * (r - s)) * minus_log_sigma(0.1 * (r - s)) + sigma(0.5 * (r - s)) * torch.exp(-0.1 * (r - s))
        ),
    ),
    *(
        (FDPO(beta=0.3, divergence=name, alpha=0.25), lambda a, b, r, s, n, m, f=f: softplus(-slopes(f, r, s)))
        for name, f in DIVERGENCES.items()
    ),
    (  # TRL's (t^(c - 1) - 1) / (c - 1), whose coefficient c is 1 - alpha
        FDPO(beta=0.3, divergence="alpha", alpha=0.25),
        lambda a, b, r, s, n, m: softplus(-0.3 * ((r.exp() ** -0.25 - 1) / -0.25 - (s.exp() ** -0.25 - 1) / -0.25)),
    ),
    (
        DPO(beta=0.3, pair_weight="likelihood"),
        lambda a, b, r, s, n, m: ((a / n).exp() * (b / m).exp()).detach() * minus_log_sigma(0.3 * (r - s)),
    ),
    (
        DPO(beta=0.3, pair_weight="ratio", max_log_ratio=1.5),
        lambda a, b, r, s, n, m: (r.exp() * s.exp()).clamp(max=math.exp(1.5)).detach() * minus_log_sigma(0.3 * (r - s)),
    ),
    (
        SimPO(beta=2.5, margin=0.7, pair_weight="ratio"),
        lambda a, b, r, s, n, m: (
            (r + s).exp().clamp(max=math.exp(2)).detach() * minus_log_sigma(2.5 * a / n - 2.5 * b / m - 0.7)
        ),
    ),
]


@pytest.mark.parametrize(("method", "formula"), FORMULAS, ids=[named(method) for method, _ in FORMULAS])
def test_loss_and_gradient_are_the_papers_formula(method: Pairwise, formula: Formula) -> None:
    for seed in range(5):
        batch = Batch(seed)
        policy, ratio, counts = batch.policy, batch.policy.minus(batch.reference), batch.num_tokens
        expected = formula(
            policy.chosen, policy.rejected, ratio.chosen, ratio.rejected, counts.chosen, counts.rejected
        ).mean()
        found = batch.loss(method, torch.ones_like(batch.labels))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(batch.gradient(found), batch.gradient(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "h"),
    [
        (Hinge(beta=0.5), 0.5 * 4.0),
        (Hinge(beta=0.5, reference="none"), 0.5 * 2.0),
        (SimPO(beta=2.0), 2 * (-1 / 2 + 3 / 4)),
        (CPO(beta=0.5), 0.5 * 2.0),
        (RobustDPO(beta=0.5), 2.0),
        (EXOPair(beta=0.5), 2.0),
        (NCAPair(beta=0.5), 2.0),
        (SPPOHard(), 4.0),
        (APOZero(beta=0.5), 2.0),
        (APODown(beta=0.5), 2.0),
        (DiscoPOP(beta=0.5), 2.0),
        (FDPO(beta=0.5, divergence="reverse_kl"), 2.0),
        (FDPO(beta=0.5, divergence="forward_kl"), (math.exp(3) - math.exp(-1)) / 2),
        (FDPO(beta=0.5), (math.log(1 + math.exp(3)) - math.log(1 + math.exp(-1))) / 2),
    ],
    ids=lambda value: value.kind if isinstance(value, Pairwise) else None,
)
def test_the_margin_in_the_metrics_is_the_one_in_the_loss(method: Pairwise, h: float) -> None:
    """log pi is -1 and -3, of 2 and 4 tokens; log pi_ref -2 and 0."""
    pair = [PairLogps(torch.tensor([a]).double(), torch.tensor([b]).double()) for a, b in ((-1, -3), (-2, 0), (2, 4))]
    output = method.mean_loss(pair[0], pair[1], torch.ones(1).double(), pair[2])
    assert float(output.metrics["preference/margin"].value) == pytest.approx(h, rel=1e-12)


def slope_at_the_reference(method: Pairwise) -> float:
    """The loss's derivative by rho_w of a pair whose rho are 0."""
    chosen, rejected = torch.zeros(1).double().requires_grad_(), torch.zeros(1).double()
    one = torch.ones(1).double()
    zero = PairLogps(rejected, rejected)
    loss = method.mean_loss(PairLogps(chosen, rejected), zero, one, PairLogps(one, one)).loss.total
    return float(torch.autograd.grad(loss, chosen)[0])


def test_what_the_documents_say_of_the_methods() -> None:
    """docs/methods.md: DiscoPOP's and EXO's first steps, and robust DPO's missing bound."""
    assert slope_at_the_reference(DiscoPOP(beta=1.0)) == pytest.approx(0.784, abs=1e-3)
    assert slope_at_the_reference(DiscoPOP(beta=1.0, temperature=0.2)) == pytest.approx(-0.366, abs=1e-3)
    assert slope_at_the_reference(APODown()) == pytest.approx(0.0, abs=1e-15)
    for method in (Hinge(), RobustDPO(), EXOPair(), NCAPair(), SPPOHard(), APOZero()):
        assert slope_at_the_reference(method) < 0, method.kind
    far = PairLogps(torch.tensor([1e5]).double(), torch.zeros(1).double())
    zero, one = PairLogps(far.rejected, far.rejected), torch.ones(1).double()
    assert float(RobustDPO().mean_loss(far, zero, one, PairLogps(one, one)).loss.total) < -1000


def test_discopop_is_a_number_where_the_product_of_its_parts_is_none() -> None:
    """h = -100 in float32: exp(-h) alone is infinite, and the weight beside it 0."""
    h = torch.tensor([-100.0])
    assert torch.isnan(torch.sigmoid(h / 0.05) * torch.exp(-h))
    zeros, ones = torch.zeros(1), torch.ones(1)
    output = DiscoPOP(beta=1.0).mean_loss(PairLogps(h, zeros), PairLogps(zeros, zeros), ones, PairLogps(ones, ones))
    assert float(output.loss.value) == pytest.approx(100.0)


def test_a_divergence_far_from_the_reference_is_a_number_and_still_has_a_slope() -> None:
    """The chosen response is e^-300 times as likely as under the reference: exp(300) is infinite in float32."""
    chosen, zeros, ones = torch.tensor([-300.0], requires_grad=True), torch.zeros(1), torch.ones(1)
    for divergence in ("forward_kl", "alpha"):
        output = FDPO(divergence=divergence).mean_loss(
            PairLogps(chosen, zeros), PairLogps(zeros, zeros), ones, PairLogps(ones, ones)
        )
        (slope,) = torch.autograd.grad(output.loss.total, chosen)
        assert bool(torch.isfinite(output.loss.total)) and -1e9 < float(slope) < -1, divergence


def test_weights_are_in_the_metrics_where_there_are_some() -> None:
    """log pi is -1 and -3, of 2 and 4 tokens; log pi_ref -2 and 0: the ratios are e and e^-3."""
    pair = [PairLogps(torch.tensor([a]).double(), torch.tensor([b]).double()) for a, b in ((-1, -3), (-2, 0), (2, 4))]
    ones = torch.ones(1).double()
    expected = {"none": None, "likelihood": math.exp(-0.5 - 0.75), "ratio": math.exp(1 - 3)}
    for name, weight in expected.items():
        method = DPO.model_validate({"pair_weight": name})
        metrics = method.mean_loss(pair[0], pair[1], ones, pair[2]).metrics
        found = metrics.get("preference/weight")
        assert (found and float(found.value)) == (weight and pytest.approx(weight)), name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("kind", list(METHODS))
def test_training_lowers_the_loss(inputs: Path, tmp_path: Path, kind: str) -> None:
    training = Optimisation(num_steps=12, batch_size=48, log_every=1, warmup_steps=0)
    method = example(METHODS[kind], training=training, demonstration_weight=0.0)
    run_job(off_policy_job(inputs, tmp_path / kind, method), Worker(str(tmp_path / kind)))
    rows = metric_rows(tmp_path / kind)
    assert len(rows) == 12 and rows[-1]["loss"] < rows[0]["loss"]
