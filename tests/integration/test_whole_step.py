"""Losses that depend on the whole optimizer step: the same on one, two or three workers, however the step is cut.

KTO's and BCO's baselines and AOT's ranks, with whole copies (DDP) and sharded ones (FSDP2), against one row at a time
through the model and the formulas.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import unpaired_formulas
from off_policy import write_inputs, write_responses
from sorted_pairs import aot
from torch import Tensor
from transformers import PreTrainedModel
from workers import OneOfMany, Sharding

from prefarena.config import Optimisation
from prefarena.data.tables import read_rows, write_rows
from prefarena.methods.aot import AOT
from prefarena.methods.bco import BCO
from prefarena.methods.kto import KTO
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.objectives.preference import PairLogps
from prefarena.records import REFERENCED_PAIRS, REFERENCED_RESPONSES
from prefarena.settings.ranked import Ranked
from prefarena.settings.unpaired import Unpaired
from prefarena.training.learner import Learner
from prefarena.training.off_policy import optimizer_step
from prefarena.training.ranked import RankedTerm
from prefarena.training.terms import Shares, Term
from prefarena.training.unpaired import UnpairedTerm
from prefarena.training.window import Window
from prefarena.training.worker import Worker

METHODS: list[Unpaired | Ranked] = [
    KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7),
    BCO(beta=0.5),
    AOT(beta=0.5),
    AOT(beta=0.5, form="unpaired"),
]
WORKERS = (1, 2, 3)
#: Of 48 pairs the step has 12 that end an epoch and 24 that begin the next, some of them the same.
BATCH, STEP = 36, 1
#: The responses with lower log-probs of mismatched ones under the reference, so that KTO's baseline is above zero; and
#: the pairs with labels of all kinds, in quarters, and other log-probs under the reference.
TABLE, LABELLED = "above_zero", "labelled"
_QUARTERS = (1.0, 0.75, 0.0, 0.5)


def named(method: Unpaired | Ranked) -> str:
    return "-".join([method.kind, *map(str, method.model_dump(exclude_defaults=True).values())])


every = pytest.mark.parametrize("method", METHODS, ids=named)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    table = read_rows(write_responses(folder))
    lower = pc.subtract(table["ref_mismatched_logp"], pa.scalar(1.5, pa.float32()))
    place = table.schema.get_field_index("ref_mismatched_logp")
    table = table.set_column(place, "ref_mismatched_logp", lower)
    write_rows(table, folder / TABLE / "part.parquet", REFERENCED_RESPONSES)
    rows = read_rows(folder / "pairs").to_pylist()
    for number, row in enumerate(rows):
        row["label"] = _QUARTERS[number % 4]
        row["ref_chosen_logp"] -= 0.3 * (number % 7)
    write_rows(pa.Table.from_pylist(rows, REFERENCED_PAIRS), folder / LABELLED / "part.parquet", REFERENCED_PAIRS)
    return folder


def moved_policy(inputs: Path) -> PreTrainedModel:
    """A policy that is away from its reference, in float64."""
    model = load_policy(inputs / "model").double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    return model


def term_of(inputs: Path, method: Unpaired | Ranked, world_size: int, tokens: int) -> Term:
    training = Optimisation(batch_size=BATCH, micro_batch_tokens=tokens)
    shares = Shares(training, world_size, seed=7)
    if isinstance(method, Unpaired):
        return UnpairedTerm(str(inputs / TABLE), method, shares, pad_id=0)
    return RankedTerm(str(inputs / LABELLED), method, shares, pad_id=0)


def step(
    inputs: Path, method: Unpaired | Ranked, worker: Worker, folder: Path, tokens: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradient of one optimizer step, as training takes it."""
    module = LogProbs(moved_policy(inputs))
    learner = Learner("model", module.eval(), Optimisation(batch_size=BATCH, max_grad_norm=1e9), worker)
    term, window = term_of(inputs, method, worker.world_size, tokens), Window()
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


def brute_force(inputs: Path, method: Unpaired | Ranked) -> tuple[float, float | None, dict[str, Tensor]]:
    """Loss, baseline if there is one, and gradient of the step's rows: one response at a time through the model."""
    model = moved_policy(inputs).eval()
    table = read_rows(inputs / (TABLE if isinstance(method, Unpaired) else LABELLED))
    rows = [table.slice(int(row), 1).to_pylist()[0] for row in term_of(inputs, method, 1, 8192).plan.rows(STEP)]
    assert len({row["id"] for row in rows}) < BATCH or isinstance(method, Unpaired)

    def logp(prompt: list[int], response: list[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()

    labels, baseline = torch.tensor([row["label"] for row in rows]), None
    if isinstance(method, Unpaired):
        own = torch.stack([logp(row["prompt_ids"], row["response_ids"]) - row["ref_logp"] for row in rows])
        with torch.no_grad():
            others = [logp(row["prompt_ids"], row["mismatched_ids"]) - row["ref_mismatched_logp"] for row in rows]
        z = unpaired_formulas.baseline_by_hand(method, own, torch.stack(others), labels)
        loss, baseline = unpaired_formulas.FORMULAS[method.kind](method, own, labels > 0.5, z).mean(), float(z)
    else:
        assert isinstance(method, AOT)
        policy, reference = (
            PairLogps(*(torch.stack([take(row, side) for row in rows]) for side in ("chosen", "rejected")))
            for take in (
                lambda row, side: logp(row["prompt_ids"], row[f"{side}_ids"]),
                lambda row, side: torch.tensor(row[f"ref_{side}_logp"], dtype=torch.float64),
            )
        )
        loss = aot(method, policy, reference, labels, parts=4)
    loss.backward()
    gradient = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), baseline, gradient


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
def test_loss_and_gradient_are_those_of_the_whole_step(
    inputs: Path, runs: Path, tmp_path: Path, method: Unpaired | Ranked
) -> None:
    """However it is cut: in float64, but the division by three workers, whose third torch keeps in float32.

    And but for transformers' norms, which round to float32: that is seen where the two responses of a pair cancel, so
    numbers that are small beside the largest of a gradient are held to a millionth of that one.
    """
    loss, baseline, gradient = brute_force(inputs, method)
    largest = max(float(value.abs().max()) for value in gradient.values())
    assert largest > 1e-3
    smallest = 1e-8 if isinstance(method, Unpaired) else 1e-6 * largest
    found = {
        f"one, {tokens}": step(inputs, method, OneOfMany(str(tmp_path)), tmp_path / "x.pt", tokens)
        for tokens in (8192, 40, 1)
    }
    for path in sorted(runs.glob(f"{named(method)}--*.pt")):
        found[path.stem] = torch.load(path)
    assert len(found) == 7
    for where, (row, gradients) in found.items():
        own = "loss/responses" if isinstance(method, Unpaired) else "loss/preference"
        assert row["loss"] == pytest.approx(loss, abs=1e-6) == row[own]
        if baseline is not None:
            assert abs(baseline) > 1e-3 and row["response/baseline"] == pytest.approx(baseline, abs=1e-6)
        for name, value in gradient.items():
            torch.testing.assert_close(
                gradients[f"model.{name}"], value, rtol=1e-6, atol=smallest, msg=f"{where}: {name}"
            )
        assert gradients.keys() == {f"model.{name}" for name in gradient}


def test_a_baseline_of_each_micro_batch_would_be_another_one(inputs: Path) -> None:
    """So that the test above can fail: what micro-batches would find for themselves."""
    method = KTO(beta=0.5)
    term, model = term_of(inputs, method, 1, 40), LogProbs(moved_policy(inputs))
    assert isinstance(term, UnpairedTerm)
    learner = Learner("model", model.eval(), Optimisation(), worker := OneOfMany(str(inputs / "worker")))
    term.begin(STEP, learner, worker)
    whole, parts = term.plan.rows(STEP), term.plan.micro_batches(STEP, 0)
    assert len(parts) > 3 and sum(map(len, parts)) == len(whole)
    with torch.no_grad():
        alone = [method.baseline(term._sums(model, rows=rows, device=worker.device)) for rows in parts]
    assert term._baseline is not None
    assert max(abs(float(z) - float(term._baseline)) for z in alone) > 0.01
