"""LD-DPO's weighting: the reference's log-probs of first tokens, loss and gradient token by token, and stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from off_policy import metric_rows, off_policy_job, write_inputs
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from pipelines.plan import SeedPlan, make_plan
from pipelines.reference import PART_ROWS, ReferenceLogps, find_parts, weights_digest
from pipelines.shared_lengths import add_shared_logps, cut
from prefarena.config import DPO, Optimisation, Resources, parse_config
from prefarena.data.plan import largest_scored
from prefarena.data.tables import read_rows, write_rows
from prefarena.methods.simpo import SimPO
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.objectives.preference import PairLogps
from prefarena.records import PAIRS, REFERENCED_PAIRS, SHARED_PAIRS
from prefarena.settings.off_policy import Pairwise
from prefarena.stages import read_manifest
from prefarena.training.run_job import run_job
from prefarena.training.terms import PreferenceTerm, Shares
from prefarena.training.worker import Worker

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and pairs/, and in shared/ what the stage makes of them; its scores are computed here, without Ray."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_rows(read_rows(folder / "pairs"), folder / "scored" / "train_pairs" / "part-0.parquet", REFERENCED_PAIRS)
    shorter = folder / "cut" / "train_pairs"
    write_rows(cut(read_rows(folder / "pairs")), shorter / "part-0.parquet", PAIRS)
    model, cache, threads = str(folder / "model"), folder / "cache", torch.get_num_threads()
    parts = find_parts(shorter, cache, [2, weights_digest(model), "cpu", 1, largest_scored("cpu")], PART_ROWS)
    ReferenceLogps(model, None, "cpu", 1)(pa.Table.from_pylist([vars(part) for part in parts]))
    torch.set_num_threads(threads)
    add_shared_logps(folder / "scored", model, folder / "shared", cache=cache, resources=Resources())
    return folder


def token_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_both_responses_are_cut_to_the_shorter_one() -> None:
    alike = {"prompt_ids": [1], "rejected_ids": [5, 2], "source": "x", "score_rejected": None}
    rows = [
        {"id": "a", "chosen_ids": [3, 4, 2], "label": 1.0, "score_chosen": 2.5, **alike},
        {"id": "b", "chosen_ids": [3, 2], "label": 0.5, "score_chosen": None, **alike},
    ]
    found = cut(pa.Table.from_pylist(rows, PAIRS))
    assert found.schema == PAIRS and found.to_pylist() == [rows[0] | {"chosen_ids": [3, 4]}, rows[1]]


def test_the_stage_has_the_references_log_probs_of_the_first_tokens(inputs: Path) -> None:
    table, model = read_rows(inputs / "shared" / "train_pairs"), load_policy(inputs / "model")
    assert table.schema == SHARED_PAIRS and table.select(PAIRS.names) == read_rows(inputs / "pairs").select(PAIRS.names)
    assert read_manifest(inputs / "shared")["num_parts_computed"] == 0
    rows, num_cut = table.to_pylist(), 0
    for row in rows:
        shorter = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in SIDES:
            with torch.no_grad():
                logps = token_logps(model, row["prompt_ids"], row[f"{side}_ids"])
            found, whole = row[f"ref_{side}_shared_logp"], row[f"ref_{side}_logp"]
            assert found == pytest.approx(float(logps[:shorter].sum()), abs=1e-5)
            num_cut += len(logps) > shorter
            assert len(logps) > shorter or found == whole  # to the last bit
    assert num_cut > 20
    assert [file.name for file in sorted((inputs / "shared").iterdir())] == ["manifest.json", "train_pairs"]


METHODS: list[Pairwise] = [
    DPO(beta=0.3, tail_weight=0.4),
    DPO(beta=0.3, tail_weight=0.0),
    DPO(beta=0.3, tail_weight=0.4, length_normalise=True),
    SimPO(beta=2.0, margin=0.5, tail_weight=0.4),
]


def by_hand(method: Pairwise, chosen: Tensor, rejected: Tensor, row: dict[str, float]) -> Tensor:
    """The log-probs of arXiv 2409.06411, token by token, and the method's own loss of them."""
    shorter, weight, seen = min(len(chosen), len(rejected)), method.tail_weight, []
    for side, logps in zip(SIDES, (chosen, rejected), strict=True):
        policy = logps[:shorter].sum() + weight * logps[shorter:].sum()
        first, whole = row[f"ref_{side}_shared_logp"], row[f"ref_{side}_logp"]
        seen.append(policy if isinstance(method, SimPO) else policy - (first + weight * (whole - first)))
    if isinstance(method, SimPO) or (isinstance(method, DPO) and method.length_normalise):
        seen = [seen[0] / len(chosen), seen[1] / len(rejected)]
    h = (2.0 if isinstance(method, SimPO) else 0.3) * (seen[0] - seen[1])
    return softplus(-(h - 0.5 if isinstance(method, SimPO) else h))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.tail_weight}")
def test_loss_and_gradient_are_those_of_weighted_tokens(inputs: Path, method: Pairwise) -> None:
    generator, models = torch.Generator().manual_seed(1), [load_policy(inputs / "model").double() for _ in range(2)]
    noise = [0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in models[0].parameters()]
    for model in models:
        with torch.no_grad():
            for parameter, change in zip(model.parameters(), noise, strict=True):
                parameter.add_(change)
    rows = np.arange(20)
    term = PreferenceTerm(str(inputs / "shared" / "train_pairs"), method, Shares(Optimisation(), 1, 0), 0)
    found = term(LogProbs(models[0]), rows, torch.device("cpu")).loss.value
    table = read_rows(inputs / "shared" / "train_pairs").to_pylist()[:20]
    losses = []
    for row in table:
        chosen, rejected = (token_logps(models[1], row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES)
        losses.append(by_hand(method, chosen, rejected, row))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for loss in (found, expected):
        loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in models]
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    assert largest > 1e-3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * largest)


def test_a_weight_of_the_tail_needs_the_first_tokens_and_one_of_1_changes_nothing() -> None:
    ones = torch.ones(2)
    pair, half = PairLogps(-3 * ones, -2 * ones), PairLogps(-2 * ones, -2 * ones)
    plain = DPO().mean_loss(pair, half, ones, PairLogps(ones, ones)).loss.value
    assert torch.equal(DPO(tail_weight=1).mean_loss(pair, half, ones, PairLogps(ones, ones)).loss.value, plain)
    with pytest.raises(TypeError, match="first tokens"):
        DPO(tail_weight=0.5).mean_loss(pair, half, ones, PairLogps(ones, ones))
    output = DPO(tail_weight=0.5).mean_loss(pair, half, ones, PairLogps(ones, ones), (half, half))
    assert float(output.metrics["logps/chosen"].value) == -3  # of the whole response
    assert float(output.metrics["preference/margin"].value) == pytest.approx(0.1 * -0.5)


def test_training_lowers_the_loss(inputs: Path, tmp_path: Path) -> None:
    method = DPO(tail_weight=0.5, training=Optimisation(num_steps=12, batch_size=48, log_every=1, warmup_steps=0))
    job = off_policy_job(inputs, tmp_path / "ld", method)
    run_job(type(job)(**{**vars(job), "pairs": str(inputs / "shared" / "train_pairs")}), Worker(job.stage_dir))
    rows = metric_rows(tmp_path / "ld")
    assert len(rows) == 12 and rows[-1]["loss"] < rows[0]["loss"]


def test_the_stage_is_there_for_entries_that_weigh_the_tail_and_no_other_address_changes() -> None:
    def plan(*methods: dict[str, object]) -> SeedPlan:
        entries = [{"name": f"e{i}", "method": method} for i, method in enumerate(methods)]
        return make_plan(parse_config({"entries": entries}))[0]

    without, both = plan({"kind": "dpo"}), plan({"kind": "dpo"}, {"kind": "dpo", "tail_weight": 0.5})
    assert without.shared_lengths == {} and list(both.shared_lengths) == ["float32"]
    assert without.trained[0].training == both.trained[0].training != both.trained[1].training
    assert set(both.shared()) - set(without.shared()) == set(both.shared_lengths.values())
