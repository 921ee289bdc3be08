"""Every entry gets the same chance: what is proposed, which trials go on, and what selection is allowed to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipelines.compare import all_stages
from pipelines.plan import make_plan
from pipelines.report import run_folder
from pipelines.trials import Found, Proposal, selection, spaces_of
from pipelines.tune import Tuned, _outcome, save_winners, tuning_folder
from pipelines.validation import is_set_aside, set_aside
from prefarena.config import (
    BestOfN,
    Comparison,
    OffPolicyMethod,
    OnPolicyMethod,
    Section,
    TextTask,
    dump_config,
    load_config,
    parse_config,
)
from prefarena.config.changed import with_settings
from prefarena.config.comparison import METHODS
from prefarena.config.tuning import Tuning
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.methods.dpo import DPO
from prefarena.methods.on_policy.rlhf import RLHF
from prefarena.records import DEMONSTRATIONS, PAIRS, PROMPTS, content_id
from prefarena.report.tuning_results import load_tuning
from prefarena.settings.search import OneOf, Space, Span, around
from prefarena.tuning.ranking import Measured, Outcome, best_of, going_on, mean_value, value_of
from prefarena.tuning.study import Sampling, Study

ROOT = Path(__file__).parents[2]
SPACE: Space = {"beta": around(1.0, 10), "training.num_epochs": OneOf(values=(1, 2, 4))}


def config_of(tuning: dict[str, Any] | None = None, **changed: Any) -> Comparison:
    entries = [{"name": "dpo", "method": {"kind": "dpo"}}, {"name": "mpo", "method": {"kind": "mpo"}}]
    return parse_config({"entries": entries, "tuning": tuning or {}, **changed})


def told(values: list[float | None]) -> list[Outcome]:
    return [Outcome({}, "failed" if value is None else "complete", {}, value) for value in values]


def searched(study: Study, score: Callable[[dict[str, Any]], float], num_batches: int) -> list[dict[str, Any]]:
    """All trials of a study that is told the score of each."""
    trials: list[dict[str, Any]] = []
    for _ in range(num_batches):
        batch = study.ask(8)
        trials += batch
        study.tell(told([score(trial) for trial in batch]))
    return trials


# ------------------------------------------------------------------------------------------------- what is proposed


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_and_the_same_past_propose_the_same_trials(sampler: str) -> None:
    score = lambda trial: -abs(trial["beta"] - 3)  # noqa: E731
    first, again = (searched(Study("dpo", SPACE, Sampling(sampler, 0, 8)), score, 3) for _ in range(2))
    assert first == again
    other_seed = searched(Study("dpo", SPACE, Sampling(sampler, 1, 8)), score, 3)
    other_entry = searched(Study("ipo", SPACE, Sampling(sampler, 0, 8)), score, 3)
    assert first not in (other_seed, other_entry)


def test_only_the_learning_sampler_depends_on_what_it_was_told() -> None:
    def trials(sampler: str, best: float) -> list[dict[str, Any]]:
        return searched(Study("dpo", SPACE, Sampling(sampler, 0, 8)), lambda t: -abs(t["beta"] - best), 3)

    assert trials("random", 0.2) == trials("random", 8.0)
    assert trials("tpe", 0.2)[:8] == trials("tpe", 8.0)[:8]
    assert trials("tpe", 0.2)[8:] != trials("tpe", 8.0)[8:]


def test_later_batches_of_the_learning_sampler_are_nearer_to_the_best() -> None:
    nearer = 0
    for seed in range(5):
        trials = searched(Study("dpo", SPACE, Sampling("tpe", seed, 8)), lambda t: -abs(t["beta"] - 8), 5)
        far = [abs(trial["beta"] - 8) for trial in trials]
        nearer += sum(far[-8:]) < sum(far[:8])
    assert nearer == 5


def test_a_batch_is_told_before_the_next_is_asked_for() -> None:
    study = Study("dpo", SPACE, Sampling("random", 0, 8))
    study.ask(2)
    with pytest.raises(RuntimeError, match="has not been told"):
        study.ask(2)


def test_failed_and_stopped_trials_do_not_end_a_search() -> None:
    study = Study("dpo", SPACE, Sampling("tpe", 0, 4))
    study.ask(4)
    study.tell([*told([None, 0.5]), Outcome({}, "stopped", {}, 0.1), Outcome({}, "stopped", {}, 0.2)])
    assert len(study.ask(4)) == 4


@pytest.mark.parametrize("kind", [k for k in METHODS if k.model_fields["kind"].default != "custom"], ids=str)
def test_every_method_proposes_a_space_that_its_settings_take(kind: type[Section]) -> None:
    method = kind()
    assert isinstance(method, OffPolicyMethod | OnPolicyMethod | BestOfN)
    space = method.search_space()
    for name, dimension in space.items():
        for value in dimension.ends:
            assert with_settings(method, {name: value}, "entry") != method or value in (dimension.ends)
    strengths = {"n"} if kind is BestOfN else {name for name in space if name.count(".") == 0} | {"training.kl_coef"}
    assert strengths & set(space) or kind.model_fields["kind"].default == "sft"


def test_a_space_lies_around_what_is_configured() -> None:
    space = DPO(beta=2.0, training={"num_steps": 100}).search_space()  # type: ignore[arg-type]
    assert space["beta"] == Span(low=0.2, high=20.0, log=True)
    assert space["training.num_steps"] == Span(low=50, high=200, log=True, integer=True)
    assert "training.num_epochs" not in space
    assert "demonstration_weight" not in space  # which is 0: not at work
    assert RLHF().search_space()["training.num_epochs"] == OneOf(values=(1, 2, 4))


def test_a_config_with_spaces_can_be_a_key_as_any_other() -> None:
    """The prediction of memory looks at trainings that are equal in everything once."""
    one, other = (Tuning.model_validate({"spaces": {"dpo": {"beta": {"low": 0.01, "high": 1.0}}}}) for _ in range(2))
    assert {one: 1}[other] == 1 and hash(one) != hash(Tuning())


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"low": 2, "high": 1}, "not below high"),
        ({"low": 0, "high": 1, "log": True}, "above 0"),
        ({"low": 0.5, "high": 2, "integer": True}, "whole numbers"),
    ],
)
def test_a_range_that_is_none_is_refused(span: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Span(**span)


# ------------------------------------------------------------------------------------------------- what goes on


def test_a_policy_beyond_the_limit_comes_after_all_that_beat_the_reference_and_the_farthest_last() -> None:
    near, far, poor, within = Measured(9, 3.5), Measured(9, 8), Measured(0.1, 1), Measured(2, 3)
    ranked = sorted([near, far, poor, within], key=lambda one: value_of(one, 3.0), reverse=True)
    assert ranked == [within, poor, near, far]


def test_the_mean_is_over_seeds() -> None:
    assert mean_value({0: Measured(1, 1), 1: Measured(2, 4)}, 3.0) == pytest.approx((1 - 1) / 2)


def test_the_better_half_goes_on_whatever_the_method() -> None:
    assert going_on([1.0, 4.0, 3.0, 2.0], 0.5) == [False, True, True, False]
    assert going_on([1.0, None, 3.0], 0.5) == [True, False, True]  # two of three, and none that failed
    assert going_on([None, None, 3.0, None], 0.5) == [False, False, True, False]
    assert going_on([2.0, 2.0, 2.0], 0.3) == [True, False, False]
    assert going_on([1.0, 2.0], 1.0) == [True, True]


def test_the_best_is_complete_where_any_is() -> None:
    stopped = Outcome({}, "stopped", {}, 9.0)
    assert best_of([stopped, *told([1.0, 2.0, 2.0])]) == 2
    assert best_of([*told([None]), stopped]) == 1
    assert best_of(told([None, None])) is None


def test_a_trial_has_failed_where_one_of_its_seeds_has() -> None:
    [entry] = config_of().entries[:1]
    proposal = Proposal(entry, 0, {"beta": 1.0})
    fine, broken = Found(Measured(1, 1), None, 2.0), Found(None, "its loss is not a number", 3.0)
    outcome = _outcome(proposal, {0: fine, 1: broken}, True, 3.0)
    assert (outcome.state, outcome.value, outcome.reason) == ("failed", None, "its loss is not a number")
    assert outcome.device_seconds == 5.0
    assert _outcome(proposal, {0: fine}, False, 3.0).state == "stopped"


# ------------------------------------------------------------------------------------------------- what is checked


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"spaces": {"dop": {"beta": {"low": 1, "high": 2}}}}, "tuning.spaces.dop: there is no such entry"),
        ({"spaces": {"dpo": {"betta": {"low": 1, "high": 2}}}}, "tuning.spaces.dpo: betta: 1.0: .*no setting 'betta'"),
        ({"spaces": {"dpo": {"training.lr": {"low": 1, "high": 2}}}}, "no setting 'training.lr'; there are .*learning"),
        ({"spaces": {"dpo": {"beta": {"low": -1, "high": 2}}}}, "tuning.spaces.dpo: beta: -1.0: beta: "),
        ({"spaces": {"dpo": {"pair_weight": {"values": ["none", "some"]}}}}, "pair_weight: some: "),
        ({"seeds": [0, 7]}, "seed 0 is one of the report's languages"),
        ({"spaces": {"dpo": {}, "mpo": {}}}, "no entry has a setting to search"),
    ],
)
def test_what_cannot_be_searched_is_said_before_any_work(tuning: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spaces_of(config_of(tuning))


def test_a_space_of_the_users_takes_the_place_of_the_methods() -> None:
    spaces = spaces_of(config_of({"spaces": {"dpo": {"pair_weight": {"values": ["none", "ratio"]}}, "mpo": {}}}))
    assert spaces == {"dpo": {"pair_weight": OneOf(values=("none", "ratio"))}}


def test_how_a_comparison_is_tuned_is_no_part_of_its_address() -> None:
    plain, tuned = config_of(), config_of({"num_trials": 3, "kl_limit": 1})
    assert run_folder(plain, make_plan(plain)) == run_folder(tuned, make_plan(tuned))
    plans = make_plan(selection(plain, plain.entries, plain.tuning.seeds))
    assert tuning_folder(plain, plans) != tuning_folder(tuned, plans)


# ------------------------------------------------------------------------------------- what selection gets to see


@pytest.mark.parametrize("vary", ["task", "training"])
def test_no_stage_of_a_languages_trials_is_one_that_the_report_reads(vary: str) -> None:
    config = config_of(seeds_vary=vary, seeds=[0, 1, 2])
    trials = selection(config, config.entries, config.tuning.seeds)
    reported = {stage.folder for stage in all_stages(make_plan(config))}
    assert not reported & {stage.folder for stage in all_stages(make_plan(trials))}


def text_tables(folder: Path, *, poison: bool) -> Path:
    """Pairs of thirty training prompts and ten test prompts; the latter with other tokens where they are poisoned."""
    prompts, pairs, demonstrations = [], {"train": [], "test": []}, []  # type: ignore[var-annotated]
    for number in range(40):
        split = "train" if number < 30 else "test"
        ids = [number, 900 + number if poison and split == "test" else 7]
        prompts.append({"id": content_id(ids), "prompt_ids": ids, "covered": split == "train", "split": split})
        chosen, rejected = ([666], [13]) if poison and split == "test" else ([1], [2])
        pairs[split].append(
            {
                "id": content_id(ids, chosen),
                "prompt_ids": ids,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "label": 1.0,
                "source": "",
            }
        )
        if split == "train":
            demonstrations.append({"id": content_id(ids, chosen), "prompt_ids": ids, "response_ids": chosen})
    for name, rows, schema in (
        ("prompts", prompts, PROMPTS),
        ("train_pairs", pairs["train"], PAIRS),
        ("test_pairs", pairs["test"], PAIRS),
        ("demonstrations", demonstrations, DEMONSTRATIONS),
    ):
        write_rows(pa.Table.from_pylist(rows, schema=schema), folder / name / "part-0.parquet", schema)
    return folder


def test_trials_on_text_are_the_same_whatever_the_test_rows_hold(tmp_path: Path) -> None:
    task = TextTask(kind="text", data="pairs.jsonl", validation_share=0.3)
    found = []
    for poison in (False, True):
        pairs, folder = text_tables(tmp_path / f"pairs-{poison}", poison=poison), tmp_path / f"divided-{poison}"
        folder.mkdir()
        set_aside(task, pairs, None, folder)
        found.append({name: read_rows(folder / name).to_pylist() for name in ("prompts", "train_pairs", "test_pairs")})
        found[-1]["demonstrations"] = read_rows(folder / "demonstrations").to_pylist()
    clean, poisoned = found
    assert clean == poisoned
    held_out = {tuple(row["prompt_ids"]) for row in clean["test_pairs"]}
    trained = {tuple(row["prompt_ids"]) for row in clean["train_pairs"]}
    assert held_out and trained and not held_out & trained
    assert held_out | trained == {(number, 7) for number in range(30)}
    assert {tuple(row["prompt_ids"]) for row in clean["demonstrations"]} == trained
    assert {tuple(row["prompt_ids"]) for row in clean["prompts"] if row["split"] == "test"} == held_out
    assert all(row["covered"] == (row["split"] == "train") for row in clean["prompts"])


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    pairs = text_tables(tmp_path / "pairs", poison=False)
    with pytest.raises(UserError, match="leaves no pairs to validate on, of 30 training pairs"):
        set_aside(TextTask(kind="text", data="x", validation_share=1e-9), pairs, None, tmp_path)


def test_about_the_share_of_prompts_is_set_aside_and_another_share_by_another_seed() -> None:
    names = [content_id([number]) for number in range(2000)]
    aside = [is_set_aside(name, 0.2, 0) for name in names]
    assert sum(aside) / 2000 == pytest.approx(0.2, abs=0.03)
    assert aside != [is_set_aside(name, 0.2, 1) for name in names]


def test_trials_of_text_share_data_and_reference_with_the_comparison_and_no_pairs_behind_them(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    config = config_of(task={"kind": "text", "data": str(data)}, output=str(tmp_path))
    trials = selection(config, config.entries, (0,))
    [whole], [tried] = make_plan(config), make_plan(trials)
    assert (tried.data, tried.reference, tried.undivided) == (whole.data, whole.reference, whole.pairs)
    assert tried.tables == tried.pairs.folder != whole.tables
    assert not {s.folder for s in whole.scored.values()} & {s.folder for s in tried.scored.values()}


# ---------------------------------------------------------------------------------------------------- the winners


def test_the_winners_settings_are_what_is_compared(tmp_path: Path) -> None:
    config = config_of({"num_trials": 2}, name="mine", output=str(tmp_path))
    tuned = []
    for entry in config.entries:
        study = Study(entry.name, {"beta": around(1.0, 10)}, Sampling("random", 0, 2))
        outcomes = [Outcome(s, "complete", {5: Measured(i, 1)}, i, None, 1) for i, s in enumerate(study.ask(2))]
        tuned.append(Tuned(entry, study, outcomes))
    tuned[1].outcomes[:] = told([None, None])
    results = save_winners(config, tuned, tmp_path)
    assert load_tuning(tmp_path / "tuning.json") == results
    winners = load_config(tmp_path / "tuned.yaml")
    assert winners.entries[0].name == "dpo"
    assert winners.entries[0].method == with_settings(config.entries[0].method, tuned[0].outcomes[1].settings, "")
    assert winners.entries[1] == config.entries[1]  # whose trials all failed
    assert [entry.best for entry in results.entries] == [1, None]
    assert winners.seeds == config.seeds
    assert winners.tuned == str(tmp_path / "tuning.json")
    assert results.entries[0].method == winners.entries[0].method.model_dump(mode="json")


@pytest.mark.parametrize("path", [None, *sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))], ids=str)
def test_a_config_with_every_default_written_out_finds_the_same_stages(path: Path | None, tmp_path: Path) -> None:
    """As tuned.yaml and a run's config.yaml are: the winners' comparison shares the reference of the trials."""
    check_written_out(load_config(path), tmp_path)


def test_so_does_one_with_a_judge_behind_an_endpoint(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    judge = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "model": "m"}
    config = config_of(task={"kind": "text", "data": str(data)}, judge=judge, output=str(tmp_path))
    assert config.judge.min_score == 1  # type: ignore[union-attr]  # whole numbers where numbers are wanted
    check_written_out(config, tmp_path)


def check_written_out(config: Comparison, tmp_path: Path) -> None:
    written = tmp_path / "written.yaml"
    written.write_text(dump_config(config), encoding="utf-8")
    again = load_config(written)
    folders, found = ([stage.folder for stage in all_stages(make_plan(one))] for one in (config, again))
    assert found == folders
