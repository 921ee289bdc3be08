"""Tasks of lm-eval on our policies: the numbers of its own model of transformers, differences, and what is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from ability_tasks import write_tasks
from tiny import save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.abilities import _differences, abilities, ability_work, needed_abilities, score_continuations
from pipelines.ability_counts import count_asked
from pipelines.checks import check_input
from pipelines.estimate import Estimator
from pipelines.plan import make_plan
from pipelines.policy_scores import ScoredWith
from prefarena.config import Abilities, Comparison
from prefarena.data.tables import write_rows
from prefarena.errors import UserError
from prefarena.estimate.stages import planned
from prefarena.evaluation.ability_tasks import Item, item_values, load_tasks
from prefarena.records import ABILITIES
from prefarena.report.abilities import abilities_table
from prefarena.report.results import Ability, EntryResult, Results
from prefarena.stage_files import ITEMS
from prefarena.stages import write_failure

pytest.importorskip("lm_eval")

TEMPLATE = "{% for m in messages %}{{ m.role }} a b {{ m.content }} c\n{% endfor %}{{ 'd e' if add_generation_prompt }}"
NAMES = ("our_choices", "our_answers", "our_texts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def measured(model: Any, settings: Abilities) -> dict[tuple[str, str, int], Item]:
    from lm_eval.evaluator import evaluate

    tasks = load_tasks(settings)
    chat = settings.chat_template
    found = evaluate(model, tasks, limit=settings.limit, log_samples=True, bootstrap_iters=0, apply_chat_template=chat)
    assert found is not None
    return {item[:3]: item for item in item_values(tasks, found["samples"])}


def tokenizer_of(policy: str, template: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = template
    return tokenizer


def ours(policy: str, max_length: int, template: str | None = None) -> Any:
    """A policy whose answers are transformers' own, token by token, in place of an engine's."""
    from prefarena.evaluation.abilities import PolicyLM

    tokenizer = tokenizer_of(policy, template)
    model: Any = AutoModelForCausalLM.from_pretrained(policy)

    def score(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        return score_continuations(policy, ScoredWith(4), None, prompts, responses)

    def generate(prompts: list[list[int]], max_tokens: int, temperature: float) -> list[list[int]]:
        assert temperature == 0
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            answers.append(found[0, len(prompt) :].tolist())
        return answers

    return PolicyLM(tokenizer, max_length, score, generate)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_numbers_are_those_of_lm_evals_own_model(policy: str, folder: Path, template: str | None) -> None:
    from lm_eval.models.huggingface import HFLM

    settings = Abilities(tasks=NAMES, folder=str(folder), limit=5, chat_template=template is not None)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(policy),
        tokenizer=tokenizer_of(policy, template), max_length=64, batch_size=1,
    )  # fmt: skip
    expected, found = measured(theirs, settings), measured(ours(policy, 64, template), settings)
    assert found.keys() == expected.keys() and len(found) == 5 * 5  # acc, acc_norm, exact_match, nll by word and byte
    for key, item in expected.items():
        assert found[key].value == pytest.approx(item.value, abs=1e-4), key
    assert {item.metric for item in found.values() if not item.higher_is_better} == {"nll_per_word", "nll_per_byte"}


def test_log_likelihoods_are_those_of_lm_evals_own_model(policy: str) -> None:
    """Long texts too, of which the model reads windows, and continuations that greedy decoding gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(policy)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(policy), tokenizer=tokenizer, max_length=12, batch_size=1
    )
    own = ours(policy, 12)
    texts = ["a b c d e f g h i j k l", "f e d", "k " * 20]
    asked = [("a b", " c d"), ("", "e f g"), ("a b c d e f g h i j k l a b", " c d e"), ("a ", "b")]
    (answer,) = own.generate_until([Instance("generate_until", {}, ("a b c", {"max_gen_toks": 3}), 0)])
    asked.append(("a b c", f" {answer.strip()}"))
    pairs = [Instance("loglikelihood", {}, one, 0) for one in asked]
    for mine, other in zip(own.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == bool(other[1])
    assert own.loglikelihood(pairs)[-1][1]  # it is what greedy decoding gives
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert own.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-4)


def config(tmp_path: Path, **abilities: Any) -> Comparison:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {place}", "chosen": "b", "rejected": "c"} for place in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"abilities": abilities} if abilities else {}
    entries = [
        {"name": "dpo", "method": {"kind": "dpo"}},
        {"name": "best", "method": {"kind": "best_of_n"}},
    ]
    return Comparison.model_validate(
        {
            "task": {"kind": "text", "data": str(data)}, "output": str(tmp_path / "runs"), "entries": entries,
            "model": {"kind": "scratch", "vocab_size": 300}, "evaluation": given, "seeds": [0, 1],
        }
    )  # fmt: skip


def test_there_is_a_stage_for_every_policy_and_other_stages_keep_their_addresses(tmp_path: Path, folder: Path) -> None:
    plain, asked = config(tmp_path), config(tmp_path, tasks=["our_choices"], folder=str(folder))
    assert [plan.evaluation for plan in make_plan(plain)] == [plan.evaluation for plan in make_plan(asked)]
    stages = [[one.stages() for one in make_plan(given)[0].trained] for given in (plain, asked)]
    assert stages[0] == stages[1]
    assert "abilities" not in plain.evaluation.model_dump() and ability_work(plain, make_plan(plain)) == []
    labels = [stage.label for stage, _, _ in ability_work(asked, make_plan(asked))]
    assert labels == ["reference", "dpo-s0", "dpo-s1"]  # best-of-n has no policy of its own
    fewer = config(tmp_path, tasks=["our_choices"], folder=str(folder), limit=3)
    both = [{stage for stage, _, _ in ability_work(one, make_plan(one))} for one in (asked, fewer)]
    assert not both[0] & both[1]


def test_questions_are_put_in_the_chat_template_and_texts_are_not(policy: str, folder: Path) -> None:
    asked: dict[bool, list[list[int]]] = {}

    def score(contexts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
        sizes = [len(one) + len(other) for one, other in zip(contexts, continuations, strict=True)]
        asked.setdefault(chat, []).append(sizes)
        return np.zeros((len(contexts), 2))

    from prefarena.evaluation.abilities import PolicyLM

    for chat in (False, True):
        model = PolicyLM(tokenizer_of(policy, TEMPLATE), 64, score, lambda *_: [])
        measured(model, Abilities(tasks=("our_choices", "our_texts"), folder=str(folder), limit=3, chat_template=chat))
    (plain, texts), (in_template, texts_too) = asked.values()
    assert texts == texts_too
    assert len(plain) == 12 and all(chat > own for own, chat in zip(plain, in_template, strict=True))


def test_an_estimate_counts_the_tokens_that_an_evaluation_asks_for(policy: str, folder: Path) -> None:
    settings, number = (
        Abilities(tasks=NAMES, folder=str(folder), limit=5),
        defaultdict[str, list[tuple[int, int]]](list),
    )
    model = ours(policy, 64)
    score, generate = model._score, model._generate

    def scored(contexts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
        number["scored"] += [(len(one), len(other)) for one, other in zip(contexts, continuations, strict=True)]
        return np.asarray(score(contexts, continuations))

    def answered(contexts: list[list[int]], most: int, temperature: float) -> list[list[int]]:
        number["answered"] += [(len(one), most) for one in contexts]
        return list(generate(contexts, most, temperature))

    model._score, model._generate = scored, answered
    measured(model, settings)
    asked = count_asked(settings, tokenizer_of(policy), 64)
    for name, rows in (("scored", asked.scored), ("answered", asked.answered)):
        assert list(zip(rows.prompts.tolist(), rows.responses[:, 0].tolist(), strict=True)) == number[name] != []


def test_an_estimate_has_a_stage_of_abilities_for_every_policy_but_best_of_n(tmp_path: Path, folder: Path) -> None:
    given = config(tmp_path, tasks=list(NAMES), folder=str(folder), limit=5)
    with_them = Estimator(None, tmp_path, lambda _: None)._workload(given)
    stages = [one for one in planned(with_them) if one.stage == "evaluation (abilities)"]
    assert [(one.entry, one.times) for one in stages] == [(None, 1), ("dpo", 2)]  # two seeds
    assert all(one.work.generated == 5 * 6 and one.work.flops > 0 for one in stages)  # answers of at most six tokens
    without = Estimator(None, tmp_path, lambda _: None)._workload(config(tmp_path))
    assert not any("abilities" in one.stage for one in planned(without))


def test_a_chat_template_that_is_not_there_is_told_before_any_work(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"abilities.chat_template: the model's tokenizer has no chat template"):
        check_input(config(tmp_path, tasks=["our_choices"], folder=str(folder), chat_template=True))


def test_what_lm_eval_does_not_know_is_told_before_any_work(tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=r"no_such/folder is not a folder"):
        check_input(config(tmp_path, tasks=["our_choices"], folder="no_such/folder"))
    broken = write_tasks(tmp_path / "broken")
    (broken / "capitals.jsonl").unlink()
    with pytest.raises(UserError, match=r"abilities.tasks: our_choices: .*capitals"):
        load_tasks(Abilities(tasks=("our_choices",), folder=str(broken)))
    with pytest.raises(ValueError, match="is for text tasks"):
        Comparison.model_validate(
            {"entries": [{"name": "a", "method": {"kind": "dpo"}}], "evaluation": {"abilities": {"tasks": ["x"]}}}
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'prefarena\[abilities\]'"):
        load_tasks(Abilities(tasks=("our_choices",)))


def test_differences_are_paired_by_item() -> None:
    key = ("task", "acc", True)
    own, base = {key: {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}}, {key: {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0, 9: 1.0}}
    (row,) = _differences("dpo", 0, own, base)
    assert (row.value, row.reference, row.difference, row.num_items) == (0.75, 0.5, 0.25, 4)
    assert row.stderr == pytest.approx(np.std([0, -1, 1, 1], ddof=1) / 2)


def test_seeds_share_what_the_reference_can_do_and_failed_stages_are_left_out(tmp_path: Path, folder: Path) -> None:
    given = config(tmp_path, tasks=["our_choices"], folder=str(folder))
    plans = make_plan(given)
    stages = {stage.label: stage for stage, _, _ in ability_work(given, plans)}
    assert needed_abilities(given, plans) == list(stages.values())
    for label, values in (("reference", [1.0, 0.0, 1.0]), ("dpo-s0", [0.0, 0.0, 1.0])):
        made = stages[label].begin()
        rows = [Item("our_choices", "acc", place, value, True)._asdict() for place, value in enumerate(values)]
        write_rows(pa.Table.from_pylist(rows, schema=ABILITIES), made / ITEMS, ABILITIES)
        stages[label].finish(costs={})
    assert needed_abilities(given, plans) == [stages["dpo-s1"]]
    write_failure(stages["dpo-s1"].folder, "its engine was lost", label="dpo-s1")
    assert needed_abilities(given, plans) == []
    (row,) = abilities(given, plans)
    assert (row.entry, row.seed, row.value, row.difference) == ("dpo", 0, pytest.approx(1 / 3), pytest.approx(-1 / 3))


def test_the_table_says_what_is_worse_after_holms_correction() -> None:
    rows = [
        Ability(entry=entry, seed=0, task=task, metric="acc", value=0.5 + gap, reference=0.5, difference=gap,
                stderr=0.1, num_items=50, higher_is_better=higher)
        for entry, task, gap, higher in [
            ("a", "one", -0.5, True), ("b", "one", 0.22, True), ("a", "two", 0.5, True), ("b", "two", 0.5, False),
        ]
    ]  # fmt: skip
    entries = [EntryResult(name=name, kind="dpo") for name in ("a", "b")]
    results = Results(name="some", task={}, seeds=[0], exact=False, entries=entries, abilities=rows)
    table = abilities_table(results)
    assert table is not None
    verdicts = {(row[0], row[2]): row[-1] for row in table.rows}
    assert verdicts == {  # b's p on one is 0.028, the largest of four
        ("one", "a"): "worse", ("one", "b"): "better", ("two", "a"): "better", ("two", "b"): "worse",
    }  # fmt: skip
    weaker = [rows[0], *(row.model_copy(update={"difference": 0.22}) for row in rows[1:])]
    table = abilities_table(results.model_copy(update={"abilities": weaker}))
    assert table is not None  # 0.028, thrice: more than chance alone, and not among four
    assert [row[-1] for row in table.rows] == ["worse", *["no difference shown"] * 3]
    assert abilities_table(results.model_copy(update={"abilities": []})) is None
