"""Judges of every kind, against a real server, a real model and real functions; a reward model's normalisation."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import Server, endpoint, server
from tiny import EOS, save_tiny_policy
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from pipelines.checks import check_input
from prefarena.config import (
    ClassifierJudge,
    Comparison,
    EndpointJudge,
    FunctionJudge,
    JudgeSettings,
    LanguageTask,
    Optimisation,
    RewardModel,
    ScratchModel,
)
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import JudgeError, UserError
from prefarena.evaluation.enumeration import enumerate_responses, enumerate_scores
from prefarena.functions import source_digest
from prefarena.judges.calibration import calibration
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.silence import CountedJudge, check_scores
from prefarena.judges.spec import Judge, JudgeSpec, check_judge, load_judge, may_be_silent, usage_of
from prefarena.modeling.heads import ScalarHead, scores
from prefarena.modeling.load import load_policy, load_reward_model, load_tokenizer, new_policy, save_policy
from prefarena.modeling.logprobs import Sequences
from prefarena.records import DEMONSTRATIONS, PAIRS
from prefarena.stages import read_manifest
from prefarena.tasks.gold import GoldReward
from prefarena.tasks.language import EOS_ID, Language
from prefarena.tasks.pairs import reference_samples, sample_pairs
from prefarena.training.jobs import RewardModelJob
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

__all__ = ["server"]  # a fixture

PROMPTS = [[1, 3, 4], [1, 5], [1, 6, 7, 8, 9], [1, 3]]
RESPONSES = [[5, EOS], [6, 7, 8, EOS], [9], [4, 4, EOS]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def judge_of(settings: JudgeSettings, policy: str) -> Judge:
    return load_judge(JudgeSpec(settings, None, policy), batch_size=3)


# ------------------------------------------------------------------------------------------- functions


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of functions in the working directory, where an installed command does not look by itself."""
    name = f"judged_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "def length(rows):\n    return [len(r['response_ids']) + r['response'].count('g') / 8 for r in rows]\n"
        "def short(rows):\n    return [1.0]\n"
        "def infinite(rows):\n    return [1.0, float('nan'), 2.0, 3.0]\n"
        "def words(rows):\n    return ['good'] * len(rows)\n"
        "number = 3\n"
        "def broken(rows):\n    return [row['reward'] for row in rows]\n"
        "def two(rows, model):\n    return [1.0] * len(rows)\n"
        "def none():\n    return [1.0]\n"
        "async def later(rows):\n    return [1.0] * len(rows)\n"
        "def each(rows):\n    yield 1.0\n"
        "class Scorer:\n    def score(self, rows=()):\n        return [1.0] * len(rows)\n"
        "    @staticmethod\n    def static(rows):\n        return [2.0] * len(rows)\n"
        "bound = Scorer().score\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_judges_rows_of_text_and_ids(functions: str, policy: str) -> None:
    judge = judge_of(FunctionJudge(function=f"{functions}:length"), policy)
    np.testing.assert_array_equal(judge.score(PROMPTS, RESPONSES), [2, 4, 1.125, 3])


@pytest.mark.parametrize(
    ("function", "message"),
    [("short", "4 rows, but"), ("infinite", "row 1 is nan"), ("words", "one number for each row")],
)
def test_what_a_function_returns_is_checked(functions: str, policy: str, function: str, message: str) -> None:
    judge = judge_of(FunctionJudge(function=f"{functions}:{function}"), policy)
    with pytest.raises(JudgeError, match=message):
        judge.score(PROMPTS, RESPONSES)


def test_a_training_leaves_out_rows_without_a_score_up_to_a_share_of_all_it_asked(functions: str, policy: str) -> None:
    settings = FunctionJudge(function=f"{functions}:infinite", max_silent_share=0.25)
    spec = JudgeSpec(settings, None, policy, may_be_silent=True)
    judge = CountedJudge(load_judge(spec), settings)
    for _ in range(3):  # one of four rows each time: never more than the share
        assert np.isnan(judge.score(PROMPTS, RESPONSES)).tolist() == [False, True, False, False]
    assert (judge.num_asked, judge.num_silent) == (12, 3) and may_be_silent(judge)
    strict = settings.model_copy(update={"max_silent_share": 0.2})
    with pytest.raises(JudgeError, match=r"infinite: 1 of 4 rows .* more than max_silent_share 0\.2 allows"):
        CountedJudge(load_judge(spec), strict).score(PROMPTS, RESPONSES)
    assert np.isnan(CountedJudge(load_judge(spec), strict, limited=False).score(PROMPTS, RESPONSES)).sum() == 1


@pytest.mark.parametrize("kind", ["function", "classifier"])
def test_scores_that_are_not_numbers_are_silence_up_to_the_share_of_the_judge(kind: str, policy: str) -> None:
    given = {"function": "some:judge"} if kind == "function" else {"path": "some/model"}
    settings: FunctionJudge | ClassifierJudge
    settings = FunctionJudge(**given) if kind == "function" else ClassifierJudge(**given)
    values = np.array([np.nan, *range(49)])
    spec = JudgeSpec(settings, None, policy, may_be_silent=True)
    check_scores(values, spec)  # one of 50 is the usual share
    with pytest.raises(JudgeError, match=rf"judge {kind} some.*: 1 of 49 rows got no score"):
        check_scores(values[:49], spec)
    with pytest.raises(JudgeError, match=f"the judge `{kind}` gave 1 of 50 responses scores that are not finite"):
        check_scores(values, JudgeSpec(settings, None, policy))
    learned = JudgeSpec(RewardModel(), policy, policy, may_be_silent=True)
    with pytest.raises(JudgeError, match=r"`learned` gave 1 of 50 .*; check its weights"):
        check_scores(values, learned)
    assert "max_silent_share" not in settings.model_dump()  # and so addresses of stages are as they were
    assert settings.model_copy(update={"max_silent_share": 0.1}).model_dump()["max_silent_share"] == 0.1


def test_functions_that_are_not_there_are_found_before_any_work(functions: str) -> None:
    for name, message in (
        (f"{functions}:missing", "has no missing"),
        (f"{functions}:two", "one argument: its arguments are .rows, model."),
        (f"{functions}:none", "one argument: its arguments are"),
        (f"{functions}:later", "coroutine"),
        (f"{functions}:each", "generator"),
        (f"{functions}:Scorer", "a class"),
        (f"{functions}:Scorer.score", "a method, which needs an instance of Scorer"),
        (f"{functions}:number", "not a function"),
        ("no_such_module_at_all:f", "cannot be imported"),
    ):
        method = {"kind": "rlhf", "reward": {"kind": "function", "function": name}}
        config = Comparison.model_validate({"entries": [{"name": "rlhf", "method": method}]})
        with pytest.raises(UserError, match=message):
            check_input(config)


def test_static_and_bound_methods_are_functions_of_rows(functions: str, policy: str) -> None:
    for name, score in (("Scorer.static", 2.0), ("bound", 1.0)):
        judge = judge_of(FunctionJudge(function=f"{functions}:{name}"), policy)
        assert judge.score(PROMPTS, RESPONSES).tolist() == [score] * 4


def test_a_function_that_raises_is_shown_with_its_own_traceback(functions: str, policy: str) -> None:
    judge = judge_of(FunctionJudge(function=f"{functions}:broken"), policy)
    with pytest.raises(
        JudgeError, match=r"(?s)broken raised an error.*in broken.*row\['reward'\].*KeyError: 'reward'"
    ) as found:
        judge.score(PROMPTS, RESPONSES)
    assert "judges/function.py" not in str(found.value)
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


def test_an_edited_function_has_another_digest(functions: str, tmp_path: Path) -> None:
    before = source_digest(f"{functions}:length")
    path = tmp_path / f"{functions}.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert before is not None and source_digest(f"{functions}:length") != before
    assert source_digest("no_such_module_at_all:f") is None


# ------------------------------------------------------------------------------------------- endpoints


def test_an_endpoint_scores_rows_in_order_some_at_a_time(server: Server, policy: str) -> None:
    server.delay_s = 0.05
    judge = judge_of(endpoint(server, concurrency=3), policy)
    np.testing.assert_array_equal(judge.score(PROMPTS * 3, RESPONSES * 3), [1.5, 3.5, 1.5, 2.5] * 3)
    assert 1 < server.most_in_flight <= 3
    assert all(request["temperature"] == 0 and request["max_tokens"] == 2048 for request in server.requests)


def test_an_endpoint_that_is_busy_is_asked_again(server: Server, policy: str) -> None:
    server.failures = [429, 500]
    judge = judge_of(endpoint(server, concurrency=1, max_retries=2), policy)
    assert judge.score(PROMPTS[:1], RESPONSES[:1]).tolist() == [1.5]
    assert len(server.requests) == 3
    server.failures = [429] * 9
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1.*row 0.*429"):
        judge_of(endpoint(server, max_retries=1), policy).score(PROMPTS[:1], RESPONSES[:1])
    assert len(server.failures) == 7  # one request and one retry


def test_an_endpoint_that_does_not_answer_in_time_is_given_up(server: Server, policy: str) -> None:
    server.delay_s = 2
    started = time.monotonic()
    with pytest.raises(JudgeError, match=r"no answer.*timed out"):
        judge_of(endpoint(server, timeout_s=0.2), policy).score(PROMPTS[:1], RESPONSES[:1])
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("raw", "reason"),
    [("<html>Bad gateway</html>", "not JSON"), ('{"choices": [', "not JSON"), ("[1]", "no choices"),
     ("7", "no choices"), ('{"choices": []}', "no choices"),
     ('{"choices": [{"message": {"content": null}}]}', "empty"), ("", "not JSON")],
)  # fmt: skip
def test_whatever_a_server_answers_is_a_sentence(server: Server, policy: str, raw: str, reason: str) -> None:
    server.raw = raw
    with pytest.raises(JudgeError, match=rf"127\.0\.0\.1.*row 0.*{reason}"):
        judge_of(endpoint(server, concurrency=1), policy).score(PROMPTS[:1], RESPONSES[:1])


def test_an_answer_that_states_no_score_is_an_error_that_shows_it(server: Server, policy: str) -> None:
    for answer in ("I would rather not.", "Llama 2 is helpful", "Score: 11"):
        server.answer = answer
        with pytest.raises(JudgeError, match=rf"127\.0\.0\.1.*row 0.*{answer}"):
            judge_of(endpoint(server, concurrency=1), policy).score(PROMPTS, RESPONSES)


def test_form_and_range_are_the_users(server: Server, policy: str) -> None:
    server.answer = "Of 3 aspects: [[64]] or rather [[72]]"
    settings = endpoint(server, pattern=r"\[\[(\d+)\]\]", min_score=0, max_score=100)
    assert judge_of(settings, policy).score(PROMPTS[:1], RESPONSES[:1]).tolist() == [72]
    for name, value, message in (
        ("pattern", "[0-9]+", "group"),
        ("pattern", "(", "regular"),
        ("min_score", 10, "less"),
    ):
        with pytest.raises(ValueError, match=message):
            endpoint(server, **{name: value})


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "host/v1", "", "http://", "http://[", "http://host:x/v1", "ftp://h"]
)
def test_a_base_url_that_is_no_url_is_found_before_any_work(url: str) -> None:
    with pytest.raises(UserError, match="base_url must be a URL"):
        check_judge(EndpointJudge(base_url=url, model="judge"))


def test_a_newer_server_is_told_its_limit_by_another_name(server: Server, policy: str) -> None:
    server.newer = True
    judge = judge_of(endpoint(server, concurrency=1), policy)
    assert judge.score(PROMPTS, RESPONSES).tolist() == [1.5, 3.5, 1.5, 2.5]
    assert ["max_tokens" in request for request in server.requests] == [True] + [False] * 4
    assert all(request["max_completion_tokens"] == 2048 for request in server.requests[1:])


def test_structured_output_is_asked_for_where_the_server_has_it(server: Server, policy: str) -> None:
    server.answer = '{"reason": "It scores 3 of 4 points.", "score": 7}'
    judge = judge_of(endpoint(server, structured=True), policy)
    assert judge.score(PROMPTS, RESPONSES).tolist() == [7] * 4
    for request in server.requests:
        form = request["response_format"]
        assert form["type"] == "json_schema" and "score" in form["json_schema"]["schema"]["required"]  # type: ignore[index]
    with pytest.raises(ValueError, match="set one of them"):
        endpoint(server, structured=True, pattern="(.)")


@pytest.mark.parametrize("newer", [False, True])
def test_a_server_that_refuses_structured_output_is_asked_for_text(server: Server, policy: str, newer: bool) -> None:
    server.plain, server.newer = True, newer
    judge = judge_of(endpoint(server, structured=True, concurrency=1), policy)
    assert judge.score(PROMPTS, RESPONSES).tolist() == [1.5, 3.5, 1.5, 2.5]
    assert ["response_format" in request for request in server.requests] == [True] * (1 + newer) + [False] * 4
    usage = usage_of(judge)
    assert usage is not None and usage.num_unstructured == usage.num_paid == 4


def test_the_key_comes_from_the_environment_and_stays_out_of_messages(
    server: Server, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = endpoint(server, api_key_env="JUDGE_TEST_KEY")
    monkeypatch.delenv("JUDGE_TEST_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_TEST_KEY"):
        judge_of(settings, policy)
    monkeypatch.setenv("JUDGE_TEST_KEY", "open-sesame")
    server.failures = [401]
    with pytest.raises(JudgeError, match="401") as found:
        judge_of(settings, policy).score(PROMPTS[:1], RESPONSES[:1])
    assert server.keys == ["Bearer open-sesame"] and "open-sesame" not in str(found.value)


# ----------------------------------------------------------------------------------------- classifiers

TEMPLATE = "{% for m in messages %}{{ '<bos> ' if m.role == 'user' else '' }}{{ m.content }} {% endfor %}<eos>"


def save_classifier(folder: Path, policy: str, *, pad_is_eos: bool, template: bool, num_labels: int = 1) -> str:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=EOS if pad_is_eos else 0,
    )  # fmt: skip
    config.num_labels = num_labels
    if template:
        tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_policy(LlamaForSequenceClassification(config), tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize("template", [False, True])
def test_a_classifier_reads_the_last_token_alone_or_in_a_batch(tmp_path: Path, policy: str, template: bool) -> None:
    path = save_classifier(tmp_path / "c", policy, pad_is_eos=True, template=template)
    judge = judge_of(ClassifierJudge(path=path), policy)
    together = judge.score(PROMPTS, RESPONSES)
    alone = [judge.score([prompt], [response])[0] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(path).eval(), load_tokenizer(policy)
    for found, prompt, response in zip(together, PROMPTS, RESPONSES, strict=True):
        texts = [str(tokenizer.decode(ids)) for ids in (prompt[1:], [i for i in response if i != EOS])]
        ids = tokenizer(f"<bos> {texts[0]} {texts[1]} <eos>" if template else "".join(texts))["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            expected = float(model.score(hidden))
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_classifier_forgets_the_beginning_of_long_texts(tmp_path: Path, policy: str) -> None:
    path = save_classifier(tmp_path / "c", policy, pad_is_eos=False, template=True)
    judge = judge_of(ClassifierJudge(path=path, max_tokens=4), policy)
    first, second = judge.score([[1, 3, 4, 5], [1, 9, 9, 5]], [[6, 7, EOS]] * 2)
    assert first == second
    longer = judge_of(ClassifierJudge(path=path, max_tokens=6), policy)
    first, second = longer.score([[1, 3, 4, 5], [1, 9, 9, 5]], [[6, 7, EOS]] * 2)
    assert first != second


def test_classifiers_that_cannot_judge_are_refused(tmp_path: Path, policy: str) -> None:
    path = save_classifier(tmp_path / "two", policy, pad_is_eos=False, template=False, num_labels=2)
    with pytest.raises(UserError, match="2 labels"):
        judge_of(ClassifierJudge(path=path), policy)
    with pytest.raises(UserError, match="no such folder"):
        judge_of(ClassifierJudge(path=str(tmp_path / "none")), policy)
    pickled = save_classifier(tmp_path / "pickled", policy, pad_is_eos=False, template=False)
    state = LlamaForSequenceClassification.from_pretrained(pickled).state_dict()
    (Path(pickled) / "model.safetensors").unlink()
    torch.save(state, Path(pickled) / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        judge_of(ClassifierJudge(path=pickled), policy)


# -------------------------------------------------------------------------------------- reward models


@pytest.mark.parametrize("pad_id", [0, EOS])
def test_a_score_is_of_the_true_last_token_whatever_the_batch_and_padding(
    tmp_path: Path, policy: str, pad_id: int
) -> None:
    path = save_classifier(tmp_path / "c", policy, pad_is_eos=pad_id == EOS, template=False)
    model = load_reward_model(path).double()
    model.config.reward_mean, model.config.reward_scale = 0.25, 2.0
    batch = Sequences.of(PROMPTS, RESPONSES)
    wide = Sequences.of([*PROMPTS, PROMPTS[0]], [*RESPONSES, RESPONSES[0] * 5])
    with torch.no_grad():
        head, padding = ScalarHead(model), ScalarHead(model)
        padding.packed = False
        together, further = scores(head, batch), scores(padding, wide)
        for row in range(4):
            alone = scores(head, Sequences.of(PROMPTS[row : row + 1], RESPONSES[row : row + 1]))
            ids = torch.tensor([PROMPTS[row] + RESPONSES[row]])
            by_hand = (
                model.get_submodule("score")(model.get_submodule("model")(input_ids=ids).last_hidden_state[0, -1])[0]
                - 0.25
            ) / 2
            for found in (alone[0], together[row], further[row]):
                assert float(found) == pytest.approx(float(by_hand), abs=1e-12)
    judge = RewardModelJudge.of(model, batch_size=2)
    np.testing.assert_allclose(judge.score(PROMPTS, RESPONSES), together.numpy(), atol=1e-12)


def test_a_trained_reward_model_has_mean_zero_and_unit_variance_under_the_reference(tmp_path: Path) -> None:
    task = LanguageTask(num_letters=5, num_prompts=12, prompt_letters=2, response_limit=3)
    language = Language(task)
    language.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = ScratchModel(hidden_size=32, num_layers=1, num_heads=1, intermediate_size=64)
    save_policy(new_policy(model, tokenizer, 16, seed=0), tokenizer, tmp_path / "reference")
    reference = load_policy(tmp_path / "reference")
    exact = enumerate_responses(reference, language.prompt_ids, task.response_limit, EOS_ID)
    gold = GoldReward.fit(task, language.prompt_ids, exact.sequences, exact.logps)
    rewards = gold.table(language.prompt_ids, exact.sequences)
    pairs = sample_pairs(
        language.prompt_ids, language.covered, exact.sequences, exact.logps, rewards,
        num_pairs=512, labels="deterministic", temperature=1.0, seed=0, split="train",
    )  # fmt: skip
    write_rows(pairs, tmp_path / "pairs" / "part-0.parquet", PAIRS)
    drawn = reference_samples(language.prompt_ids, exact.sequences, exact.logps, 64, seed=0)
    write_rows(drawn, tmp_path / "samples" / "part-0.parquet", DEMONSTRATIONS)
    training = Optimisation(learning_rate=3e-3, num_steps=60, batch_size=64)
    job = RewardModelJob(
        stage_dir=str(tmp_path / "rm"), name="rm", policy=str(tmp_path / "reference"), seed=0,
        settings=RewardModel(training=training), pairs=str(tmp_path / "pairs"), test_pairs=str(tmp_path / "pairs"),
        samples=str(tmp_path / "samples"),
    )  # fmt: skip
    run_job(job, Worker(job.stage_dir))
    stored = load_reward_model(job.model_dir)
    assert stored.config.reward_scale != 1.0
    table = enumerate_scores(stored, language.prompt_ids, task.response_limit, EOS_ID)
    weights = np.exp(exact.logps) / len(language.prompt_ids)
    mean = float((weights * table).sum())
    variance = float((weights * table**2).sum()) - mean**2
    num_samples = read_rows(tmp_path / "samples").num_rows
    assert abs(mean) < 3 * np.sqrt(variance / num_samples)
    assert variance == pytest.approx(1, abs=0.3)
    quality = read_manifest(job.stage_dir)["reward_model"]
    assert quality["accuracy"] > 0.6 and quality["log_loss"] < np.log(2)


# -------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand() -> None:
    margins = np.array([np.log(3), np.log(3), -np.log(3), 0.0])  # P = 3/4, 3/4, 1/4, 1/2
    found = calibration(margins, num_bins=2)
    assert found["accuracy"] == pytest.approx(2.5 / 4) and found["num_pairs"] == 4
    assert found["accuracy_stderr"] == pytest.approx(np.sqrt(2.5 / 4 * 1.5 / 4 / 4))
    assert found["log_loss"] == pytest.approx(-np.mean(np.log([0.75, 0.75, 0.25, 0.5])))
    assert found["brier"] == pytest.approx(np.mean([1 / 16, 1 / 16, 9 / 16, 1 / 4]))
    low, high = found["reliability"]  # confidences 1/2 and 3/4 (right), then 3/4 (right) and 3/4 (wrong)
    assert (low["predicted"], low["observed"]) == (pytest.approx(0.625), pytest.approx(0.75))
    assert (high["predicted"], high["observed"]) == (pytest.approx(0.75), pytest.approx(0.5))
    assert found["ece"] == pytest.approx(0.5 * 0.125 + 0.5 * 0.25)
    assert high["observed_stderr"] == pytest.approx(np.sqrt(0.25 / 2)) and high["num_pairs"] == 2


def test_true_probabilities_are_calibrated_and_doubled_margins_are_not() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 1.5, 20000)
    wins = rng.random(20000) < 1 / (1 + np.exp(-margins))
    signed = np.where(wins, margins, -margins)
    honest, boastful = calibration(signed), calibration(3 * signed)
    for row in honest["reliability"]:
        assert abs(row["predicted"] - row["observed"]) < 4 * row["observed_stderr"]
    assert honest["ece"] < 0.02 < 0.08 < boastful["ece"]
    assert honest["accuracy"] == boastful["accuracy"] and honest["log_loss"] < boastful["log_loss"]


def test_margins_of_any_type_are_reckoned_with_in_float64() -> None:
    margins = np.random.default_rng(0).normal(0, 3, 100).astype(np.float16)
    assert calibration(margins) == calibration(margins.astype(np.float64))


def test_pairs_of_equal_confidence_share_bins_in_the_order_that_they_come_in() -> None:
    """So the table is the same wherever numpy's quicker sort, which is not stable, would order them otherwise."""
    right = np.tile([2.0, 1.0], 100)
    table = calibration(np.concatenate([right, -right]), num_bins=4)["reliability"]
    assert [row["observed"] for row in table] == [1, 0, 1, 0]
