"""Methods on single labelled responses: formulas, the baseline of the whole step, and pairs taken apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights, write_inputs, write_responses
from torch import Tensor
from transformers import PreTrainedModel
from workers import DyingWorker, KilledError, OneOfMany, Sharding

from prefarena.config import Optimisation
from prefarena.data.responses import mismatch, taken_apart
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.methods import discover
from prefarena.methods.bco import BCO
from prefarena.methods.kto import KTO
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.records import PAIRS, REFERENCED_RESPONSES
from prefarena.settings.unpaired import Unpaired
from prefarena.training.learner import Learner
from prefarena.training.off_policy import optimizer_step
from prefarena.training.run_job import run_job
from prefarena.training.terms import Shares
from prefarena.training.unpaired import UnpairedTerm
from prefarena.training.window import Window
from prefarena.training.worker import Worker

METHODS: list[Unpaired] = [KTO(), KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7), BCO(), BCO(beta=0.5)]


def named(method: Unpaired) -> str:
    return "-".join([method.kind, *map(str, method.model_dump(exclude_defaults=True))])


every = pytest.mark.parametrize("method", METHODS, ids=named)


def test_every_unpaired_method_is_tried_here() -> None:
    found = {kind for kind, method in discover().items() if issubclass(method, Unpaired)}
    assert found == {method.kind for method in METHODS}


# ---------------------------------------------------------------------------------------------- formulas


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def kto(method: KTO, ratio: Tensor, desirable: Tensor, z0: Tensor) -> Tensor:
    """Equations 7 and 8 of arXiv 2402.01306: lambda_y - v of each response."""
    good = method.desirable_weight - method.desirable_weight * sigma(method.beta * (ratio - z0))
    bad = method.undesirable_weight - method.undesirable_weight * sigma(method.beta * (z0 - ratio))
    return torch.where(desirable, good, bad)


def bco(method: BCO, ratio: Tensor, desirable: Tensor, delta: Tensor) -> Tensor:
    """Binary cross-entropy of arXiv 2404.04656."""
    reward = method.beta * ratio - delta
    return torch.where(desirable, torch.log1p(torch.exp(-reward)), torch.log1p(torch.exp(reward)))


FORMULAS: dict[str, Callable[..., Tensor]] = {"kto": kto, "bco": bco}


def baseline_by_hand(method: Unpaired, ratios: Tensor, mismatched: Tensor, labels: Tensor) -> Tensor:
    """The step's, without a gradient; labels are 0 and 1."""
    if isinstance(method, KTO):
        return mismatched.detach().mean().clamp(min=0)
    assert isinstance(method, BCO)
    rewards = method.beta * ratios.detach()
    kinds = [rewards[labels == label] for label in (0, 1)]
    return torch.stack([kind.mean() for kind in kinds if len(kind)]).mean()


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


# ------------------------------------------------------------------------------------- the whole step, brute force

WORKERS = (1, 2, 3)
BATCH, STEP = 24, 2
#: The responses with lower log-probs of mismatched ones under the reference, so that KTO's baseline is above zero.
TABLE = "above_zero"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_responses(folder)
    table = read_rows(folder / "responses")
    lower = pc.subtract(table["ref_mismatched_logp"], pa.scalar(1.5, pa.float32()))
    place = table.schema.get_field_index("ref_mismatched_logp")
    table = table.set_column(place, "ref_mismatched_logp", lower)
    write_rows(table, folder / "above_zero" / "part.parquet", REFERENCED_RESPONSES)
    return folder


def moved_policy(inputs: Path) -> PreTrainedModel:
    """A policy that is away from its reference, in float64."""
    model = load_policy(inputs / "model").double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    return model


def unpaired_term(inputs: Path, method: Unpaired, world_size: int, tokens: int) -> UnpairedTerm:
    training = Optimisation(batch_size=BATCH, micro_batch_tokens=tokens)
    return UnpairedTerm(str(inputs / TABLE), method, Shares(training, world_size, seed=7), pad_id=0)


def step(
    inputs: Path, method: Unpaired, worker: Worker, folder: Path, tokens: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradient of one optimizer step, as training takes it."""
    module = LogProbs(moved_policy(inputs))
    learner = Learner("model", module.eval(), Optimisation(batch_size=BATCH, max_grad_norm=1e9), worker)
    term, window = unpaired_term(inputs, method, worker.world_size, tokens), Window()
    optimizer_step(learner, [term], STEP, 0.0, worker, window)
    row = window.reduce(worker)
    gradients = {
        name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if worker.rank == 0:
        torch.save((row, gradients), folder)
    return row, gradients


def brute_force(inputs: Path, method: Unpaired) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, baseline and gradient of the step's rows: one response at a time through the model, and the formulas."""
    model, table = moved_policy(inputs).eval(), read_rows(inputs / TABLE)
    rows = [table.slice(int(row), 1).to_pylist()[0] for row in unpaired_term(inputs, method, 1, 8192).plan.rows(STEP)]

    def logp(prompt: list[int], response: list[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()

    own = torch.stack([logp(row["prompt_ids"], row["response_ids"]) - row["ref_logp"] for row in rows])
    with torch.no_grad():
        others = [logp(row["prompt_ids"], row["mismatched_ids"]) - row["ref_mismatched_logp"] for row in rows]
    labels = torch.tensor([row["label"] for row in rows])
    z = baseline_by_hand(method, own, torch.stack(others), labels)
    loss = FORMULAS[method.kind](method, own, labels > 0.5, z).mean()
    loss.backward()
    gradient = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), float(z), gradient


def run_as_one_of_many(rank: int, inputs: Path, root: Path) -> None:
    torch.set_num_threads(1)
    shardings: tuple[Sharding, ...] = ("none", "fsdp")
    for world_size in WORKERS[1:]:
        if rank >= world_size:
            continue
        meeting = f"file://{root}/rendezvous-{world_size}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        for sharding in shardings:
            for method in METHODS:
                worker = OneOfMany(str(root / "stage"), rank, world_size, sharding)
                step(inputs, method, worker, root / f"{named(method)}--{sharding}-{world_size}.pt", tokens=40)
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step of every method on two and three workers, whole copies and sharded, in many micro-batches."""
    root = tmp_path_factory.mktemp("runs")
    torch.multiprocessing.spawn(run_as_one_of_many, args=(inputs, root), nprocs=max(WORKERS))
    return root


@every
def test_baseline_loss_and_gradient_are_those_of_the_whole_step(
    inputs: Path, runs: Path, tmp_path: Path, method: Unpaired
) -> None:
    """However it is cut: in float64, but the division by three workers, whose third torch keeps in float32."""
    loss, z, gradient = brute_force(inputs, method)
    assert abs(z) > 1e-3 and max(float(value.abs().max()) for value in gradient.values()) > 1e-3
    found = {
        f"one, {tokens}": step(inputs, method, OneOfMany(str(tmp_path)), tmp_path / "x.pt", tokens)
        for tokens in (8192, 40, 1)
    }
    for path in sorted(runs.glob(f"{named(method)}--*.pt")):
        found[path.stem] = torch.load(path)
    assert len(found) == 7
    for where, (row, gradients) in found.items():
        assert row["loss"] == pytest.approx(loss, abs=1e-6) == row["loss/responses"]
        assert row["response/baseline"] == pytest.approx(z, abs=1e-6)
        for name, value in gradient.items():
            torch.testing.assert_close(gradients[f"model.{name}"], value, rtol=1e-6, atol=1e-8, msg=f"{where}: {name}")
        assert gradients.keys() == {f"model.{name}" for name in gradient}


def test_a_baseline_of_each_micro_batch_would_be_another_one(inputs: Path) -> None:
    """So that the test above can fail: what micro-batches would find for themselves."""
    method = KTO(beta=0.5)
    term, model = unpaired_term(inputs, method, 1, 40), LogProbs(moved_policy(inputs))
    learner = Learner("model", model.eval(), Optimisation(), worker := OneOfMany(str(inputs / "worker")))
    term.begin(STEP, learner, worker)
    whole, parts = term.plan.rows(STEP), term.plan.micro_batches(STEP, 0)
    assert len(parts) > 3 and sum(map(len, parts)) == len(whole)
    with torch.no_grad():
        alone = [method.baseline(term._sums(model, rows=rows, device=worker.device)) for rows in parts]
    assert term._baseline is not None
    assert max(abs(float(z) - float(term._baseline)) for z in alone) > 0.01


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["kto", "bco"])
def test_training_lowers_the_loss_and_resumes_bit_for_bit(inputs: Path, tmp_path: Path, kind: str) -> None:
    training = Optimisation(num_steps=12, batch_size=48, log_every=1, warmup_steps=0, checkpoint_every=5)
    method = discover()[kind](training=training, demonstration_weight=0.01)
    straight, broken = (off_policy_job(inputs, tmp_path / name, method) for name in ("straight", "broken"))
    run_job(straight, Worker(straight.stage_dir))
    with pytest.raises(KilledError):
        run_job(broken, DyingWorker(broken.stage_dir))
    run_job(broken, Worker(broken.stage_dir))
    rows = metric_rows(tmp_path / "straight")
    assert len(rows) == 12 and rows[-1]["loss/responses"] < rows[0]["loss/responses"]
    assert rows[-1]["logratio/desirable"] > rows[-1]["logratio/undesirable"] + 0.1
    assert rows[-1]["response/accuracy"] > 0.6
    found, expected = weights(tmp_path / "broken"), weights(tmp_path / "straight")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
