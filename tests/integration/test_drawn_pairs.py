"""Pairs that are drawn from a policy: chosen, labelled, counted; what they depend on; and what a stop leaves to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console
from tiny import VOCABULARY, save_tiny_policy

from pipelines import sampling
from pipelines.checks import check_input
from pipelines.compare import all_stages
from pipelines.drawn_pairs import _check_silence, make_drawn_pairs
from pipelines.labelling import Labeller
from pipelines.plan import SeedPlan, make_plan
from pipelines.prepare import prepare
from pipelines.prompts import PromptTable, prepare_prompt_rows
from prefarena.config import Annotator, Comparison, DrawnPairs, FunctionJudge, PretrainedModel, TextTask
from prefarena.data.preparation import prepare_prompts, prompt_of
from prefarena.data.sources import Chunk
from prefarena.data.splits import ALL_TEST, NONE_HELD_OUT, Shares
from prefarena.data.tables import read_rows
from prefarena.data.tokenization import Tokenizer, TokenPrompt
from prefarena.errors import UserError
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import Sampling
from prefarena.judges.function import FunctionScorer
from prefarena.judges.spec import JudgeSpec
from prefarena.records import DRAWN, PROMPTS, Rollout, content_id
from prefarena.report.results import load_results
from prefarena.tasks.annotation import Contest, answered, choose_covered, contests_of_scores, make_pairs

NUM_PROMPTS, NUM_SAMPLES = 60, 5
LETTERS = VOCABULARY[3:]


def tables() -> tuple[pa.Table, pa.Table]:
    """(samples, prompts): random responses of one token, some repeated; a fifth of the prompts are to test on."""
    source = np.random.default_rng(0)
    prompts, samples = [], []
    for number in range(NUM_PROMPTS):
        ids = [1, 3 + number % 13, 3 + number // 13]
        name = content_id(ids)
        split = "test" if number % 5 == 0 else "train"
        prompts.append({"id": name, "prompt_ids": ids, "covered": split == "train", "split": split})
        for place in range(NUM_SAMPLES):
            row = {"id": content_id(name, place), "prompt_id": name, "place": place, "prompt_ids": ids}
            samples.append(row | {"response_ids": [int(source.integers(0, 40)), 2]})
    return pa.Table.from_pylist(samples, schema=DRAWN), pa.Table.from_pylist(prompts, schema=PROMPTS)


def gold(response: list[int]) -> float:
    return float(sum(response))


def labelled(share: float = 1.0, **settings: Any) -> tuple[dict[str, pa.Table], Any]:
    pairs = DrawnPairs(num_samples=NUM_SAMPLES, **settings)
    prompts = answered(*tables(), share, pairs)
    contests = [contests_of_scores(p, np.array([gold(r) for r in p.responses]), pairs) for p in prompts]
    return make_pairs(prompts, contests, pairs)


def gaps(table: pa.Table) -> np.ndarray:
    return np.array([gold(row["chosen_ids"]) - gold(row["rejected_ids"]) for row in table.to_pylist()])


# --------------------------------------------------------------------------------------------------- labels


def test_deterministic_labels_are_the_order_of_the_scores() -> None:
    made, counts = labelled()
    assert (gaps(made["train"]) > 0).all() and (gaps(made["test"]) > 0).all()
    assert counts["ties"] == counts["flipped"] == 0
    different = {p.id: len(p.responses) for p in answered(*tables(), 1.0, DrawnPairs(num_samples=NUM_SAMPLES))}
    assert sum(t.num_rows for t in made.values()) == sum(n * (n - 1) // 2 for n in different.values())
    assert len({row["id"] for t in made.values() for row in t.to_pylist()}) == sum(t.num_rows for t in made.values())


def test_best_against_worst_is_one_pair_a_prompt() -> None:
    made, _ = labelled(choose="best_worst")
    samples, _ = tables()
    extremes: dict[tuple[int, ...], tuple[float, float]] = {}
    for row in samples.to_pylist():
        low, high = extremes.get(tuple(row["prompt_ids"]), (np.inf, -np.inf))
        value = gold(row["response_ids"])
        extremes[tuple(row["prompt_ids"])] = (min(low, value), max(high, value))
    for row in [*made["train"].to_pylist(), *made["test"].to_pylist()]:
        assert (gold(row["rejected_ids"]), gold(row["chosen_ids"])) == extremes[tuple(row["prompt_ids"])]
    assert made["train"].num_rows + made["test"].num_rows == NUM_PROMPTS


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_share_that_was_asked_for_is_turned_round_and_no_test_pair_is(share: float) -> None:
    made, counts = labelled(flip_share=share)
    turned = gaps(made["train"]) < 0
    assert turned.sum() == counts["flipped"] == round(share * len(turned))
    assert (gaps(made["test"]) > 0).all()


@pytest.mark.parametrize("temperature", [3.0, 10.0])
def test_bradley_terry_labels_come_as_often_as_the_sigmoid_says(temperature: float) -> None:
    """By gap, over 40 seeds: within four standard errors of a binomial share."""
    found = np.concatenate(
        [
            gaps(labelled(labels="bradley_terry", label_temperature=temperature, seed=seed)[0]["train"])
            for seed in range(40)
        ]
    )
    for low, high in ((1, 5), (5, 12), (12, 40)):
        some = found[(np.abs(found) >= low) & (np.abs(found) < high)]
        chances = 1 / (1 + np.exp(-np.abs(some) / temperature))
        error = np.sqrt((chances * (1 - chances)).sum()) / len(some)
        assert len(some) > 1000
        assert abs((some > 0).mean() - chances.mean()) < 4 * error


def test_ties_make_no_pair_and_are_counted_and_bradley_terry_tosses_a_coin() -> None:
    pairs = DrawnPairs(num_samples=NUM_SAMPLES)
    prompts = answered(*tables(), 1.0, pairs)
    level = [contests_of_scores(prompt, np.zeros(len(prompt.responses)), pairs) for prompt in prompts]
    made, counts = make_pairs(prompts, level, pairs)
    assert made["train"].num_rows == made["test"].num_rows == 0 and counts["ties"] == sum(map(len, level)) > 400
    drawn = pairs.model_copy(update={"labels": "bradley_terry"})
    made, counts = make_pairs(prompts, [[Contest(c.first, c.second, 0.5) for c in its] for its in level], drawn)
    assert counts["ties"] == 0 and 0.4 < (gaps(made["train"]) > 0).mean() < 0.6


def test_a_response_without_a_score_is_in_no_pair() -> None:
    pairs = DrawnPairs(num_samples=NUM_SAMPLES)
    prompts = answered(*tables(), 1.0, pairs)
    scores = [np.array([np.nan if gold(r) > 30 else gold(r) for r in p.responses]) for p in prompts]
    for choose in ("all", "best_worst"):
        own = pairs.model_copy(update={"choose": choose})
        made, _ = make_pairs(
            prompts, [contests_of_scores(p, s, own) for p, s in zip(prompts, scores, strict=True)], own
        )
        rows = made["train"].to_pylist()
        assert rows and all(gold(row[side]) <= 30 for row in rows for side in ("chosen_ids", "rejected_ids"))


def test_annotators_with_noise_of_their_own_disagree_and_one_without_does_not() -> None:
    made, _ = labelled(annotators=[{"noise": 0.0}, {"noise": 1e6}])
    by_source = {
        source: gaps(made["train"].filter(pa.compute.equal(made["train"]["source"], source))) > 0
        for source in ("annotator 0", "annotator 1")
    }
    assert by_source["annotator 0"].all()
    assert 0.35 < by_source["annotator 1"].mean() < 0.65
    prompts_of = {
        source: {tuple(row["prompt_ids"]) for row in made["train"].to_pylist() if row["source"] == source}
        for source in by_source
    }
    assert not prompts_of["annotator 0"] & prompts_of["annotator 1"]
    assert all(len(its) > 12 for its in prompts_of.values())


def test_a_prompt_is_labelled_alike_whichever_others_there_are() -> None:
    samples, prompts = tables()
    settings = DrawnPairs(labels="bradley_terry", annotators=(Annotator(noise=2.0), Annotator(noise=1.0)))
    some = set(prompts["id"].to_pylist()[:20])

    def rows(names: set[str]) -> set[str]:
        kept = [row for row in samples.to_pylist() if row["prompt_id"] in names]
        its = [row for row in prompts.to_pylist() if row["id"] in names]
        found = answered(pa.Table.from_pylist(kept, DRAWN), pa.Table.from_pylist(its, PROMPTS), 1.0, settings)
        contests = [contests_of_scores(p, np.array([gold(r) for r in p.responses]), settings) for p in found]
        return set(make_pairs(found, contests, settings)[0]["train"]["id"].to_pylist())

    assert rows(some) and rows(some) <= rows(set(prompts["id"].to_pylist()))


# -------------------------------------------------------------------------------------------------- coverage


def test_the_covered_share_of_the_training_prompts_has_pairs_and_every_test_prompt_has() -> None:
    made, _ = labelled(share=0.25)
    train, test = ({tuple(row["prompt_ids"]) for row in made[split].to_pylist()} for split in ("train", "test"))
    assert len(train) == 12 and len(test) == 12 and not train & test
    assert train != {tuple(row["prompt_ids"]) for row in labelled(share=0.25, seed=1)[0]["train"].to_pylist()}


def test_one_prompt_at_the_least_is_covered() -> None:
    assert len(choose_covered(["a", "b", "c"], 0.01, 0)) == 1
    assert choose_covered(["a", "b", "c"], 1.0, 0) == {"a", "b", "c"}


# -------------------------------------------------------------------------------------- prompts without answers


def write_prompts(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def some_prompts(number: int) -> list[dict[str, str]]:
    return [{"prompt": f"{LETTERS[i % 13]} {LETTERS[i // 13 % 13]} {LETTERS[i // 169]}"} for i in range(number)]


def test_prompts_alone_become_a_table(ray_session: None, tmp_path: Path, tiny_policy: str) -> None:
    rows: list[Any] = [*some_prompts(50), {"prompt": " "}, {"other": 1}, some_prompts(1)[0], {"prompt": "a " * 40}]
    data = write_prompts(tmp_path / "prompts.jsonl", rows)
    task = TextTask(data=data, pairs=DrawnPairs(), test_share=0.3, max_rejected_share=0.1, max_prompt_tokens=16)
    summary = prepare_prompt_rows(task, PretrainedModel(path=tiny_policy), tmp_path / "out", 1)
    table = read_rows(tmp_path / "out" / "prompts")
    assert table.schema.equals(PROMPTS) and table.num_rows == 50
    assert summary["num_train_prompts"] + summary["num_test_prompts"] == 50 and summary["num_test_prompts"] > 5
    assert summary["dropped"] == {
        "empty prompt": 1, "missing column": 1, "repeats an earlier prompt": 1, "prompt too long": 1,
    }  # fmt: skip
    by_ids = {tuple(ids) for ids in table["prompt_ids"].to_pylist()}
    words = {word: number for number, word in enumerate(VOCABULARY)}
    assert by_ids == {(1, *(words[word] for word in row["prompt"].split())) for row in rows[:50]}


def test_prompts_that_are_tested_on_do_not_train(tmp_path: Path, tiny_policy: str) -> None:
    rows = some_prompts(20)
    task = TextTask(data="prompts.jsonl", test_data="test.jsonl", pairs=DrawnPairs())
    tokenizer = Tokenizer.load(tiny_policy, None, task)

    def prepared(some: list[dict[str, str]], shares: Shares) -> pa.Table:
        lines = "".join(json.dumps(row) + "\n" for row in some)
        return prepare_prompts(Chunk("prompts.jsonl", 1, "lines", lines.encode()), task, tokenizer, shares=shares)

    with PromptTable(tmp_path, own_test=True) as table:
        table.add(prepared(rows[:6], ALL_TEST), table.test_rejections)
        table.add(prepared(rows, NONE_HELD_OUT), table.rejections)
    summary = table.summary(task, len(rows))
    assert (summary["num_train_prompts"], summary["num_test_prompts"]) == (14, 6)
    assert summary["dropped"] == {"its dialogue is in the test data": 6}


@pytest.mark.parametrize("form", ["auto", "conversational"])
def test_messages_become_the_prompt_that_generation_is_given(tiny_policy: str, form: Any) -> None:
    task = TextTask(data="prompts.jsonl", pairs=DrawnPairs(), format=form)
    tokenizer = Tokenizer.load(tiny_policy, None, task)
    template = "{% for m in messages %}{{ m.content }} d {% endfor %}{% if add_generation_prompt %}e{% endif %}"
    tokenizer.tokenizer.chat_template = template
    row = {"prompt": [{"role": "user", "content": "a b"}]} if form == "auto" else {"prompt": "a b"}
    (found,) = tokenizer.prompts([prompt_of(row, task)])
    assert isinstance(found, TokenPrompt) and found.prompt_ids == [1, 3, 4, 6, 7]


# ------------------------------------------------------------------------------------------------------ the plan


def config(folder: Path, policy: str, data: str, pairs: dict[str, Any] | None = None, **task: Any) -> Comparison:
    section = {} if pairs is None else {"pairs": pairs}
    return Comparison.model_validate(
        {
            "output": str(folder / "runs"),
            "task": {
                "kind": "text", "data": data, "test_share": 0.2, "max_prompt_tokens": 8, "max_response_tokens": 6,
                **section, **task,
            },
            "model": {"kind": "pretrained", "path": policy},
            "reference": {"train": False},
            "judge": {"kind": "function", "function": "tests.helpers.scores:sum_of_ids"},
            "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
        }
    )  # fmt: skip


def keys(made: Comparison) -> dict[str, str]:
    return {stage.kind: stage.key for stage in all_stages(make_plan(made))}


def test_each_setting_makes_new_pairs_and_only_those_of_drawing_make_new_samples(
    tmp_path: Path, tiny_policy: str
) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", some_prompts(20))

    def of(pairs: dict[str, Any], **task: Any) -> dict[str, str]:
        return keys(config(tmp_path, tiny_policy, data, pairs, **task))

    other = save_tiny_policy(tmp_path / "other", seed=3)
    plain = of({})
    labels: list[dict[str, Any]] = [
        {"choose": "best_worst"}, {"labels": "bradley_terry"}, {"flip_share": 0.1},
        {"labels": "bradley_terry", "label_temperature": 2.0}, {"annotators": [{}, {"noise": 1.0}]},
        {"annotators": [{"judge": {"kind": "function", "function": "tests.helpers.scores:silent_about_a"}}]},
        {"annotators": [{"noise": 0.5}]},
    ]  # fmt: skip
    found = [of(one) for one in labels] + [of({}, covered_share=0.5)]
    assert len({each["pairs"] for each in [plain, *found]}) == len(labels) + 2
    assert {each["drawn"] for each in found} == {plain["drawn"]}
    drawing: list[dict[str, Any]] = [
        {"num_samples": 3}, {"temperature": 0.7}, {"seed": 1}, {"policy": {"path": other}},
    ]  # fmt: skip
    again = [of(one) for one in drawing]
    assert len({each["drawn"] for each in [plain, *again]}) == len({each["pairs"] for each in [plain, *again]}) == 5
    assert {each["data"] for each in [*found, *again]} == {plain["data"]}
    assert all(each["logps"] != plain["logps"] and each["dpo"] != plain["dpo"] for each in [*found, *again])


def test_without_the_section_every_address_is_what_it_was(tmp_path: Path, tiny_policy: str) -> None:
    data = write_prompts(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    plain = config(tmp_path, tiny_policy, data)
    assert make_plan(plain)[0].pairs == make_plan(plain)[0].data
    assert "drawn" not in keys(plain) and "pairs" not in keys(plain)
    assert keys(plain)["data"] == keys(config(tmp_path, tiny_policy, data, {}))["data"]
    half = config(tmp_path, tiny_policy, data, covered_share=0.5)
    assert keys(half)["data"] == keys(plain)["data"] and keys(half)["logps"] != keys(plain)["logps"]


def test_addresses_are_those_of_before_there_was_such_a_section() -> None:
    """Read off the commit before it."""
    tree = {"output": "/nowhere", "task": {"kind": "text", "data": "no/such-data"}, "entries": [
        {"name": "dpo", "method": {"kind": "dpo", "beta": 0.1}}]}  # fmt: skip
    made = keys(Comparison.model_validate(tree))
    assert made["data"] == "data-text-4c08c07ee2de"
    assert made["judge"] == "judge-text-876f80d6fb39"
    assert made["logps"] == "logps-text-739b4b2bba45"


def test_a_policy_may_be_named_by_its_path() -> None:
    assert DrawnPairs.model_validate({"policy": "reference"}) == DrawnPairs()
    assert DrawnPairs.model_validate({"policy": "a/b"}).policy == PretrainedModel(path="a/b")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference": {"train": True}}, "prompts without answers, but reference.train: true learns from answers"),
        ({"judge": {"kind": "learned"}}, "but judge.kind: learned learns from answers"),
        ({"model": {"kind": "scratch"}, "reference": {"train": True}}, "but model.kind: scratch learns from answers"),
    ],
)
def test_prompts_alone_cannot_teach(tmp_path: Path, tiny_policy: str, changed: dict[str, Any], message: str) -> None:
    made = config(tmp_path, tiny_policy, write_prompts(tmp_path / "prompts.jsonl", some_prompts(20)), {})
    tree = made.model_dump(mode="json") | changed
    with pytest.raises(UserError, match=message):
        check_input(Comparison.model_validate(tree))


def test_a_policy_with_other_tokens_is_refused(tmp_path: Path, tiny_policy: str) -> None:
    from transformers import PreTrainedTokenizerFast

    other = save_tiny_policy(tmp_path / "other")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(other)
    tokenizer.add_tokens(["z"])
    tokenizer.save_pretrained(other)
    data = write_prompts(tmp_path / "prompts.jsonl", some_prompts(20))
    check_input(config(tmp_path, tiny_policy, data, {"policy": {"path": tiny_policy}}))
    with pytest.raises(UserError, match=r"task\.pairs\.policy: .*not have the same tokenizer as `model`"):
        check_input(config(tmp_path, tiny_policy, data, {"policy": {"path": other}}))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"annotators": [{"judge": {"kind": "gold"}}]}, "exists only on the enumerable language"),
        ({"annotators": [{"judge": {"kind": "learned"}}]}, "leave the annotator's judge out"),
        ({"annotators": []}, "at least 1"),
        ({"num_samples": 1}, "greater than or equal to 2"),
        ({"choose": "best_worst", "annotators": [{"judge": {"kind": "pairwise", "base_url": "u", "model": "m"}}]},
         "choose: best_worst needs scores"),
        ({"labels": "bradley_terry", "annotators": [{"judge": {"kind": "pairwise", "base_url": "u", "model": "m"}}]},
         "labels: bradley_terry needs scores"),
    ],
)  # fmt: skip
def test_settings_that_contradict_themselves_are_refused(tmp_path: Path, pairs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, "a-model", "prompts.jsonl", pairs)


# ------------------------------------------------------------------------------------------ judges, and a stop


def test_a_function_may_be_silent_where_that_is_asked_for_and_nowhere_else(tiny_policy: str) -> None:
    settings = FunctionJudge(function="tests.helpers.scores:silent_about_a")
    rows = [[1, 3]] * 3, [[3, 2], [4, 2], [5, 5, 2]]
    found = FunctionScorer(settings, tiny_policy, may_be_silent=True).score(*rows)
    assert np.isnan(found[:2]).all() and found[2] == 3
    with pytest.raises(Exception, match="must return one number for each row"):
        FunctionScorer(settings, tiny_policy).score(*rows)


def test_too_many_rows_without_a_score_end_the_run() -> None:
    values = np.array([np.nan, *range(49)])
    assert _check_silence(values, DrawnPairs(max_silent_share=0.02), "function") == 1
    with pytest.raises(UserError, match=r"1 of 50 rows no usable score, more than max_silent_share 0\.01 allows"):
        _check_silence(values, DrawnPairs(max_silent_share=0.01), "function")


def test_a_part_that_is_kept_is_not_scored_again(tmp_path: Path, tiny_policy: str) -> None:
    spec = JudgeSpec(FunctionJudge(function="tests.helpers.scores:sum_of_ids"), None, tiny_policy, may_be_silent=True)
    rows = [[1, 3], [1, 4]], [[3, 2], [4, 2]]
    assert Labeller(spec, 8, "cpu", 1, str(tmp_path)).ask(*rows).tolist() == [5, 6]
    (kept,) = tmp_path.glob("*.npy")
    np.save(kept, np.array([7.0, 8.0]))  # so that it shows where the values come from
    again = Labeller(spec, 8, "cpu", 1, str(tmp_path))
    assert again.ask(*rows).tolist() == [7, 8]
    assert again.ask([[1, 3]], [[3, 2]]).tolist() == [5]
    assert Labeller(
        replace(spec, settings=FunctionJudge(function="tests.helpers.scores:silent_about_a")),
        8,
        "cpu",
        1,
        str(tmp_path),
    ).ask([[1, 3]], [[5, 5, 2]]).tolist() == [3]


@pytest.fixture
def engine(generator: Generators, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The test run's own engine in place of new ones; how many prompts it was given, call by call."""
    asked: list[int] = []
    plain = generator.generate

    def counted(prompts: list[list[int]], sampling_: Sampling, version: str) -> list[Rollout]:
        asked.append(len(prompts))
        return plain(prompts, sampling_, version)

    monkeypatch.setattr(generator, "generate", counted)
    monkeypatch.setattr(generator, "stop", lambda: None)
    monkeypatch.setattr(sampling, "start_generator", lambda *_, **__: generator)
    yield asked


def made(settings: Comparison) -> SeedPlan:
    """The stages up to the pairs, of one seed."""
    plans = make_plan(settings)
    untried = settings.model_copy(update={"entries": ()})
    prepare(untried, [SeedPlan(**{**vars(plan), "trained": (), "scored": {}}) for plan in plans], Console(quiet=True))
    return plans[0]


def test_pairs_are_drawn_judged_and_go_on_after_a_stop(
    tmp_path: Path, tiny_policy: str, engine: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", some_prompts(100))
    settings = config(tmp_path, tiny_policy, data, {"num_samples": 3}, covered_share=0.5)
    expected_calls = [256, 44]
    written: Callable[..., None] = sampling.KeptRollouts.forget
    monkeypatch.setattr(sampling.KeptRollouts, "forget", _stop)
    with pytest.raises(ConnectionError):
        made(settings)
    assert engine == expected_calls
    monkeypatch.setattr(sampling.KeptRollouts, "forget", written)
    plan = make_plan(settings)[0]
    assert plan.drawn is not None and plan.drawn.finished and not plan.pairs.finished
    plan = made(settings)
    assert engine == expected_calls  # nothing is drawn again
    pairs = read_rows(plan.pairs.folder / "train_pairs")
    summary = plan.pairs.manifest()["data"]
    assert pairs.num_rows == summary["num_train_pairs"] > 50
    assert all(sum(row["chosen_ids"]) > sum(row["rejected_ids"]) for row in pairs.to_pylist())
    prompts = read_rows(plan.tables / "prompts").to_pylist()
    train = [row for row in prompts if row["split"] == "train"]
    with_pairs = {tuple(row["prompt_ids"]) for row in pairs.to_pylist()}
    assert {tuple(row["prompt_ids"]) for row in train if row["covered"]} == with_pairs
    assert summary["num_covered_prompts"] + summary["num_without_pairs"] == round(0.5 * len(train))
    told = {tuple(row["prompt_ids"]) for row in read_rows(plan.tables / "demonstrations").to_pylist()}
    assert told == {tuple(row["prompt_ids"]) for row in train}  # the policy's own answers, on prompts without pairs too
    silent = {"annotators": [{"judge": {"kind": "function", "function": "tests.helpers.scores:silent_about_a"}}]}
    silent |= {"max_silent_share": 0.9}  # type: ignore[dict-item]
    plan = made(config(tmp_path, tiny_policy, data, {"num_samples": 3, **silent}))
    costs = plan.pairs.manifest()["costs"]
    assert 0 < costs["num_silent"] < costs["num_labels"] and engine == expected_calls
    spoken = {tuple(ids) for side in ("chosen_ids", "rejected_ids") for ids in
              read_rows(plan.pairs.folder / "train_pairs")[side].to_pylist()}  # fmt: skip
    assert spoken and not any(ids[0] in (3, 4) for ids in spoken)  # a and b, which the judge gives no number


def _stop(*_: object) -> None:
    raise ConnectionError("the driver is gone")


def test_pairs_of_a_file_are_kept_of_the_covered_prompts_alone(
    ray_session: None, tmp_path: Path, tiny_policy: str
) -> None:
    rows = [{**row, "chosen": "a b", "rejected": answer} for row in some_prompts(60) for answer in ("c", "d")]
    settings = config(tmp_path, tiny_policy, write_prompts(tmp_path / "pairs.jsonl", rows), covered_share=0.25)
    plan = made(settings)
    whole, kept = (read_rows(folder / "train_pairs") for folder in (plan.data.folder, plan.pairs.folder))
    prompts = read_rows(plan.tables / "prompts").to_pylist()
    covered = {tuple(row["prompt_ids"]) for row in prompts if row["covered"]}
    assert len(covered) == round(0.25 * whole.num_rows / 2) and kept.num_rows == 2 * len(covered)
    assert {tuple(ids) for ids in kept["prompt_ids"].to_pylist()} == covered
    assert read_rows(plan.tables / "demonstrations").num_rows == whole.num_rows / 2
    assert read_rows(plan.pairs.folder / "test_pairs").equals(read_rows(plan.data.folder / "test_pairs"))
    make_drawn_pairs(settings, [plan], Console(quiet=True))  # is finished


@pytest.mark.long
def test_everything_after_the_pairs_takes_them_as_those_of_a_file(tmp_path: Path, tiny_policy: str) -> None:
    """A whole comparison by the command, in a process of its own."""
    data = write_prompts(tmp_path / "prompts.jsonl", some_prompts(120))
    quick = {"num_steps": 12, "batch_size": 16, "learning_rate": 1e-3}
    learned = {"kind": "learned", "training": quick}
    ppo = {"num_iterations": 2, "rollouts_per_iteration": 16, "num_minibatches": 2, "micro_batch_size": 16}
    pairs = {"labels": "bradley_terry", "label_temperature": 5.0, "annotators": [{}, {"noise": 1.0}]}
    tree = config(tmp_path, tiny_policy, data, pairs, covered_share=0.5).model_dump(mode="json") | {
        "entries": [
            {"name": "dpo", "method": {"kind": "dpo", "training": {**quick, "num_steps": 60}}},
            {"name": "mpo", "method": {"kind": "mpo", "training": quick}},
            {"name": "kto", "method": {"kind": "kto", "training": quick}},
            {"name": "rlhf", "method": {"kind": "rlhf", "reward": learned, "training": ppo}},
            {"name": "best-of-3", "method": {"kind": "best_of_n", "reward": learned, "n": 3}},
        ],
        "evaluation": {"num_prompts": 16, "samples_per_prompt": 8, "num_reference_samples": 32},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pipelines", "compare", str(path)], check=True, timeout=900)
    results = load_results(next((tmp_path / "runs").glob("*/results.json")).parent)
    assert {entry.name for entry in results.entries if entry.seeds} == {
        "reference", "dpo", "mpo", "kto", "rlhf", "best-of-3",
    }  # fmt: skip
    assert results.entry("dpo").seeds["0"]["judge_score"] > results.entry("reference").seeds["0"]["judge_score"]
    for group in ("covered", "uncovered"):
        assert all(
            results.entry(name).seeds["0"][f"kl_vocabulary/{group}"] > 0 for name in ("dpo", "mpo", "kto", "rlhf")
        )
        assert results.entry("best-of-3").seeds["0"][f"judge_score/{group}_stderr"] > 0
    assert any(note.startswith("Pairs: ") for note in results.notes)
    assert results.data["num_train_pairs"] > 200 and results.data["num_covered_prompts"] < 60
