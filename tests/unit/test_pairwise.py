"""A judge that compares two responses in both orders, against a real server: verdicts, position bias, win rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from judge_server import Server, server
from tiny import EOS, save_tiny_policy

from pipelines.evaluate import sampled_job
from pipelines.judge_notes import judge_notes
from pipelines.plan import make_plan
from pipelines.report import _entry_row, _win_matrix
from pipelines.sampled import score_samples
from pipelines.samples import gather_samples
from pipelines.wins import (
    WinsJob,
    compare_pairs,
    read_responses,
    reference_column,
    wins_job,
    write_responses,
)
from prefarena.config import Comparison, FunctionJudge, PairwiseJudge
from prefarena.errors import JudgeError, UserError
from prefarena.evaluation.pairwise import pair_values, pairwise_metrics
from prefarena.judges.pairwise import PairwiseComparer
from prefarena.judges.spec import JudgeSpec, check_judge
from prefarena.records import Rollout
from prefarena.report.results import EntryResult, Results
from prefarena.report.tables import main_table
from prefarena.report.verdict import verdict
from prefarena.stages import Stage, read_manifest, write_failure

__all__ = ["server"]  # a fixture

PROMPTS = [[1, 3], [1, 3], [1, 4], [1, 5]]
OWN = [[6, 6, 6, EOS], [6, EOS], [7, 7, 7, EOS], [8, EOS]]  # d d d, d, e e e, f
OTHER = [[6, EOS], [6, 6, EOS], [7, EOS], [8, EOS]]  # d, d d, e, f


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def pairwise(server: Server, **settings: object) -> PairwiseJudge:
    prompt = "{prompt}|{response_a}|{response_b}"
    fields = {"base_url": server.url, "model": "m", "prompt": prompt, "max_retries": 0, **settings}
    return PairwiseJudge.model_validate(fields)


def longer(question: str) -> str:
    """The verdict of a judge that likes length and nothing else."""
    _, first, second = question.split("|")
    difference = len(first) - len(second)
    return f"One is longer. Verdict: {'A' if difference > 0 else 'B' if difference < 0 else 'tie'}"


def test_each_pair_is_asked_in_both_orders_and_equal_texts_are_ties(server: Server, policy: str) -> None:
    server.answer = longer
    games = PairwiseComparer(pairwise(server), policy).compare(PROMPTS, OWN, OTHER)
    assert games.first.tolist() == games.second.tolist() == [1, 0, 1, 0.5]
    assert games.asked.tolist() == [True, True, True, False]
    asked = sorted(str(request["messages"][0]["content"]) for request in server.requests)  # type: ignore[index]
    assert asked == sorted(["a|d d d|d", "a|d|d d d", "a|d|d d", "a|d d|d", "b|e e e|e", "b|e|e e e"])


def test_structured_verdicts(server: Server, policy: str) -> None:
    server.answer = '{"reason": "A is longer than B", "winner": "tie"}'
    games = PairwiseComparer(pairwise(server, structured=True), policy).compare(PROMPTS, OWN, OTHER)
    assert set(games.first) == set(games.second) == {0.5}
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]  # type: ignore[index]
    assert schema["properties"]["winner"]["enum"] == ["A", "B", "tie"]


@pytest.mark.parametrize(("answer", "bias"), [("[[A]]", 1.0), ("[[B]]", -1.0), ("[[C]]", 0.0)])
def test_a_judge_that_looks_at_the_place_alone_tells_nothing_and_is_found_out(
    server: Server, policy: str, answer: str, bias: float
) -> None:
    server.answer = answer
    games = PairwiseComparer(pairwise(server), policy).compare(PROMPTS, OWN, OTHER)
    row = pairwise_metrics(games.first, games.second, games.asked, np.array([0, 0, 1, 2]))
    assert row["win_rate"] == 0.5 and row["tie_rate"] == 1
    assert row["position_bias"] == bias and row["order_agreement"] == (answer == "[[C]]")


def test_silent_answers_leave_the_pair_out(server: Server, policy: str) -> None:
    server.answer = lambda question: "Hm." if question == "a|d|d d d" else longer(question)
    games = PairwiseComparer(pairwise(server, max_silent_share=0.2), policy).compare(PROMPTS, OWN, OTHER)
    row = pairwise_metrics(games.first, games.second, games.asked, np.array([0, 0, 1, 2]))
    assert (row["num_pairs"], row["num_silent_pairs"], row["num_identical"]) == (3, 1, 1)
    assert row["win_rate"] == pytest.approx(0.5)  # 0 on the first prompt, 1 on the second, 1/2 on the third
    with pytest.raises(JudgeError, match="1 of 6 rows got no verdict"):
        PairwiseComparer(pairwise(server), policy).compare(PROMPTS, OWN, OTHER)


def test_what_a_pair_counts() -> None:
    shares = [0.0, 0.5, 1.0, np.nan]
    first, second = (grid.ravel() for grid in np.meshgrid(shares, shares, indexing="ij"))
    expected = np.full(16, 0.5)
    expected[0], expected[10] = 0, 1
    expected[[3, 7, 11, 12, 13, 14, 15]] = np.nan
    np.testing.assert_array_equal(pair_values(first, second), expected)


def test_estimates_by_hand() -> None:
    first = np.array([1.0, 1.0, 1.0, 0.0, 0.5, 0.5])
    second = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5])
    asked = np.array([True] * 5 + [False])
    row = pairwise_metrics(first, second, asked, np.array([0, 0, 1, 1, 2, 3]))
    # Pairs count 1, 1/2, 1/2, 1/2, 1/2, 1/2; by prompt 3/4, 1/2, 1/2, 1/2.
    assert row["win_rate"] == pytest.approx(0.5625) and row["win_rate_stderr"] == pytest.approx(0.125 / 2)
    assert row["tie_rate"] == pytest.approx(5 / 6)
    # The place decided three of five pairs: twice the first, once the second.
    assert row["position_bias"] == pytest.approx(1 / 5) and row["order_agreement"] == pytest.approx(2 / 5)
    alone = pairwise_metrics(first[:1], second[:1], asked[:1], np.array([0]))
    assert alone["win_rate"] == 1 and "win_rate_stderr" not in alone
    nothing = pairwise_metrics(np.full(2, np.nan), second[:2], asked[:2], np.array([0, 1]))
    assert nothing == {"num_pairs": 0, "num_silent_pairs": 2, "num_identical": 0}


def test_a_stage_of_wins_pays_once(server: Server, policy: str, tmp_path: Path) -> None:
    server.answer = longer
    own, reference = tmp_path / "own", tmp_path / "reference"
    for folder, responses in ((own, OWN), (reference, OTHER)):
        folder.mkdir()
        pairs = zip(PROMPTS, responses, strict=True)
        write_responses(folder, [Rollout(prompt, response, [], True, "0") for prompt, response in pairs])
    assert [response for _, response in read_responses(reference)] == OTHER
    spec = JudgeSpec(pairwise(server), None, policy, str(tmp_path / "calls"))
    for attempt, paid in enumerate((6, 0)):
        stage = Stage.at(tmp_path, "wins", "dpo", attempt)
        compare_pairs(WinsJob(spec, own, reference, stage.begin()))
        costs = read_manifest(stage.folder)["costs"]
        assert (costs["num_judge_calls"], costs["num_judge_calls_reused"]) == (paid, 6 - paid)
        row = stage.row()
        assert row["win_rate"] == pytest.approx((0.5 + 1 + 0.5) / 3) and row["position_bias"] == 0
        json.dumps(row, allow_nan=False)
    write_responses(reference, [Rollout([1, 9], [6, EOS], [], True, "0")])
    with pytest.raises(ValueError, match="different prompts"):
        compare_pairs(WinsJob(spec, own, reference, tmp_path / "other"))


def test_a_comparison_without_scores_has_a_whole_table_and_verdict() -> None:
    rows = {
        "dpo": {"kl": 2.0, "kl_stderr": 0.1, "win_rate": 0.7, "win_rate_stderr": 0.05, "position_bias": 0.2},
        "ipo": {"kl": 3.0, "kl_stderr": 0.1, "win_rate": 0.5, "win_rate_stderr": 0.05, "position_bias": 0.1},
    }
    entries = [EntryResult(name="reference", kind="reference", seeds={"0": {"kl": 0.0}})]
    entries += [EntryResult(name=name, kind=name, seeds={"0": row}) for name, row in rows.items()]
    results = Results(name="x", task={"kind": "text"}, seeds=[0], exact=False, entries=entries)
    table = main_table(results)
    assert "judge score" not in table.header and "win rate" in table.header and "position bias" in table.header
    said = " ".join(verdict(results))
    assert "**dpo** has the highest win rate against the reference: 0.700" in said
    assert "ipo by dpo" in said and "judge score" not in said and "nan" not in said
    rates, errors = reference_column(list(rows.values()))
    assert rates[1, 0] == 0.7 and rates[0, 2] == 0.5 and np.isnan(rates[1, 2]) and errors[2, 0] == 0.05


def test_a_pairwise_judge_is_no_reward_and_needs_both_responses(server: Server) -> None:
    judge = pairwise(server).model_dump()
    method = {"kind": "best_of_n", "reward": judge}
    with pytest.raises(ValueError, match="reward"):
        Comparison.model_validate({"entries": [{"name": "best", "method": method}]})
    for field in ("response_a", "response_b"):
        settings = pairwise(server, prompt="{prompt}{response_a}{response_b}".replace(f"{{{field}}}", ""))
        with pytest.raises(UserError, match=field):
            check_judge(settings)
    with pytest.raises(UserError, match="base_url must be a URL"):
        check_judge(PairwiseJudge(base_url="host", model="m"))


def test_the_stages_of_a_pairwise_comparison_without_ray(server: Server, policy: str, tmp_path: Path) -> None:
    """The reference's responses and an entry's are kept unscored, compared, and gathered as the report's rows."""
    server.answer = longer
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    best = {"kind": "best_of_n", "n": 1, "reward": {"kind": "function", "function": "rewards_that_fail:short"}}
    config = Comparison.model_validate(
        {
            "task": {"kind": "text", "data": str(data)}, "output": str(tmp_path / "runs"),
            "model": {"kind": "scratch", "vocab_size": 300}, "judge": pairwise(server).model_dump(),
            "entries": [{"name": "best", "method": best}],
        }
    )  # fmt: skip
    (plan,) = make_plan(config)
    (trained,) = plan.trained
    assert trained.wins is not None and trained.wins in trained.stages()
    for stage, one, responses in ((plan.evaluation, None, OTHER), (trained.evaluation, trained, OWN)):
        job = sampled_job(config, plan, one, stage.begin())
        assert job.judge is None
        function = JudgeSpec(FunctionJudge(function="rewards_that_fail:short"), None, policy)
        job = replace(job, policy=policy, reward=function)  # with a reward no policy is loaded
        pairs = zip(PROMPTS, responses, strict=True)
        score_samples([Rollout(prompt, ids, [0.0], True, "0") for prompt, ids in pairs], job, config.evaluation, 0.0)
        assert "judge_score" not in stage.row() and stage.finished
        assert pq.read_table(stage.folder / "samples.parquet")["score"].null_count == len(PROMPTS)
    wins = wins_job(config, plan, trained, trained.wins.begin())
    assert wins.judge.calls == str(tmp_path / "runs" / "judge_calls")
    compare_pairs(replace(wins, judge=replace(wins.judge, tokenizer=policy)))
    row = _entry_row(plan, trained)
    assert row["win_rate"] == pytest.approx(2 / 3) and row["response_length"] == 3 and "num_silent" not in row
    gather_samples([plan], tmp_path)
    gathered = pq.read_table(tmp_path / "samples.parquet").to_pydict()
    assert gathered["policy"] == ["reference"] * 4 + ["best"] * 4 and gathered["num_tokens"][4:] == [4, 2, 4, 2]
    assert gathered["score"] == [None] * 4 + [1.0, 0.0, 1.0, 0.5]  # what each response counts against the reference's
    matrix = _win_matrix(config, [plan])
    assert matrix.rows == ["reference", "best"] and matrix.win_rate[1][0] == pytest.approx(2 / 3)
    rows = {stage: stage.row() for stage in (plan.evaluation, trained.evaluation, trained.wins)}
    notes = " ".join(judge_notes(config, [plan], rows, {}))
    assert "best against the reference: 4 pairs with a verdict, 0 without, left out; 1 of equal texts" in notes
    assert "position bias +0.000" in notes and "answered 6 requests" in notes
    assert trained.failure is None
    write_failure(trained.wins.folder, "it is silent")
    trained.wins.folder.joinpath("manifest.json").unlink()
    assert trained.failure == "its comparison with the reference failed: it is silent"
