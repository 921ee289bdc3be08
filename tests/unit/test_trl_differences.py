"""Where TRL 1.16 departs from the papers that the methods here follow: that it does, and that nothing else differs.

Each of TRL's losses as its code computes it, beside ours and beside ours with the one change that docs/methods.md
names. `benchmarks/loss_parity.py` shows the same with TRL itself, whose environment the tests do not have. What TRL
takes by micro-batches is in test_ranked.py and test_whole_step.py, DiscoPOP far from 0 in test_pairwise_methods.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefarena.config import DPO, IPO, SFT
from prefarena.methods.apo_down import APODown
from prefarena.methods.apo_zero import APOZero
from prefarena.methods.bco import BCO
from prefarena.methods.cpo import CPO
from prefarena.methods.hinge import Hinge
from prefarena.methods.orpo import ORPO
from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import Pairwise


class Batch:
    """Random log-probs of tokens, [8, 6] float64 of responses with 1 to 6 tokens, and of prompts with 5 each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = -2 * torch.rand(2, 8, 6, dtype=torch.float64, generator=generator)
        self.prompt = -2 * torch.rand(8, 5, dtype=torch.float64, generator=generator)
        lengths = torch.randint(1, 7, (2, 8), generator=generator)
        self.mask = torch.arange(6) < lengths[..., None]
        self.square_sums = torch.rand(2, 8, 6, dtype=torch.float64, generator=generator).log()  # log sum_v pi(v)^2
        self.tokens.requires_grad_()
        chosen, rejected = (self.tokens * self.mask).sum(-1)
        self.policy, self.num_tokens = PairLogps(chosen, rejected), PairLogps(*lengths.double())
        self.reference = PairLogps(*-8 * torch.rand(2, 8, dtype=torch.float64, generator=generator))
        self.labels = torch.ones(8, dtype=torch.float64)

    @property
    def ratio(self) -> PairLogps:
        return self.policy.minus(self.reference)

    def ours(self, method: Pairwise) -> Tensor:
        return method.mean_loss(self.policy, self.reference, self.labels, self.num_tokens).loss.value

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.tokens, retain_graph=True)[0]


def of_tokens(b: Batch) -> Tensor:
    """The likelihood of chosen responses as TRL has it: a mean over the tokens of a micro-batch."""
    return -b.tokens[0][b.mask[0]].mean()


def likelihood_of_sequences(b: Batch) -> Tensor:
    return -torch.cat([b.prompt.flatten(), b.tokens[0][b.mask[0]]]).mean()


def ipo(b: Batch) -> Tensor:
    averages = b.ratio.chosen / b.num_tokens.chosen - b.ratio.rejected / b.num_tokens.rejected
    return ((averages - 1 / (2 * 0.2)) ** 2).mean()


def orpo_odds(b: Batch) -> Tensor:
    chosen, rejected = b.policy.chosen / b.num_tokens.chosen, b.policy.rejected / b.num_tokens.rejected
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -0.3 * F.logsigmoid(odds).mean()


def wpo(b: Batch) -> Tensor:
    aligned = ((b.tokens - b.square_sums) * b.mask).sum(-1) / b.mask.sum(-1)
    return (-F.logsigmoid(0.2 * b.ratio.margin) * aligned.detach().exp().prod(0)).mean()


def wpo_with_the_alignment(b: Batch) -> Tensor:
    """Ours, each pair's loss times what the alignment makes of its weight."""
    losses, _ = DPO(beta=0.2).pair_losses(b.policy, b.reference, b.labels, b.num_tokens)
    weights = ((b.policy.chosen / b.num_tokens.chosen) + (b.policy.rejected / b.num_tokens.rejected)).detach().exp()
    correction = torch.exp(-(b.square_sums * b.mask).sum(-1) / b.mask.sum(-1)).prod(0)
    return (losses * weights * correction).mean()


def bco_without_a_shift(b: Batch) -> Tensor:
    """Over both responses of a pair, of which ours is the mean."""
    policy, reference = (torch.cat([pair.chosen, pair.rejected]) for pair in (b.policy, b.reference))
    labels = torch.cat([b.labels, 1 - b.labels])
    return 2 * BCO(beta=0.2).mean_loss(policy, reference, labels, torch.zeros((), dtype=torch.float64)).loss.value


def bco(b: Batch) -> Tensor:
    method = BCO(beta=0.2)
    policy, reference = (torch.cat([pair.chosen, pair.rejected]) for pair in (b.policy, b.reference))
    labels = torch.cat([b.labels, 1 - b.labels])
    shift = method.baseline(method.baseline_sums((policy - reference).detach(), labels))
    return method.mean_loss(policy, reference, labels, shift).loss.value


Loss = Callable[[Batch], Tensor]
#: What docs/methods.md says of TRL; TRL's loss, ours, and ours with that change.
DIFFERENCES: dict[str, tuple[Loss, Loss, Loss]] = {
    "ipo averages over tokens": (
        ipo,
        lambda b: b.ours(IPO(tau=0.2)),
        lambda b: b.ours(IPO(tau=0.2, length_normalise=True)),
    ),
    "hinge subtracts the reference, SLiC-HF does not": (
        lambda b: torch.relu(1 - b.ratio.margin).mean(),
        lambda b: b.ours(Hinge(beta=1, reference="none")),
        lambda b: b.ours(Hinge(beta=1)),
    ),
    "apo_zero adds 1": (
        lambda b: (1 - torch.sigmoid(0.2 * b.ratio.chosen) + torch.sigmoid(0.2 * b.ratio.rejected)).mean(),
        lambda b: b.ours(APOZero(beta=0.2)),
        lambda b: b.ours(APOZero(beta=0.2)) + 1,
    ),
    "apo_down adds 1": (
        lambda b: (torch.sigmoid(0.2 * b.ratio.chosen) + 1 - torch.sigmoid(0.2 * b.ratio.margin)).mean(),
        lambda b: b.ours(APODown(beta=0.2)),
        lambda b: b.ours(APODown(beta=0.2)) + 1,
    ),
    "sft is a mean over tokens": (
        of_tokens,
        lambda b: b.ours(SFT()),
        lambda b: b.ours(SFT()) * 8 / b.num_tokens.chosen.sum(),
    ),
    "cpo has the likelihood as a mean over tokens": (
        lambda b: -F.logsigmoid(0.2 * b.policy.margin).mean() + of_tokens(b),
        lambda b: b.ours(CPO(beta=0.2)),
        lambda b: b.ours(CPO(beta=0.2, likelihood_weight=0)) + of_tokens(b),
    ),
    "orpo has the likelihood as a mean over tokens, prompts included": (
        lambda b: likelihood_of_sequences(b) + orpo_odds(b),
        lambda b: b.ours(ORPO(odds_weight=0.3)),
        lambda b: (
            b.ours(ORPO(odds_weight=0.3)) + (b.policy.chosen / b.num_tokens.chosen).mean() + likelihood_of_sequences(b)
        ),
    ),
    "wpo's weights are aligned": (
        wpo,
        lambda b: b.ours(DPO(beta=0.2, pair_weight="likelihood")),
        wpo_with_the_alignment,
    ),
    "bco_pair has no shift, and adds over a pair": (
        lambda b: -(F.logsigmoid(0.2 * b.ratio.chosen) + F.logsigmoid(-0.2 * b.ratio.rejected)).mean(),
        bco,
        bco_without_a_shift,
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_trl_departs_from_the_paper_in_this_and_in_nothing_else(name: str) -> None:
    batch, (theirs, ours, changed) = Batch(), DIFFERENCES[name]
    expected = theirs(batch)
    assert abs(float((ours(batch) - expected).detach())) > 1e-3
    torch.testing.assert_close(changed(batch), expected, rtol=1e-12, atol=1e-12)
    slopes = [batch.gradient(loss) for loss in (ours(batch), changed(batch), expected)]
    torch.testing.assert_close(slopes[1], slopes[2], rtol=1e-10, atol=1e-12)
    assert float(slopes[2].abs().max()) > 1e-3
    if "adds 1" in name:  # which is all that differs
        torch.testing.assert_close(slopes[0], slopes[2], rtol=1e-12, atol=1e-14)
    else:
        assert float((slopes[0] - slopes[2]).abs().max()) > 1e-3
