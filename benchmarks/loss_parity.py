"""Loss and gradient of each method on pairs and on single responses: Prefarena's against TRL 1.16's own code.

    python benchmarks/loss_parity.py [--data HH_ROWS.jsonl.gz] [--out FILE]

The first run makes TRL's environment, benchmarks/.venv-trl116, from benchmarks/requirements/trl-dpo.txt (TORCH_INDEX in
the environment: where pip finds a CPU build of torch).

Two batches: random log-probs of tokens, with the gradient by each of them; and pairs through a small random Llama (with
`--data` of raw HH-RLHF rows, else of random tokens), with the gradient by its weights. Policy and reference differ. In
float64, but where TRL casts to float32: ORPO, the alpha divergence, and its fused head, in whose place logits are read.
Where ours follows the paper and TRL does not, both are shown: how far they are apart, and that nothing else differs, by
ours computed in TRL's way. Ends with status 1 where a difference is larger than it should be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from preference_setting import Setting, hh_pairs
from random_pairs import MAX_PROMPT, MAX_RESPONSE, TokenPairs, hh_lengths, random_pairs, word_tokenizer
from sides import HERE, Report, environment_python, machine, versions, versions_in
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefarena.config import DPO, IPO, SFT, ScratchModel
from prefarena.methods import discover
from prefarena.methods.aot import AOT
from prefarena.methods.apo_down import APODown
from prefarena.methods.apo_zero import APOZero
from prefarena.methods.bco import BCO
from prefarena.methods.cpo import CPO
from prefarena.methods.discopop import DiscoPOP
from prefarena.methods.exo_pair import EXOPair
from prefarena.methods.f_dpo import FDPO
from prefarena.methods.hinge import Hinge
from prefarena.methods.kto import KTO
from prefarena.methods.nca_pair import NCAPair
from prefarena.methods.orpo import ORPO
from prefarena.methods.robust_dpo import RobustDPO
from prefarena.methods.simpo import SimPO
from prefarena.methods.sppo_hard import SPPOHard
from prefarena.modeling.load import load_policy, new_policy, save_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.packing import pack
from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import OffPolicy, Pairwise
from prefarena.settings.ranked import Ranked, StepPairs
from prefarena.settings.unpaired import Unpaired

ENVIRONMENT = HERE / ".venv-trl116"
REQUIREMENTS = HERE / "requirements" / "trl-dpo.txt"
#: Largest difference of losses, relative to the loss where it is above 1, and of gradients, relative to their norm.
TOLERANCE = 1e-6
#: Small, so that a gradient of every case can be kept; the vocabulary is that of `hh_pairs`.
MODEL = ScratchModel(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, vocab_size=8192)
SETTING = Setting("parity", "parity", num_steps=1, batch_size=8)

Trainer = Literal["dpo", "kto", "cpo", "orpo"]


@dataclass(frozen=True)
class Both:
    """What both sides know of a batch: log-probs of the policy and the reference, [B] of both responses, nats.

    shared: of as many first tokens as the shorter response has. mismatched: log-ratios of each of 2B responses' others.
    prompts: the policy's log-prob of the chosen sequences' prompts, and their numbers of tokens after the first; none
    where there is no model.
    """

    policy: PairLogps
    reference: PairLogps
    shared: tuple[PairLogps, PairLogps]
    num_tokens: PairLogps
    mismatched: Tensor
    prompts: tuple[Tensor, Tensor] | None

    @property
    def labels(self) -> Tensor:
        return torch.ones_like(self.policy.chosen)

    def rows(self, rows: slice) -> Both:
        def cut(pair: PairLogps) -> PairLogps:
            return PairLogps(pair.chosen[rows], pair.rejected[rows])

        shared = cut(self.shared[0]), cut(self.shared[1])
        return Both(cut(self.policy), cut(self.reference), shared, cut(self.num_tokens), self.mismatched, self.prompts)


@dataclass(frozen=True)
class Case:
    """A method of ours beside TRL's. difference: how TRL departs from the paper; in_their_way: ours, with that change.

    parts: TRL's micro-batches. only: a batch alone in which the case means something.
    """

    name: str
    method: OffPolicy
    trainer: Trainer
    settings: dict[str, Any]
    difference: str = ""
    in_their_way: Callable[[Both], Tensor] | None = None
    parts: int = 1
    dtype: str = "float64"
    only: Literal["", "given", "model"] = ""

    def told(self) -> dict[str, Any]:
        """What TRL's side is told."""
        own = {"name": self.name, "trainer": self.trainer, "settings": self.settings}
        return own | {"parts": self.parts, "dtype": self.dtype}


def ours(method: OffPolicy, both: Both) -> Tensor:
    """The loss of the batch as one optimizer step, []."""
    if isinstance(method, Pairwise):
        return method.mean_loss(both.policy, both.reference, both.labels, both.num_tokens, both.shared).loss.value
    if isinstance(method, Ranked):
        known = PairLogps(both.policy.chosen.detach(), both.policy.rejected.detach())
        step = StepPairs(known.double(), both.reference.double(), both.labels, torch.ones_like(both.labels))
        places = torch.arange(len(both.labels))
        return method.mean_loss(both.policy, both.reference, both.labels, step, places).loss.value
    assert isinstance(method, Unpaired)
    policy, reference = (torch.cat([pair.chosen, pair.rejected]) for pair in (both.policy, both.reference))
    labels = torch.cat([both.labels, 1 - both.labels])
    first = both.mismatched if method.baseline_of == "mismatched responses" else (policy - reference).detach()
    return method.mean_loss(policy, reference, labels, method.baseline(method.baseline_sums(first, labels))).loss.value


# ----------------------------------------------------------------------------------------------- the cases


def _per_token(both: Both) -> Tensor:
    """-log pi of the chosen responses, a mean over all their tokens, []."""
    return -both.policy.chosen.sum() / both.num_tokens.chosen.sum()


def _orpo(both: Both) -> Tensor:
    """ORPO's odds, beside the likelihood of whole sequences, a mean over all tokens; the odds alone without a model."""
    loss = ours(ORPO(odds_weight=0.3), both) + (both.policy.chosen / both.num_tokens.chosen).mean()
    if both.prompts is None:
        return loss
    logps, counts = both.prompts
    return loss - (logps + both.policy.chosen).sum() / (counts + both.num_tokens.chosen).sum()


def _no_shift(both: Both) -> Tensor:
    """BCO with a shift of 0; TRL adds both responses of a pair, ours is a mean over responses."""
    policy, reference = (torch.cat([pair.chosen, pair.rejected]) for pair in (both.policy, both.reference))
    labels = torch.cat([both.labels, 1 - both.labels])
    return 2 * BCO(beta=0.2).mean_loss(policy, reference, labels, torch.zeros((), dtype=torch.float64)).loss.value


def _in_halves(method: OffPolicy) -> Callable[[Both], Tensor]:
    return lambda both: (ours(method, both.rows(slice(0, 4))) + ours(method, both.rows(slice(4, 8)))) / 2


def _dpo(loss_type: str, **settings: Any) -> dict[str, Any]:
    return {"loss_type": [loss_type], "beta": 0.2} | settings


def _f(divergence: str, **settings: Any) -> dict[str, Any]:
    return _dpo("sigmoid", f_divergence_type=divergence, **settings)


_WEIGHED = DPO(beta=0.2, pair_weight="likelihood")
CASES = (
    Case("dpo", DPO(beta=0.2), "dpo", _dpo("sigmoid")),
    Case("dpo, a token's", DPO(beta=0.2, length_normalise=True), "dpo", _dpo("sigmoid_norm")),
    Case("dpo, tail_weight 0.4 (LD-DPO)", DPO(beta=0.2, tail_weight=0.4), "dpo", _dpo("sigmoid", ld_alpha=0.4)),
    Case("ipo, a token's", IPO(tau=0.2, length_normalise=True), "dpo", _dpo("ipo")),
    Case(
        "ipo", IPO(tau=0.2), "dpo", _dpo("ipo"), "averages log-ratios over tokens",
        lambda both: ours(IPO(tau=0.2, length_normalise=True), both),
    ),
    Case("hinge", Hinge(beta=0.2), "dpo", _dpo("hinge")),
    Case(
        "hinge, no reference (SLiC-HF)", Hinge(beta=0.2, reference="none"), "dpo", _dpo("hinge"),
        "subtracts the reference's log-probs", lambda both: ours(Hinge(beta=0.2), both),
    ),
    Case("robust_dpo", RobustDPO(beta=0.2, flip_rate=0.2), "dpo", _dpo("robust", label_smoothing=0.2)),
    Case("exo_pair", EXOPair(beta=0.2, label_smoothing=0.01), "dpo", _dpo("exo_pair", label_smoothing=0.01)),
    Case("nca_pair", NCAPair(beta=0.2), "dpo", _dpo("nca_pair")),
    Case("sppo_hard", SPPOHard(beta=0.2), "dpo", _dpo("sppo_hard")),
    Case(
        "apo_zero", APOZero(beta=0.2), "dpo", _dpo("apo_zero"), "adds 1, which changes no gradient",
        lambda both: ours(APOZero(beta=0.2), both) + 1,
    ),
    Case(
        "apo_down", APODown(beta=0.2), "dpo", _dpo("apo_down"), "adds 1, which changes no gradient",
        lambda both: ours(APODown(beta=0.2), both) + 1,
    ),
    Case("discopop", DiscoPOP(beta=0.2), "dpo", _dpo("discopop", discopop_tau=0.05)),
    Case("f_dpo, reverse KL", FDPO(beta=0.2, divergence="reverse_kl"), "dpo", _f("reverse_kl")),
    Case("f_dpo, forward KL", FDPO(beta=0.2, divergence="forward_kl"), "dpo", _f("forward_kl")),
    Case("f_dpo, Jensen-Shannon", FDPO(beta=0.2), "dpo", _f("js_divergence")),
    Case(
        "f_dpo, alpha 0.25", FDPO(beta=0.2, divergence="alpha", alpha=0.25), "dpo",
        _f("alpha_divergence", f_alpha_divergence_coef=0.75), dtype="float32",
        only="given",  # where float32 is enough: it holds log-probs of hundreds of nats to 3e-5 of one
    ),
    Case(
        "dpo, pair_weight likelihood (WPO)", _WEIGHED, "dpo", _dpo("sigmoid", use_weighting=True), only="given",
    ),
    Case("aot, paired", AOT(beta=0.2), "dpo", _dpo("aot")),
    Case("aot, unpaired", AOT(beta=0.2, form="unpaired"), "dpo", _dpo("aot_unpaired")),
    Case(
        "aot, paired, in two micro-batches", AOT(beta=0.2), "dpo", _dpo("aot"), "sorts each micro-batch by itself",
        _in_halves(AOT(beta=0.2)), parts=2, only="given",
    ),
    Case(
        "aot, unpaired, in two micro-batches", AOT(beta=0.2, form="unpaired"), "dpo", _dpo("aot_unpaired"),
        "sorts each micro-batch by itself", _in_halves(AOT(beta=0.2, form="unpaired")), parts=2,
    ),
    Case("sft", SFT(), "dpo", _dpo("sft"), "is a mean over tokens, not over sequences", _per_token),
    Case(
        "simpo", SimPO(beta=2.0, margin=1.0), "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    Case(
        "cpo, likelihood_weight 0", CPO(beta=0.2, likelihood_weight=0.0), "cpo", {"beta": 0.2, "cpo_alpha": 0.0},
    ),
    Case(
        "cpo", CPO(beta=0.2), "cpo", {"beta": 0.2, "cpo_alpha": 1.0}, "has the likelihood as a mean over tokens",
        lambda both: ours(CPO(beta=0.2, likelihood_weight=0.0), both) + _per_token(both), only="model",
    ),
    Case(
        "orpo", ORPO(odds_weight=0.3), "orpo", {"beta": 0.3},
        "has the likelihood as a mean over tokens, prompts included", _orpo,
    ),
    Case("kto", KTO(beta=0.2, desirable_weight=1.3), "kto", {"beta": 0.2, "desirable_weight": 1.3}),
    Case("bco", BCO(beta=0.2), "dpo", _dpo("bco_pair"), "has no shift, and adds over a pair", _no_shift),
)  # fmt: skip
#: Methods that TRL 1.16 does not have.
OURS_ALONE = {"mpo", "custom", "odpo"}


# ------------------------------------------------------------------------------------------------ our side


def _shorter(lengths: Tensor) -> Tensor:
    """[2B], in the order chosen, rejected of each pair in turn: the tokens of the shorter of both."""
    return lengths.view(-1, 2).amin(1).repeat_interleave(2)


def of_given(pairs: TokenPairs, given: dict[str, Tensor]) -> tuple[Both, list[Tensor]]:
    """From log-probs of tokens [2B, T-1], those of chosen sequences first."""
    lengths = torch.tensor([len(pair[side]) for side in (1, 2) for pair in pairs])
    starts = torch.tensor([len(pair[0]) for pair in pairs] * 2)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    place = torch.arange(given["policy"].shape[1])[None]
    first = place < (starts - 1 + shorter)[:, None]
    leaf = given["policy"].clone().requires_grad_()
    inside = given["policy"] != 0
    sides = [
        [PairLogps(*(values * mask).sum(1).chunk(2)) for values in (leaf, given["reference"])]
        for mask in (inside, inside & first)
    ]
    mismatched = (given["policy_others"] - given["reference_others"]).sum(1)
    counts = PairLogps(*lengths.double().chunk(2))
    return Both(sides[0][0], sides[0][1], (sides[1][0], sides[1][1]), counts, mismatched, None), [leaf]


def of_model(pairs: TokenPairs, folder: Path) -> tuple[Both, list[Tensor]]:
    """From the models, with the passes that training has: packed, each prompt once."""
    policy, reference = (LogProbs(load_policy(folder / name).double()) for name in ("policy", "reference"))
    prompts = [prompt for prompt, _, _ in pairs]
    answers = [list(pair[1:]) for pair in pairs]
    batch, found = pack(prompts, answers), []
    for module in (policy, reference):
        values = module(batch)[0]
        for sums in (batch.sums(values), batch.first_sums(values, _shorter(batch.lengths))):
            found.append(PairLogps(sums[0::2], sums[1::2]))
    twice, every = prompts + prompts, [answer for side in (0, 1) for answer in (both[side] for both in answers)]
    others = pack(twice, [[answer] for answer in every[-1:] + every[:-1]])
    with torch.no_grad():
        mismatched = others.sums(policy(others)[0]) - others.sums(reference(others)[0])
    whole = pack([ids[:1] for ids in prompts], [[ids[1:]] for ids in prompts])
    before = whole.sums(policy(whole)[0]), whole.lengths.double()
    held = [PairLogps(pair.chosen.detach(), pair.rejected.detach()) for pair in found[2:]]
    counts = batch.lengths.double()
    both = Both(found[0], held[0], (found[1], held[1]), PairLogps(counts[0::2], counts[1::2]), mismatched, before)
    return both, list(policy.model.parameters())


def gradient(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    slopes = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([slope.flatten().double() for slope in slopes])


# --------------------------------------------------------------------------------------------------- both


@dataclass(frozen=True)
class Difference:
    """Of losses, and of gradients relative to TRL's norm."""

    loss: float
    gradient: float

    @property
    def is_none(self) -> bool:
        return max(self.loss, self.gradient) <= TOLERANCE

    def __str__(self) -> str:
        return f"{self.loss:10.1e}{self.gradient:10.1e}"


def difference(loss: Tensor, leaves: list[Tensor], theirs: tuple[float, Tensor]) -> Difference:
    own, (other, slopes) = gradient(loss, leaves), theirs
    return Difference(
        abs(float(loss.detach()) - other) / max(1.0, abs(other)), float((own - slopes).norm() / slopes.norm())
    )


def compare(cases: list[Case], both: Both, leaves: list[Tensor], found: Any) -> tuple[list[str], bool]:
    """Lines of a table, and whether every difference is as it should be."""
    lines, right = [f"  {'':38}{'loss':>10}{'gradient':>10}"], True
    for case in cases:
        theirs = float(found[f"{case.name}/loss"]), torch.from_numpy(found[f"{case.name}/gradient"])
        own = difference(ours(case.method, both), leaves, theirs)
        if case.in_their_way is None:
            right &= own.is_none
            lines.append(f"  {case.name:38}{own}  {'the same' if own.is_none else 'NOT THE SAME'}")
            continue
        changed = difference(case.in_their_way(both), leaves, theirs)
        right &= changed.is_none and not own.is_none
        verdict = f"TRL {case.difference}" if changed.is_none and not own.is_none else "NOT EXPLAINED"
        lines += [f"  {case.name:38}{own}  {verdict}", f"  {'    in TRL’s way':38}{changed}"]
    return lines, right


def trl(python: str, spec: dict[str, Any], folder: Path) -> Any:
    """What TRL's side finds."""
    path = folder / "spec.json"
    path.write_text(json.dumps(spec | {"found": str(folder / "found.npz")}), encoding="utf-8")
    done = subprocess.run([python, str(HERE / "trl_losses.py"), str(path)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL's side failed:\n{done.stderr[-4000:]}")
    return np.load(folder / "found.npz")


def given_log_probs(pairs: TokenPairs, seed: int) -> dict[str, Tensor]:
    """Random log-probs of response tokens, [2B, T-1] float64, chosen sequences first; zero elsewhere.

    Of the policy and the reference, and of both where each prompt is followed by the response of the row before.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.tensor([len(pair[0]) for pair in pairs] * 2)
    answers = torch.tensor([len(pair[side]) for side in (1, 2) for pair in pairs])
    found = {}
    for kind, lengths in (("", answers), ("_others", answers.roll(1))):
        place = torch.arange(int((prompts + lengths).max()) - 1)
        inside = (place >= prompts[:, None] - 1) & (place < (prompts + lengths)[:, None] - 1)
        for name in ("policy", "reference"):
            drawn = -torch.rand(inside.shape, dtype=torch.float64, generator=generator) - 0.01
            found[f"{name}{kind}"] = drawn * inside
    found["reference_others"] *= 1.2  # so that KTO's baseline is above zero
    return found


def write_models(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A policy and a reference that is another one, with weights three times as large as a new model's."""
    for seed, name in enumerate(("policy", "reference")):
        model = new_policy(MODEL, tokenizer, MAX_PROMPT + MAX_RESPONSE, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        save_policy(model, tokenizer, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="raw HH-RLHF rows, jsonl(.gz); else random tokens with their lengths")
    parser.add_argument("--out", type=Path, help="also write the result there")
    arguments = parser.parse_args()
    missing = set(discover()) - {case.method.kind for case in CASES} - OURS_ALONE
    if missing:
        sys.exit(f"no case for {', '.join(sorted(missing))}")
    python, report, right = environment_python(ENVIRONMENT, REQUIREMENTS), Report(arguments.out), True
    names = ("transformers", "torch")
    report.say([
        f"Losses and gradients. TRL's environment: {versions_in(python, 'trl', *names)}; ours: {versions(*names)}",
        machine(),
        f"Same: losses to {TOLERANCE:g} of themselves (or of 1), gradients to {TOLERANCE:g} of their norm.",
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.data is not None:
            pairs, tokenizer = hh_pairs(arguments.data, SETTING, folder / "tokenizer")
        else:
            tokenizer = word_tokenizer(MODEL.vocab_size)
            pairs = random_pairs(hh_lengths(SETTING.batch_size, SETTING.seed), MODEL.vocab_size, SETTING.seed)
        write_models(tokenizer, folder)
        given = given_log_probs(pairs, seed=1)
        arrays: dict[str, Any] = {key: value.numpy() for key, value in given.items()}
        np.savez(folder / "given.npz", **arrays)
        spec = {"pairs": pairs, "pad": tokenizer.pad_token_id, "given": str(folder / "given.npz")}
        spec |= {key: str(folder / key) for key in ("policy", "reference", "output")}
        source = "pairs of HH-RLHF" if arguments.data else "pairs of random tokens"
        for batch, title in (("given", "random log-probs"), ("model", f"{source} through a random Llama")):
            cases = [case for case in CASES if case.only in ("", batch)]
            told = {"cases": [case.told() for case in cases], "with_model": batch == "model"}
            found = trl(python, spec | told, folder)
            both, leaves = of_given(pairs, given) if batch == "given" else of_model(pairs, folder)
            lines, as_it_should = compare(cases, both, leaves, found)
            report.say(["", f"{title}, {len(pairs)} pairs", *lines])
            right &= as_it_should
    report.save()
    if not right:
        sys.exit("a difference is not as it should be")


if __name__ == "__main__":
    main()
