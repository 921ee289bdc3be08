"""What an endpoint has answered is kept and not paid for twice; rows without a score are left out and counted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from judge_server import Server, endpoint
from judge_server import server as judge_server
from on_policy import LocalGenerator, make_job, metric_rows, timeless
from s3 import BUCKET, fs, server
from tiny import EOS, save_tiny_policy

from pipelines.evaluate import sampled_job
from pipelines.jobs import judge_spec
from pipelines.judge_notes import judge_notes
from pipelines.plan import make_plan
from pipelines.report import _entry_row
from pipelines.sampled import score_samples
from pipelines.sampled_values import SampledJob
from prefarena import mirror
from prefarena.config import Comparison, EndpointJudge, FunctionJudge, GRPOTraining, PPOTraining
from prefarena.errors import JudgeError
from prefarena.evaluation.best_of_n import pick_best
from prefarena.evaluation.sampled import sampled_metrics, win_rate
from prefarena.judges.calls import Calls, call_key
from prefarena.judges.spec import Judge, JudgeSpec, load_judge, usage_of
from prefarena.records import Rollout
from prefarena.training.on_policy import train_on_policy
from prefarena.training.worker import Worker

__all__ = ["fs", "judge_server", "server"]  # fixtures

PROMPTS = [[1, number] for number in range(3, 13)]  # one letter each, a to j
RESPONSES = [[number, number, EOS] for number in range(3, 13)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def judge_of(settings: EndpointJudge, policy: str, calls: Path | None) -> Judge:
    return load_judge(JudgeSpec(settings, None, policy, None if calls is None else str(calls)))


def score(settings: EndpointJudge, policy: str, calls: Path | None, number: int = 10) -> tuple[list[float], list[int]]:
    """Scores of the first rows, and how many calls were paid for, taken from the store, and found torn."""
    judge = judge_of(settings, policy, calls)
    found = judge.score(PROMPTS[:number], RESPONSES[:number]).tolist()
    usage = usage_of(judge)
    assert usage is not None
    return found, [usage.num_paid, usage.num_reused, usage.num_torn]


# ------------------------------------------------------------------------------------------ what is kept


def test_no_call_is_paid_for_twice(judge_server: Server, policy: str, tmp_path: Path) -> None:
    settings = endpoint(judge_server)
    assert score(settings, policy, tmp_path / "calls", 6) == ([2.5] * 6, [6, 0, 0])
    assert score(settings, policy, tmp_path / "calls") == ([2.5] * 10, [4, 6, 0])
    assert score(settings, policy, tmp_path / "calls") == ([2.5] * 10, [0, 10, 0])
    assert len(judge_server.requests) == 10
    assert score(settings, policy, None)[1] == [10, 0, 0]


def test_whatever_changes_the_answer_is_another_call(judge_server: Server, policy: str, tmp_path: Path) -> None:
    score(endpoint(judge_server), policy, tmp_path / "calls", 2)
    for other in ({"model": "n"}, {"max_tokens": 9}, {"prompt": "{prompt}|{response} "}):
        assert score(endpoint(judge_server, **other), policy, tmp_path / "calls", 2)[1] == [2, 0, 0]
    # What only changes how it is asked or read is not.
    for same in ({"concurrency": 2}, {"timeout_s": 5}, {"min_score": 0}, {"pattern": r"Score: (\d+)"}):
        assert score(endpoint(judge_server, **same), policy, tmp_path / "calls", 2)[1] == [0, 2, 0]


def test_equal_questions_are_asked_once(judge_server: Server, policy: str) -> None:
    judge = judge_of(endpoint(judge_server), policy, None)
    assert judge.score(PROMPTS[:2] * 5, RESPONSES[:2] * 5).tolist() == [2.5] * 10
    assert len(judge_server.requests) == 2


def test_a_server_that_wants_its_limit_under_another_name_is_known_again(
    judge_server: Server, policy: str, tmp_path: Path
) -> None:
    judge_server.newer = True
    score(endpoint(judge_server), policy, tmp_path / "calls")
    asked = len(judge_server.requests)
    assert score(endpoint(judge_server), policy, tmp_path / "calls")[1] == [0, 10, 0]
    assert len(judge_server.requests) == asked


_ASKING = """
import json, sys
from prefarena.config import EndpointJudge
from prefarena.judges.answers import Form, Reading, read_response
from prefarena.judges.client import Client

settings, calls, questions = (json.loads(text) for text in sys.argv[1:])
read = lambda body: read_response(body, Form(1, 10))
client = Client(EndpointJudge(**settings), read, lambda reason: Reading(None, reason), calls, {})
client.ask(questions)
"""


def test_a_process_that_is_killed_between_answers_loses_none_of_them(
    judge_server: Server, policy: str, tmp_path: Path
) -> None:
    judge_server.delay_s = 0.2
    settings, calls = endpoint(judge_server, concurrency=1), tmp_path / "calls"
    questions = [f"{letter}|{letter} {letter}" for letter in "abcdefghij"]  # as the scorer asks them
    arguments = [json.dumps(one) for one in (settings.model_dump(), str(calls), questions)]
    process = subprocess.Popen([sys.executable, "-c", _ASKING, *arguments])  # without torch, which takes long to load
    deadline = time.monotonic() + 120
    while len(judge_server.requests) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait(30)
    judge_server.delay_s, kept = 0, len(Calls(calls))
    assert 3 <= kept < 10
    assert score(settings, policy, calls) == ([2.5] * 10, [10 - kept, kept, 0])


@pytest.mark.parametrize("left", [1, 0.5, 0.999])
def test_a_line_that_was_cut_off_is_ignored_and_counted(
    judge_server: Server, policy: str, tmp_path: Path, left: float
) -> None:
    calls = tmp_path / "calls"
    score(endpoint(judge_server, concurrency=1), policy, calls)
    (file,) = calls.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    keep = int(len(lines[-1]) * left) if left < 1 else 1
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    assert score(endpoint(judge_server), policy, calls) == ([2.5] * 10, [1, 9, 1])
    assert score(endpoint(judge_server), policy, calls) == ([2.5] * 10, [0, 10, 1])


def test_many_threads_and_stores_write_whole_lines(tmp_path: Path) -> None:
    stores = [Calls(tmp_path) for _ in range(3)]
    keys = [call_key({"number": number}) for number in range(120)]

    def write(place: int) -> None:
        for key in keys[place::6]:
            stores[place % 3].put(key, key * 50)

    threads = [threading.Thread(target=write, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = Calls(tmp_path)
    assert len(found) == 120 and found.num_torn == 0
    assert all(found.get(key) == key * 50 for key in keys)
    assert found.get(call_key({})) is None


def test_calls_are_kept_in_an_object_store(fs: Any, judge_server: Server, policy: str, tmp_path: Path) -> None:
    def node(name: str) -> Path:
        return mirror.root_of(f"s3://{BUCKET}/judged", str(tmp_path / name)) / "judge_calls"

    assert score(endpoint(judge_server), policy, node("a"), 6)[1] == [6, 0, 0]
    assert score(endpoint(judge_server), policy, node("b"))[1] == [4, 6, 0]
    assert score(endpoint(judge_server), policy, node("a"))[1] == [0, 10, 0]
    assert len(fs.find(f"{BUCKET}/judged/judge_calls")) == 2
    # What a process that died had not sent yet is sent by the next one on its node.
    (node("a") / f"0-{2**22 + 1}-0.jsonl").write_text(
        json.dumps({"key": call_key({"of": "the dead"}), "body": "1"}) + "\n"
    )
    Calls(node("a"))
    assert Calls(node("b")).get(call_key({"of": "the dead"})) == "1"


# ------------------------------------------------------------------------------- rows without a verdict


def mostly(silent: str) -> Any:
    """Answers of a server that has no verdict where the question holds one of these letters."""
    return lambda question: "I would rather not." if any(letter in question for letter in silent) else "Score: 7"


def test_silent_rows_up_to_a_share_are_left_out_and_counted(judge_server: Server, policy: str, tmp_path: Path) -> None:
    judge_server.answer = mostly("cf")
    settings, calls = endpoint(judge_server, max_silent_share=0.2), tmp_path / "calls"
    judge = judge_of(settings, policy, calls)
    expected = [7.0] * 10
    expected[2] = expected[5] = np.nan
    np.testing.assert_array_equal(judge.score(PROMPTS, RESPONSES), expected)
    usage = usage_of(judge)
    assert usage is not None and (usage.num_asked, usage.num_silent) == (10, 2)
    np.testing.assert_array_equal(score(settings, policy, calls)[0], expected)
    assert len(judge_server.requests) == 10  # an answer that says nothing has been paid for, too


def test_more_silent_rows_than_the_share_are_an_error_that_shows_some(judge_server: Server, policy: str) -> None:
    judge_server.answer = mostly("cfg")
    judge = judge_of(endpoint(judge_server, max_silent_share=0.2, concurrency=1), policy, None)
    with pytest.raises(JudgeError, match=r"3 of 10 rows got no verdict.*0\.2.*row 2:.*rather not.*row 5:.*row 6:"):
        judge.score(PROMPTS, RESPONSES)
    with pytest.raises(JudgeError, match="1 of 10 rows"):
        judge_of(endpoint(judge_server, max_silent_share=0, concurrency=1), policy, None).score(PROMPTS, RESPONSES)
    assert len(judge_server.requests) < 20  # after the error, rows that wait are not asked


def test_the_share_is_of_all_rows_of_a_training_so_far(judge_server: Server, policy: str) -> None:
    judge_server.answer = mostly("c")
    judge = judge_of(endpoint(judge_server, max_silent_share=0.1), policy, None)
    judge.score(PROMPTS, RESPONSES)  # 1 of 10
    with pytest.raises(JudgeError, match="2 of 12"):
        judge.score(PROMPTS[2:4], RESPONSES[2:4])


def test_a_row_whose_request_fails_for_good_is_silent_and_asked_again_by_the_next_run(
    judge_server: Server, policy: str, tmp_path: Path
) -> None:
    judge_server.failures = [500]
    settings = endpoint(judge_server, max_silent_share=0.1, concurrency=1)
    found, counts = score(settings, policy, tmp_path / "calls")
    assert np.isnan(found).sum() == 1 and counts == [9, 0, 0]
    assert score(settings, policy, tmp_path / "calls") == ([2.5] * 10, [1, 9, 0])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_it_whatever_the_share(judge_server: Server, policy: str, status: int) -> None:
    judge_server.failures = [status]
    with pytest.raises(JudgeError, match=str(status)):
        judge_of(endpoint(judge_server, max_silent_share=0.9, concurrency=1), policy, None).score(PROMPTS, RESPONSES)
    assert len(judge_server.requests) <= 2


def test_an_answer_without_a_verdict_is_asked_for_once_more(judge_server: Server, policy: str, tmp_path: Path) -> None:
    answers = iter(["Hm.", "Score: 4"])
    judge_server.answer = lambda question: next(answers)
    settings = endpoint(judge_server, max_retries=1)
    assert score(settings, policy, tmp_path / "calls", 1) == ([4], [2, 0, 0])
    assert score(settings, policy, tmp_path / "calls", 1) == ([4], [0, 1, 0])


def test_what_is_no_completion_is_not_kept(judge_server: Server, policy: str, tmp_path: Path) -> None:
    judge_server.raw = "<html>Bad gateway</html>"
    with pytest.raises(JudgeError, match="not JSON"):
        score(endpoint(judge_server), policy, tmp_path / "calls")
    judge_server.raw = None
    assert score(endpoint(judge_server), policy, tmp_path / "calls") == ([2.5] * 10, [10, 0, 0])


# --------------------------------------------------------------------------------------- who reads scores

NAN = float("nan")


def test_measures_leave_silent_rows_out_and_count_them() -> None:
    rollouts = [Rollout([1, prompt], [4, EOS], [0.0, 0.0], True, "0") for prompt in (3, 3, 4, 4)]
    row = sampled_metrics(rollouts, None, None, np.array([1.0, NAN, 4.0, 5.0]))
    assert row["judge_score"] == pytest.approx(10 / 3) and row["response_length"] == 2
    assert (row["num_judged"], row["num_silent"]) == (3, 1)
    assert not any(np.isnan(value) for value in row.values())
    silent = sampled_metrics(rollouts, None, None, np.full(4, NAN))
    assert "judge_score" not in silent and silent["num_silent"] == 4
    json.dumps(row, allow_nan=False)


def test_win_rates_leave_out_the_pairs_of_silent_rows() -> None:
    clusters = np.array([0, 0, 1, 1, 2])
    own, other = np.array([3.0, NAN, 1.0, 1.0, 5.0]), np.array([1.0, 4.0, 2.0, NAN, NAN])
    # Prompt 0: 3 against 1 and 4; prompt 1: 1 and 1 against 2; prompt 2 has no pair.
    expected = win_rate(np.array([3.0, 1.0, 1.0]), np.array([0, 1, 1]), np.array([1.0, 4.0, 2.0]), np.array([0, 0, 1]))
    assert win_rate(own, clusters, other, clusters) == pytest.approx(expected)
    assert expected.mean == 0.25
    assert all(np.isnan(value) for value in win_rate(np.full(5, NAN), clusters, other, clusters))


def test_a_silent_sample_is_the_best_only_where_all_are_silent() -> None:
    assert pick_best(np.array([NAN, 1.0, 2.0, NAN, NAN, NAN, -5.0, NAN, -7.0]), 3).tolist() == [2, 3, 6]


# ---------------------------------------------------------------------------------- evaluation and report


def text_config(tmp_path: Path, judge: EndpointJudge | FunctionJudge) -> Comparison:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    best = {"kind": "best_of_n", "n": 2, "reward": judge.model_dump()}
    return Comparison.model_validate(
        {
            "task": {"kind": "text", "data": str(data)}, "output": str(tmp_path / "runs"), "judge": judge.model_dump(),
            "model": {"kind": "scratch", "vocab_size": 300}, "entries": [{"name": "best", "method": best}],
        }
    )  # fmt: skip


def test_an_evaluation_and_its_report_say_who_was_silent_and_what_was_paid(
    judge_server: Server, policy: str, tmp_path: Path
) -> None:
    judge_server.answer = lambda question: f"Score: {question.count('k')}" if "c" not in question[0] else "Hm."
    judge = endpoint(judge_server, max_silent_share=0.2)
    config = text_config(tmp_path, judge)
    (plan,) = make_plan(config)
    spec = judge_spec(plan, judge, None)
    assert spec.calls == str(tmp_path / "runs" / "judge_calls")
    spec = replace(spec, tokenizer=policy)
    responses = ([13], [13, 13, EOS])  # k, k k
    rollouts = [Rollout(prompt, response, [0.0], True, "0") for prompt in PROMPTS for response in responses]
    for stage, trained in ((plan.evaluation, None), (plan.trained[0].evaluation, plan.trained[0])):
        job = SampledJob(policy, policy, spec, tmp_path, stage.begin(), 2, spec)
        score_samples(rollouts, job, config.evaluation, 0.0)
        assert "NaN" not in (stage.folder / "row.json").read_text()
        scores = pq.read_table(stage.folder / "samples.parquet")["score"]
        assert scores.null_count == 1 and not any(math.isnan(score) for score in scores.drop_null().to_pylist())
        row = json.loads((stage.folder / "row.json").read_text())
        assert (row["num_judged"], row["num_silent"], row["num_silent_rewards"]) == (9, 1, 2), trained
    row = _entry_row(plan, plan.trained[0])
    assert row["win_rate"] == 0.5 and row["num_silent"] == 1
    rows = {stage: stage.row() for stage in (plan.evaluation, plan.trained[0].evaluation)}
    notes = list(judge_notes(config, [plan], rows, {}))
    assert any("no readable score: 1 of 10 of the reference, 1 of 10 of best." in note for note in notes), notes
    assert any("best: 2 samples got no usable reward" in note for note in notes), notes
    assert len(judge_server.requests) == 20
    assert "Judge endpoints answered 20 requests; 40 answers came from stored calls." in notes


def test_a_function_is_silent_about_rows_of_an_evaluation_up_to_its_share(policy: str, tmp_path: Path) -> None:
    judge = FunctionJudge(function="tests.helpers.scores:silent_about_a", max_silent_share=0.2)
    config = text_config(tmp_path, judge)
    (plan,) = make_plan(config)
    reference, best = sampled_job(config, plan, None, tmp_path), sampled_job(config, plan, plan.trained[0], tmp_path)
    assert reference.judge is not None and reference.judge.may_be_silent
    assert best.reward is not None and best.reward.may_be_silent
    spec = replace(reference.judge, tokenizer=policy)
    rollouts = [
        Rollout(prompt, response, [0.0], True, "0") for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    job = SampledJob(policy, policy, spec, tmp_path, plan.trained[0].evaluation.begin(), 1, spec)
    score_samples(rollouts, job, config.evaluation, 0.0)
    row = plan.trained[0].evaluation.row()
    assert (row["num_judged"], row["num_silent"]) == (8, 2)  # a and b
    notes = list(judge_notes(config, [plan], {plan.trained[0].evaluation: row}, {}))
    assert any("no finite score: 2 of 10 of best." in note for note in notes), notes
    strict = replace(job, judge=replace(spec, settings=judge.model_copy(update={"max_silent_share": 0.1})))
    with pytest.raises(JudgeError, match=r"2 of 10 rows got no score .* max_silent_share 0\.1 allows"):
        score_samples(rollouts, strict, config.evaluation, 0.0)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_training_goes_on_without_the_silent_rollouts_and_pays_once(
    judge_server: Server, tiny_policy: str, tmp_path: Path, method: str
) -> None:
    judge_server.answer = lambda question: "Hm." if " d" in question else f"Score: {1 + len(question) % 7}"
    sizes = {"num_iterations": 3, "rollouts_per_iteration": 16, "num_epochs": 1}
    training = PPOTraining(**sizes) if method == "ppo" else GRPOTraining(**sizes, group_size=4)
    settings = endpoint(judge_server, max_silent_share=0.9)
    jobs, costs = [], []
    for attempt in ("first", "again"):
        job = make_job(tmp_path / attempt, tiny_policy, training)
        job = replace(job, reward=JudgeSpec(settings, None, tiny_policy, str(tmp_path / "calls")))
        costs.append(train_on_policy(job, Worker(job.stage_dir), LocalGenerator(tiny_policy))["costs"])
        jobs.append(job)
    rows = metric_rows(jobs[0])
    assert any(0 < row.get("reward/num_silent", 0) < 16 for row in rows)
    assert all(1 <= row["reward/mean"] <= 7 and row["steps_skipped"] == 0 for row in rows)
    paid = costs[0]["num_judge_calls"]
    assert 0 < paid == len(judge_server.requests)
    assert (costs[1]["num_judge_calls"], costs[1]["num_judge_calls_reused"]) == (0, paid)
    assert timeless(jobs[0]) == timeless(jobs[1])
