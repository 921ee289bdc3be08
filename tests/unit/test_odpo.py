"""ODPO, and the scores of both responses on their way from rows, judges and the language's reward to its loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from off_policy import write_inputs
from torch import Tensor

from pipelines.checks import check_input
from pipelines.compare import all_stages
from pipelines.pair_scores import check_pair_scores
from pipelines.plan import SeedPlan, make_plan
from pipelines.reference import PART_ROWS, ReferenceLogps, add_reference_logps, find_parts, weights_digest
from pipelines.shared_lengths import cut
from prefarena.config import Comparison, DrawnPairs, Optimisation, Resources, TextTask, parse_config
from prefarena.data.labels import scores_of
from prefarena.data.plan import largest_scored
from prefarena.data.preparation import COLUMNS, prepare_pairs
from prefarena.data.sources import Chunk
from prefarena.data.splits import NONE_HELD_OUT
from prefarena.data.tables import read_rows, write_rows
from prefarena.data.token_tables import TokenTables
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.methods.odpo import ODPO
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.objectives.preference import PairLogps
from prefarena.records import PAIR_SCORES, PAIRS, REFERENCED_PAIRS, SHARED_PAIRS, conformed
from prefarena.stages import write_manifest
from prefarena.tasks.annotation import Answered, Contest, contests_of_scores, make_pairs
from prefarena.training.terms import PreferenceTerm, Shares

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------- the formula


def one_pair(method: ODPO, gap: float, label: float = 1.0) -> tuple[float, float, dict[str, float]]:
    """Loss, slope by the chosen log-prob, and metrics of a pair with h = 0.3 x 2.5."""
    chosen = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    policy = PairLogps(chosen, torch.tensor([-4.0]).double())
    reference = PairLogps(torch.tensor([-3.0]).double(), torch.tensor([-4.5]).double())
    labels, gaps, two = (torch.tensor([value], dtype=torch.float64) for value in (label, gap, 2.0))
    output = method.mean_loss(policy, reference, labels, PairLogps(two, two), None, gaps)
    (slope,) = torch.autograd.grad(output.loss.total, chosen)
    return (
        float(output.loss.value.detach()),
        float(slope),
        {name: float(mean.value) for name, mean in output.metrics.items()},
    )


def minus_log_sigma(x: float) -> float:
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize("gap", [3.0, 1.0, 0.25, 0.01])
def test_the_loss_is_the_papers(gap: float) -> None:
    """As in the authors' code: -log sigma(h - alpha log(score_w - score_l))."""
    h = 0.3 * (1.0 - 0.5)
    loss, slope, metrics = one_pair(ODPO(beta=0.3, alpha=0.5), gap)
    assert loss == pytest.approx(minus_log_sigma(h - 0.5 * math.log(gap)), rel=1e-12)
    assert slope == pytest.approx(-0.3 / (1 + math.exp(h - 0.5 * math.log(gap))), rel=1e-12)
    assert metrics["preference/margin"] == pytest.approx(h) and metrics["preference/left_out"] == 0
    assert metrics["preference/offset"] == pytest.approx(0.5 * math.log(gap))


@pytest.mark.parametrize("gap", [3.0, 0.0, -2.0])
def test_a_linear_offset_is_the_margin_of_llama_2_and_of_trls_reward_trainer(gap: float) -> None:
    """-log sigma(r_w - r_l - m(r)), with beta log-ratios as the rewards and the gap between the scores as m."""
    loss, slope, metrics = one_pair(ODPO(beta=0.3, scaling="linear"), gap)
    assert loss == pytest.approx(minus_log_sigma(0.3 * 1.0 - 0.3 * 0.5 - gap), rel=1e-12)
    assert slope < 0 and metrics["preference/offset"] == gap and metrics["preference/left_out"] == 0


@pytest.mark.parametrize("gap", [0.0, -1e-9, -5.0])
def test_with_a_logarithm_a_winner_that_scores_no_higher_costs_nothing(gap: float) -> None:
    """It is the limit of ever smaller gaps: the offset falls without a bound."""
    loss, slope, metrics = one_pair(ODPO(), gap)
    assert (loss, slope) == (0.0, 0.0)
    assert metrics["preference/left_out"] == 1 and metrics["preference/offset"] == 0
    near, _, _ = one_pair(ODPO(), 1e-9)
    assert 0 < near < 1e-8


def test_with_a_soft_label_each_ordering_has_the_offset_of_its_own_gap() -> None:
    h, gap, label = 0.3 * 0.5, 1.5, 0.8
    loss, _, _ = one_pair(ODPO(beta=0.3, scaling="linear"), gap, label)
    expected = label * minus_log_sigma(h - gap) + (1 - label) * minus_log_sigma(-h + gap)
    assert loss == pytest.approx(expected, rel=1e-12)
    loss, _, _ = one_pair(ODPO(beta=0.3), gap, label)
    assert loss == pytest.approx(label * minus_log_sigma(h - math.log(gap)), rel=1e-12)
    loss, _, _ = one_pair(ODPO(beta=0.3), -gap, label)  # the rejected response scores higher
    assert loss == pytest.approx((1 - label) * minus_log_sigma(-h - math.log(gap)), rel=1e-12)


def test_without_scores_there_is_no_loss() -> None:
    ones = torch.ones(2)
    pair = PairLogps(-ones, -2 * ones)
    with pytest.raises(TypeError, match="odpo needs the scores of both responses"):
        ODPO().mean_loss(pair, pair, ones, pair)


# ------------------------------------------------------------------------------------- from rows to the loss


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        ({"score_chosen": 8, "score_rejected": 6.5}, (8.0, 6.5)),
        ({"chosen_score": -1.0, "rejected_score": 2}, (-1.0, 2.0)),
        ({"chosen-rating": 5.0, "rejected-rating": 4.0}, (5.0, 4.0)),
        ({"score_chosen": 1.0, "score_rejected": 2.0, "rating_chosen": 9.0, "rating_rejected": 8.0}, (1.0, 2.0)),
        ({"score_chosen": None, "score_rejected": 2.0, "rating_chosen": 9.0, "rating_rejected": 8.0}, (9.0, 8.0)),
        ({"score_chosen": 1.0}, None),
        ({"score_chosen": math.nan, "score_rejected": 1.0}, None),
        ({"score_chosen": "8", "score_rejected": "6"}, None),
        ({"score_chosen": True, "score_rejected": False}, None),
        ({"score_chosen": 10**400, "score_rejected": 1}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_scores_are_the_first_two_columns_that_hold_numbers(row: dict[str, Any], scores: object) -> None:
    assert scores_of(row) == scores


def test_a_file_with_scores_becomes_pairs_with_log_probs_and_the_loss_is_that_of_every_row(tmp_path: Path) -> None:
    """The rows of a jsonl file in UltraFeedback's form, through the stages' own functions, to loss and gradient.

    A row at a time by hand, in float64; with the tokens of the longer response's end weighing less; and the same in
    micro-batches.
    """
    inputs = write_inputs(tmp_path / "inputs")
    task = TextTask(data="ultra.jsonl", max_prompt_tokens=8, max_response_tokens=6)
    rows = [
        {"prompt": f"{'abcde'[i % 5]} {'abcde'[i // 5 % 5]}", "chosen": "a c", "rejected": "e d b"[: 1 + 2 * (i % 3)],
         "score_chosen": 5.0 + i / 4, "score_rejected": 5.25}
        for i in range(12)
    ]  # fmt: skip
    chunk = Chunk("ultra.jsonl", 1, "lines", "".join(json.dumps(row) + "\n" for row in rows).encode())
    tokenizer = Tokenizer.load(inputs / "model", None, task)
    with TokenTables(tmp_path / "data") as tables:
        tables.add(prepare_pairs(chunk, task, tokenizer, shares=NONE_HELD_OUT))
    pairs = tmp_path / "data" / "train_pairs"
    found = read_rows(pairs)
    assert found.schema == PAIRS and found.num_rows == 12
    assert sorted(found["score_chosen"].to_pylist()) == [row["score_chosen"] for row in rows]

    scored = score(tmp_path, inputs / "model")
    table = read_rows(scored)
    assert table.schema == REFERENCED_PAIRS and table.select(PAIRS.names) == found
    shared = [row | shared_logps(inputs / "model", row) for row in table.to_pylist()]
    write_rows(pa.Table.from_pylist(shared, SHARED_PAIRS), tmp_path / "shared" / "part.parquet", SHARED_PAIRS)
    for method in (ODPO(beta=0.7, alpha=0.5), ODPO(beta=0.7, scaling="linear", tail_weight=0.4)):
        model = load_policy(inputs / "model").double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        path = scored if method.tail_weight == 1 else tmp_path / "shared"
        term = PreferenceTerm(str(path), method, Shares(Optimisation(), 1, 0), 0)
        expected = torch.stack([by_hand(method, model, row) for row in shared]).mean()
        whole = term(LogProbs(model), np.arange(12), CPU).loss
        parts = [term(LogProbs(model), np.array(own), CPU).loss for own in ([7, 3, 0], [1, 2, 4, 5], [6, 8, 9, 10, 11])]
        cut_up = (parts[0] + parts[1] + parts[2]).value
        gradients = [gradient_of(model, loss) for loss in (expected, whole.value, cut_up)]
        for loss, gradient in zip((whole.value, cut_up), gradients[1:], strict=True):
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=1e-7)
        assert float(gradients[0].abs().max()) > 1e-3


def score(folder: Path, model: Path) -> Path:
    """The stage `logps`, whose scores are computed here, without Ray."""
    cache, threads = folder / "cache", torch.get_num_threads()
    for split in ("train_pairs", "test_pairs"):
        parts = find_parts(
            folder / "data" / split, cache, [2, weights_digest(model), "cpu", 1, largest_scored("cpu")], PART_ROWS
        )
        ReferenceLogps(str(model), None, "cpu", 1)(pa.Table.from_pylist([vars(part) for part in parts]))
    torch.set_num_threads(threads)
    add_reference_logps(folder / "data", str(model), folder / "logps", cache=cache, resources=Resources())
    return folder / "logps" / "train_pairs"


def logps_of(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def shared_logps(model: Path, row: dict[str, Any]) -> dict[str, float]:
    shorter, policy = min(len(row["chosen_ids"]), len(row["rejected_ids"])), load_policy(model)
    with torch.no_grad():
        return {
            f"ref_{side}_shared_logp": float(logps_of(policy, row["prompt_ids"], row[f"{side}_ids"])[:shorter].sum())
            for side in ("chosen", "rejected")
        }


def by_hand(method: ODPO, model: Any, row: dict[str, Any]) -> Tensor:
    """The loss of a row of SHARED_PAIRS."""
    shorter, seen = min(len(row["chosen_ids"]), len(row["rejected_ids"])), []
    for side in ("chosen", "rejected"):
        logps = logps_of(model, row["prompt_ids"], row[f"{side}_ids"])
        policy = logps[:shorter].sum() + method.tail_weight * logps[shorter:].sum()
        first, whole = row[f"ref_{side}_shared_logp"], row[f"ref_{side}_logp"]
        seen.append(policy - (first + method.tail_weight * (whole - first)))
    h, gap = method.beta * (seen[0] - seen[1]), row["score_chosen"] - row["score_rejected"]
    if method.scaling == "linear":
        return torch.log1p(torch.exp(-(h - method.alpha * gap)))
    return torch.log1p(gap**method.alpha * torch.exp(-h)) if gap > 0 else 0 * h


def gradient_of(model: Any, loss: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


# -------------------------------------------------------------------------------------------- where they come from


def test_drawn_pairs_keep_their_annotators_scores_and_a_turned_one_keeps_them_with_the_responses() -> None:
    prompts = [Answered(f"p{i}", [1, i], "train", [[i, 7], [i, 8], [i, 9]], 0, 0) for i in range(20)]
    own = {(i, last): float(10 * i + last**2) for i in range(20) for last in (7, 8, 9)}
    plain, noisy = DrawnPairs(flip_share=0.25), DrawnPairs(annotators=({"noise": 20.0},))  # type: ignore[arg-type]
    for settings in (plain, noisy):
        contests = [contests_of_scores(p, np.array([own[r[0], r[1]] for r in p.responses]), settings) for p in prompts]
        table = make_pairs(prompts, contests, settings)[0]["train"]
        assert table.schema == PAIRS and table.num_rows == 60
        rows = table.to_pylist()
        truth = [[own[tuple(row[f"{side}_ids"])] for side in ("chosen", "rejected")] for row in rows]  # type: ignore[index]
        if settings is plain:
            assert [[row[name] for name in PAIR_SCORES] for row in rows] == truth
            assert (
                sum(row["score_chosen"] < row["score_rejected"] for row in rows) == 15
            )  # those that were turned round
        else:  # what orders the pair is what the annotator saw, noise included
            assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
            assert any(chosen < rejected for chosen, rejected in truth)


def test_a_judge_that_compares_without_scoring_leaves_none() -> None:
    prompts = [Answered("p", [1], "train", [[7], [8]], 0, 0), Answered("q", [1, 2], "test", [[7], [8]], 0, 0)]
    tables, _ = make_pairs(prompts, [[Contest(0, 1, 1.0)], [Contest(0, 1, 0.0)]], DrawnPairs())
    assert [tables[split][name].to_pylist() for split in tables for name in PAIR_SCORES] == [[None]] * 4


# ------------------------------------------------------------------------------------------------- refusals


def text_config(folder: Path, rows: list[dict[str, Any]], entry: dict[str, Any], **task: Any) -> Comparison:
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "output": str(folder / "runs"), "task": {"kind": "text", "data": str(folder / "data.jsonl"), **task},
        "model": {"kind": "scratch", "hidden_size": 64}, "entries": [entry],
    }  # fmt: skip
    return Comparison.model_validate(tree)


ODPO_ENTRY = {"name": "offset", "method": {"kind": "odpo"}}


def row(i: int, **scores: Any) -> dict[str, Any]:
    return {"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no", **scores}


def test_data_without_scores_are_refused_before_any_work_and_only_where_something_learns_from_them(
    tmp_path: Path,
) -> None:
    scored = [row(i, score_chosen=2, score_rejected=1.5) for i in range(20)]
    check_input(text_config(tmp_path / "good", scored, ODPO_ENTRY))
    some = [*scored, row(20, score_chosen=2), row(21, margin=0.5)]
    check_input(text_config(tmp_path / "dpo", some, {"name": "dpo", "method": {"kind": "dpo"}}))
    with pytest.raises(UserError) as caught:
        check_input(text_config(tmp_path / "some", some, ODPO_ENTRY))
    said = str(caught.value)
    assert "2 of its first 22 rows have no scores of both answers (numbers in columns such as score_chosen" in said
    assert said.endswith("entry 'offset' (kind: odpo) learns from them") and "\n" not in said


def test_a_pairwise_judge_has_no_scores_to_learn_from() -> None:
    judge = {"kind": "pairwise", "base_url": "http://localhost:1/v1", "model": "m"}
    tree = {
        "task": {"kind": "text", "data": "x/y", "pairs": {"annotators": [{"judge": judge}]}},
        "judge": {"kind": "function", "function": "prefarena.judges.sentiment:valence"}, "entries": [ODPO_ENTRY],
    }  # fmt: skip
    with pytest.raises(UserError, match="entry 'offset': odpo learns from scores of both responses, but a pairwise"):
        parse_config(tree)


def finished(plan: SeedPlan, folder: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    write_rows(pa.Table.from_pylist(rows, schema), folder / "train_pairs" / "part-0.parquet", schema)
    write_manifest(folder, {})


def test_finished_stages_without_scores_are_refused(tmp_path: Path) -> None:
    """Those of an earlier version, which the new columns leave where they were, and pairs that lack some."""
    config = text_config(tmp_path, [row(0, score_chosen=2, score_rejected=1)] * 2, ODPO_ENTRY)
    plans = make_plan(config)
    check_pair_scores(config, plans)  # nothing is finished
    rows = [
        {"id": f"{i}", "prompt_ids": [1], "chosen_ids": [3, 2], "rejected_ids": [4, 2], "label": 1.0, "source": "x",
         "score_chosen": 2.0, "score_rejected": 1.0 if i else None}
        for i in range(3)
    ]  # fmt: skip
    older = pa.schema([field for field in PAIRS if field.name not in PAIR_SCORES])
    finished(plans[0], plans[0].pairs.folder, rows, older)
    with pytest.raises(UserError) as caught:
        check_pair_scores(config, plans)
    assert plans[0].pairs.folder.name in str(caught.value) and "delete them" in str(caught.value)
    write_rows(pa.Table.from_pylist(rows, PAIRS), plans[0].pairs.folder / "train_pairs" / "part-0.parquet", PAIRS)
    with pytest.raises(UserError, match="1 of 3 training pairs have none"):
        check_pair_scores(config, plans)
    others = text_config(tmp_path, [row(0)] * 2, {"name": "dpo", "method": {"kind": "dpo"}})
    check_pair_scores(others, make_plan(others))


def test_tables_of_an_earlier_version_are_read_as_pairs_without_scores(tmp_path: Path) -> None:
    older = pa.schema([field for field in REFERENCED_PAIRS if field.name not in PAIR_SCORES])
    rows = [
        {"id": "a", "prompt_ids": [1], "chosen_ids": [3, 4, 2], "rejected_ids": [5, 2], "label": 1.0, "source": "x",
         "ref_chosen_logp": -1.0, "ref_rejected_logp": -2.0}
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, older)
    found = conformed(table, REFERENCED_PAIRS)
    assert found.schema == REFERENCED_PAIRS and found["score_chosen"].to_pylist() == [None]
    assert cut(table).schema == PAIRS and cut(table)["score_rejected"].to_pylist() == [None]
    assert conformed(found, REFERENCED_PAIRS) == found


def test_no_other_stage_has_another_address() -> None:
    def keys(*methods: str) -> set[str]:
        entries = [{"name": kind, "method": {"kind": kind}} for kind in methods]
        return {stage.key for stage in all_stages(make_plan(parse_config({"entries": entries})))}

    both = keys("dpo", "odpo")
    assert keys("dpo") < both and {key.split("-")[0] for key in both - keys("dpo")} == {"odpo", "evaluation"}


def test_what_is_read_of_a_table_of_pairs_has_the_scores() -> None:
    assert set(PAIR_SCORES) <= set(COLUMNS) and set(PAIR_SCORES) <= set(PAIRS.names)
