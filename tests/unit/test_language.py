"""The enumerable language: its source, tokenizer, gold reward and pairs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from prefarena.config import LanguageTask
from prefarena.errors import UserError
from prefarena.evaluation.enumeration import Responses
from prefarena.records import DEMONSTRATIONS, PAIRS, PROMPTS
from prefarena.tasks.gold import CONTROL_COST, GoldReward
from prefarena.tasks.language import EOS_ID, Language
from prefarena.tasks.pairs import sample_pairs

TASK = LanguageTask(
    seed=3, num_letters=4, num_prompts=6, prompt_letters=2, response_limit=3, num_demonstrations=24_000, num_pairs=3000
)
RESPONSES = Responses.listed(7, 3, EOS_ID)


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(TASK)


@pytest.fixture(scope="module")
def ref_logps(language: Language) -> np.ndarray:
    """A reference that gives every response some probability, pad and bos inside too: [6, 259]."""
    logits = np.random.default_rng(0).normal(size=(TASK.num_prompts, len(RESPONSES.lengths)))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def gold(language: Language, ref_logps: np.ndarray) -> GoldReward:
    return GoldReward.fit(TASK, language.prompt_ids, RESPONSES.sequences, ref_logps)


def test_source_is_a_distribution_over_letters_and_eos(language: Language) -> None:
    probabilities = np.exp(language.source_logps(RESPONSES.sequences))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    control = ((RESPONSES.sequences == 0) | (RESPONSES.sequences == 1)).any(axis=1)
    assert control.any() and probabilities[:, control].max() == 0


def test_source_depends_on_prompt_and_previous_token(language: Language) -> None:
    prompts, tokens = np.array(language.prompt_ids)[:, 1:], np.arange(3, 7)
    by_prompt = language.source.logps(prompts, np.full(len(prompts), 3), 0)[:, 3:]
    by_previous = language.source.logps(np.repeat(prompts[:1], 4, axis=0), tokens, 0)[:, 3:]
    assert by_prompt.std(axis=0).mean() > 0.3 and by_previous.std(axis=0).mean() > 0.3


def test_source_is_its_formula(language: Language) -> None:
    source = language.source
    for prompt, previous, position in itertools.product(language.prompt_ids[:2], range(3, 7), range(3)):
        letters = prompt[1:]
        logits = {2: source.hazard[position] + source.ending[previous]}
        for v in range(3, 7):
            interaction = sum(source.prompt[j][x][v] for j, x in enumerate(letters)) / 2**0.5
            logits[v] = source.unigram[v] + source.bigram[previous][v] + interaction
        total = np.log(sum(np.exp(value) for value in logits.values()))
        row = source.logps(np.array([letters]), np.array([previous]), position)[0]
        np.testing.assert_allclose(row[2:], [logits[v] - total for v in range(2, 7)])
    assert (np.diff(source.hazard) > 0).all() and source.ending.std() > 0.1


def test_prompts_are_found_or_refused(language: Language) -> None:
    np.testing.assert_array_equal(language.prompt_rows([language.prompt_ids[4], language.prompt_ids[1]]), [4, 1])
    with pytest.raises(UserError, match="not a prompt"):
        language.prompt_rows([[1, 3]])


def test_demonstrations_follow_the_source(language: Language) -> None:
    rows = language.sample_demonstrations()
    assert rows.schema == DEMONSTRATIONS and rows.num_rows == TASK.num_demonstrations
    assert len(set(rows["id"].to_pylist())) == rows.num_rows
    prompts, responses = rows["prompt_ids"].to_pylist(), rows["response_ids"].to_pylist()
    index = RESPONSES.index(responses)  # fails unless each one ends by eos or at the limit
    expected = np.exp(language.source_logps(RESPONSES.sequences))
    for row, prompt in enumerate(language.prompt_ids):
        own = index[[i for i, given in enumerate(prompts) if given == prompt]]
        assert len(own) == TASK.num_demonstrations // TASK.num_prompts
        observed = np.bincount(own, minlength=len(RESPONSES.lengths)) / len(own)
        error = np.sqrt(expected[row] * (1 - expected[row]) / len(own))
        assert (np.abs(observed - expected[row]) <= 5 * error + 1e-3).all()


def test_the_language_is_a_function_of_its_seed(language: Language) -> None:
    again, other = Language(TASK), Language(TASK.model_copy(update={"seed": 4}))
    assert again.prompts().equals(language.prompts())
    assert again.sample_demonstrations().equals(language.sample_demonstrations())
    assert not np.allclose(other.source.bigram, language.source.bigram)
    assert not other.prompts().equals(language.prompts())


def test_more_demonstrations_leave_prompts_and_source_alone(language: Language) -> None:
    more = Language(TASK.model_copy(update={"num_demonstrations": 10, "num_pairs": 2}))
    assert more.prompt_ids == language.prompt_ids and np.array_equal(more.source.prompt, language.source.prompt)


def test_prompts_differ_and_the_asked_share_is_covered() -> None:
    language = Language(LanguageTask(num_prompts=64, covered_share=0.25))
    table = language.prompts()
    assert table.schema == PROMPTS and set(table["split"].to_pylist()) == {"train"}
    assert len({tuple(ids) for ids in table["prompt_ids"].to_pylist()}) == 64
    assert sum(table["covered"].to_pylist()) == 16 == language.covered.sum()
    assert all(ids[0] == 1 and min(ids[1:]) >= 3 and max(ids) < 16 for ids in language.prompt_ids)


def test_too_few_letters_for_the_prompts_is_the_users_error() -> None:
    with pytest.raises(UserError, match="make only 8"):
        Language(LanguageTask(num_letters=2, prompt_letters=3, num_prompts=9))


def test_saved_tokenizer_gives_the_prompts_ids(language: Language, tmp_path: Path) -> None:
    language.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == language.vocab_size == 7
    for ids in language.prompt_ids:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert len(text) == 2 and tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode([3, 6, 2]) == "ad<eos>"


def test_gold_reward_has_mean_zero_and_unit_variance(
    language: Language, ref_logps: np.ndarray, gold: GoldReward
) -> None:
    rewards, probabilities = gold.table(language.prompt_ids, RESPONSES.sequences), np.exp(ref_logps)
    np.testing.assert_allclose((probabilities * rewards).sum(axis=1), 0, atol=1e-12)
    assert (probabilities * rewards**2).sum(axis=1).mean() == pytest.approx(1, abs=1e-12)


def test_gold_reward_is_its_formula_read_from_the_json(language: Language, gold: GoldReward, tmp_path: Path) -> None:
    gold.save(tmp_path / "gold.json")
    tree = json.loads((tmp_path / "gold.json").read_text())
    rewards = GoldReward.load(tmp_path / "gold.json").table(language.prompt_ids, RESPONSES.sequences)
    for row, prompt in enumerate(language.prompt_ids):
        for column, padded_response in enumerate(RESPONSES.sequences):
            raw, previous = 0.0, prompt[-1]
            for t, token in enumerate(int(token) for token in padded_response if token >= 0):
                raw += sum(tree["prompt"][j][x][token] for j, x in enumerate(prompt[1:])) / 2**0.5
                raw += tree["position"][t][token] + tree["neighbour"][previous][token]
                previous = token
            value = (raw - tree["offsets"][" ".join(map(str, prompt))]) / tree["scale"]
            assert value == pytest.approx(rewards[row, column], abs=1e-12)


def test_gold_reward_scores_lists_as_it_tabulates(language: Language, gold: GoldReward) -> None:
    rows = [(0, 5), (3, 200), (0, 258), (5, 0), (3, 17)]
    responses = [[int(t) for t in RESPONSES.sequences[column] if t >= 0] for _, column in rows]
    table = gold.table(language.prompt_ids, RESPONSES.sequences)
    scores = gold.score([language.prompt_ids[row] for row, _ in rows], responses)
    np.testing.assert_array_equal(scores, [table[cell] for cell in rows])
    empty = gold.score([language.prompt_ids[1]], [[]])
    assert empty[0] == pytest.approx(-gold.offsets[tuple(language.prompt_ids[1])] / gold.scale)


def test_control_tokens_cost(ref_logps: np.ndarray) -> None:
    """Over 60 languages pad and bos lie CONTROL_COST below the other tokens, which lie around 0."""
    tasks = [TASK.model_copy(update={"seed": seed}) for seed in range(60)]
    fits = [GoldReward.fit(task, [[1, 3, 3]], RESPONSES.sequences, ref_logps[:1]) for task in tasks]
    tables = np.stack([fit.position for fit in fits])
    assert tables[..., :2].mean() == pytest.approx(-CONTROL_COST, abs=0.15)
    assert tables[..., 2:].mean() == pytest.approx(0, abs=0.1)


def test_gold_reward_refuses_what_it_does_not_know(language: Language, gold: GoldReward, tmp_path: Path) -> None:
    prompt = language.prompt_ids[0]
    with pytest.raises(UserError, match="not a prompt"):
        gold.score([[1, 3]], [[2]])
    with pytest.raises(UserError, match="token 9"):
        gold.score([prompt], [[9, 2]])
    with pytest.raises(UserError, match="more than the language's 3"):
        gold.score([prompt], [[3, 3, 3, 2]])
    with pytest.raises(UserError, match="cannot be read"):
        GoldReward.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a gold reward"):
        GoldReward.load(tmp_path / "bad.json")
    one = np.where(np.arange(len(RESPONSES.lengths)) == 7, 0.0, -np.inf)[None]
    with pytest.raises(UserError, match="cannot vary"):
        GoldReward.fit(TASK, [prompt], RESPONSES.sequences, one)


def _pairs(language: Language, ref_logps: np.ndarray, gold: GoldReward, **changes: object) -> list[dict]:
    rewards = gold.table(language.prompt_ids, RESPONSES.sequences)
    settings: dict = {"num_pairs": 3000, "labels": "deterministic", "temperature": 1.0, "seed": 0, "split": "train"}
    table = sample_pairs(
        language.prompt_ids, language.covered, RESPONSES.sequences, ref_logps, rewards, **(settings | changes)
    )
    assert table.schema == PAIRS
    return table.to_pylist()


def _gaps(rows: list[dict], gold: GoldReward) -> np.ndarray:
    prompts = [row["prompt_ids"] for row in rows]
    chosen = gold.score(prompts, [row["chosen_ids"] for row in rows])
    return chosen - gold.score(prompts, [row["rejected_ids"] for row in rows])


def test_deterministic_pairs_are_ordered_by_reward(language: Language, ref_logps: np.ndarray, gold: GoldReward) -> None:
    rows = _pairs(language, ref_logps, gold)
    assert len(rows) == 3000 == len({row["id"] for row in rows})
    assert (_gaps(rows, gold) > 0).all() and {row["label"] for row in rows} == {1.0}
    counts = [sum(row["prompt_ids"] == prompt for row in rows) for prompt in language.prompt_ids]
    np.testing.assert_array_equal(counts, np.where(language.covered, 1000, 0))


def test_pairs_are_independent_draws_that_differ(language: Language, gold: GoldReward) -> None:
    """Against P(y1, y2 | y1 != y2) for a reference on few responses, where identical draws are common."""
    mass = np.zeros((TASK.num_prompts, len(RESPONSES.lengths)))
    mass[:, [0, 10, 100]] = [0.6, 0.3, 0.1]
    with np.errstate(divide="ignore"):
        rows = _pairs(language, np.log(mass), gold)
    index = np.stack([RESPONSES.index([row[key] for row in rows]) for key in ("chosen_ids", "rejected_ids")])
    distinct = {(0, 10): 0.36, (0, 100): 0.12, (10, 100): 0.06}
    observed = {key: float(np.equal(key, np.sort(index, axis=0).T).all(axis=1).mean()) for key in distinct}
    for key, weight in distinct.items():
        expected = weight / sum(distinct.values())
        assert observed[key] == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 3000))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_bradley_terry_orderings_are_drawn(
    language: Language, ref_logps: np.ndarray, gold: GoldReward, temperature: float
) -> None:
    rows = _pairs(language, ref_logps, gold, labels="bradley_terry", temperature=temperature)
    gaps = _gaps(rows, gold)
    expected = 1 / (1 + np.exp(-np.abs(gaps) / temperature))
    error = np.sqrt((expected * (1 - expected)).sum()) / len(gaps)
    assert (gaps > 0).mean() == pytest.approx(expected.mean(), abs=4 * error)
    scores = np.array([[row["score_chosen"], row["score_rejected"]] for row in rows])
    np.testing.assert_allclose(scores[:, 0] - scores[:, 1], gaps, rtol=0, atol=1e-12)
    assert {row["label"] for row in rows} == {1.0}


def test_equal_rewards_favour_neither_response(language: Language, ref_logps: np.ndarray, gold: GoldReward) -> None:
    flat = np.zeros_like(ref_logps)
    table = sample_pairs(
        language.prompt_ids,
        language.covered,
        RESPONSES.sequences,
        np.where(np.arange(ref_logps.shape[1]) < 2, np.log(0.5), -np.inf) + flat,
        flat,
        num_pairs=4000,
        labels="deterministic",
        temperature=1.0,
        seed=0,
        split="train",
    )
    share = np.mean(RESPONSES.index(table["chosen_ids"].to_pylist()) == 0)
    assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(4000))


def test_pairs_depend_on_seed_and_split_alone(language: Language, ref_logps: np.ndarray, gold: GoldReward) -> None:
    rows = _pairs(language, ref_logps, gold)
    assert rows == _pairs(language, ref_logps, gold)
    others = [_pairs(language, ref_logps, gold, split="test"), _pairs(language, ref_logps, gold, seed=1)]
    for one, two in itertools.combinations([rows, *others], 2):
        assert not {row["id"] for row in one} & {row["id"] for row in two}
        same = np.mean([a["chosen_ids"] == b["chosen_ids"] for a, b in zip(one, two, strict=True)])
        assert same < 0.1


def test_a_reference_with_one_response_gives_no_pairs(language: Language, gold: GoldReward) -> None:
    one = np.where(np.arange(len(RESPONSES.lengths)) == 7, 0.0, -np.inf)
    with pytest.raises(UserError, match="only one response"):
        _pairs(language, np.tile(one, (TASK.num_prompts, 1)), gold, num_pairs=4)
