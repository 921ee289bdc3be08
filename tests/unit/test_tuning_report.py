"""What the report tells of tuning: budgets, winners, expected best trials, all trials, and what mattered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import HOSTILE, scored_results
from test_report import exact_results
from tuning import plausible_tuning, trial, tuned_by, tuning, with_tuning

import prefarena
from pipelines.checks import check_input
from pipelines.cli import main
from pipelines.plan import make_plan
from pipelines.report import run_folder
from pipelines.submit import check_paths
from pipelines.tuning_record import tuning_of
from prefarena.config import Comparison, load_config, parse_config
from prefarena.errors import UserError
from prefarena.report.charts import tuning_charts
from prefarena.report.findings import findings
from prefarena.report.html import write_page
from prefarena.report.page import write_report
from prefarena.report.results import EntryResult, Results, load_results, save_results
from prefarena.report.sensitivity import average_ranks, between_groups, sensitivities, sensitivity_table
from prefarena.report.tuning import budgets, changed_since, counted, tuned_curves
from prefarena.report.tuning_results import TunedEntry, TuningResults
from prefarena.report.tuning_tables import budget_table, chosen_table, trial_tables


def compared(found: TuningResults, *names: str) -> Results:
    """A comparison of entries that ran with what was found for them."""
    entries = [EntryResult(name=name, kind=name, seeds={"0": {"reward/covered": 1.0}}) for name in names]
    results = Results(name="made-up", task={"kind": "language"}, seeds=[0], exact=True, entries=entries)
    return with_tuning(results, found)


def four_trials() -> TuningResults:
    """Values 1, 0.5 (stopped at 3 by its first seed), none, -2, and a winner that is worth 1."""
    return tuning(
        [
            trial("dpo", 0, 1.0, beta=0.1),
            trial("dpo", 1, 3.0, stopped=True, beta=0.2),
            trial("dpo", 2, None, beta=0.3),
            trial("dpo", 3, -2.0, beta=0.4),
        ]
    )


# --------------------------------------------------------------------------------------- what trials count


def test_a_trial_counts_at_least_the_reference_and_a_stopped_one_at_most_the_winner() -> None:
    assert counted(four_trials(), "dpo").tolist() == [1.0, 1.0, 0.0, 0.0]


def test_an_entry_all_of_whose_trials_failed_is_left_with_the_reference() -> None:
    found = tuning([trial("dpo", number, None) for number in range(4)])
    assert counted(found, "dpo").tolist() == [0.0] * 4
    results = compared(found, "dpo")
    assert "**All 4 trials of dpo failed**" in " ".join(findings(results))
    budget, chosen = budget_table(results), chosen_table(results)
    assert budget is not None and budget.rows[0][-1] == "0.000"
    assert chosen is not None and chosen.rows == (("dpo", "none: all trials failed", "–", "–", "–", "–"),)


def test_the_table_has_budget_winner_and_expected_best_of_every_entry() -> None:
    trials = [trial("dpo", n, value, beta=value) for n, value in enumerate([0.25, 1.0, 0.5, 0.75])]
    results = compared(tuning([*trials, trial("dpo", 4, 0.1, stopped=True), trial("dpo", 5, None)]), "dpo", "sft")
    budget, chosen = budget_table(results), chosen_table(results)
    assert budget is not None and budget.header[-4:] == ("best of 1", "best of 3", "best of 4", "best of all")
    tuned, untuned = budget.rows
    assert tuned[:6] == ("dpo", "6", "4", "1", "1", "100.0")
    assert tuned[6].startswith("0.433 [") and tuned[7].startswith("0.812 [")  # 16.25 of 20 subsets of three
    assert tuned[8:] == ("0.900", "1.000")  # of more than half of the trials there is no interval
    assert untuned == ("sft", "0", *["–"] * 8)
    assert chosen is not None and chosen.rows == (
        ("dpo", "beta 1", "1", "1.000", "1.000 ± 0.000", "2.000 ± 0.000"),
        ("sft", "not tuned", "–", "–", "–", "–"),
    )


def test_the_chosen_trial_is_the_end_of_its_curve() -> None:
    found = plausible_tuning()
    for curve in tuned_curves(compared(found, "mpo", "dpo", "ipo", "rlhf")):
        best = found.entry(curve.entry.name)
        assert best is not None and best.best is not None
        value = found.of(curve.entry.name)[best.best].value
        assert curve.expected.mean[-1] == pytest.approx(value) and curve.so_far[-1] == pytest.approx(value)


# ----------------------------------------------------------------------------------------------- budgets


def test_equal_budgets_are_told_behind_the_findings() -> None:
    found = tuning([trial(name, n, 1.0 + n) for name in ("mpo", "dpo") for n in range(8)])
    said = findings(compared(found, "mpo", "dpo"))
    assert said[-1] == "Every entry was tuned with 8 trials, selected on two other languages."
    assert not any("differ**" in sentence for sentence in said)


def test_a_limit_of_device_seconds_is_told_with_the_trials() -> None:
    found = tuning([trial("dpo", n, 1.0) for n in range(3)]).model_copy(update={"device_seconds": 600.0})
    assert "with 3 trials, and no new ones after 600 device-seconds" in findings(compared(found, "dpo"))[-1]


def test_unequal_budgets_are_told_before_anything_is_compared() -> None:
    names = ("mpo", "dpo", "ipo", "sft")
    sizes = {"mpo": 8, "dpo": 8, "ipo": 1}
    results = compared(tuning([trial(name, n, 1.0) for name, size in sizes.items() for n in range(size)]), *names)
    assert budgets(results) == {"mpo": 8, "dpo": 8, "ipo": 1, "sft": 0}
    assert findings(results)[0].startswith(
        "**Budgets of tuning differ**: mpo and dpo with 8 trials each, ipo with 1 trial, sft with no tuning."
    )


def test_selection_on_a_language_that_is_reported_is_told() -> None:
    results = compared(tuning([trial("dpo", n, 1.0) for n in range(4)]), "dpo")
    assert not any("selected on what is reported" in sentence for sentence in findings(results))
    results.config, results.seeds = {"seeds_vary": "task"}, [0, 1001]
    assert any("the language of seed 1001" in sentence for sentence in findings(results))
    results.config, results.seeds = {"seeds_vary": "training"}, [1001]  # of training alone, on the task's language
    assert not any("selected on what is reported" in sentence for sentence in findings(results))
    results.tuning = tuning([trial("dpo", 0, 1.0)]).model_copy(update={"selection_seeds": [0]})
    assert any("the language of seed 0" in sentence for sentence in findings(results))


# ------------------------------------------------------------------------ whether an entry is what was chosen


def chosen(**more: object) -> TunedEntry:
    base = {"name": "dpo", "kind": "dpo", "num_trials": 4, "device_seconds": 1.0, "best": 0}
    return TunedEntry.model_validate({**base, "settings": {"beta": 1 / 3, "training.learning_rate": 3e-5}, **more})


def ran(**changed: object) -> EntryResult:
    """An entry as its config brings it back from a file."""
    method = {"kind": "dpo", "beta": 1 / 3, "label_smoothing": 0.0, "training": {"learning_rate": 3e-5, "num_steps": 9}}
    entry = {"name": "dpo", "method": method | changed}
    config = parse_config(yaml.safe_load(yaml.safe_dump({"entries": [entry]})))
    return EntryResult(name="dpo", kind="dpo", settings=config.entries[0].method.model_dump(mode="json"))


def test_an_entry_with_the_winners_settings_is_what_was_chosen() -> None:
    assert changed_since(chosen(), ran()) == {}
    assert changed_since(chosen(settings={"beta": 1}), ran(beta=1.0)) == {}


def test_an_entry_that_was_edited_since_is_told_with_both_values() -> None:
    assert changed_since(chosen(), ran(beta=0.3)) == {"beta": (1 / 3, 0.3)}
    results = compared(tuning([trial("dpo", n, 1.0 + n, beta=0.1 + n) for n in range(4)]), "dpo")
    assert not any("settings that its tuning chose" in sentence for sentence in findings(results))
    results.entry("dpo").settings["beta"] = 0.5
    said = " ".join(findings(results))
    assert "**dpo does not have the settings that its tuning chose**: `beta` is 0.5, but tuning chose 3.1." in said
    table = chosen_table(results)
    assert table is not None and table.rows[0][1] == "beta 3.1 (not what the entry ran with)"


def test_with_the_winners_whole_method_any_other_setting_tells_too() -> None:
    method = ran().settings
    assert changed_since(chosen(method=method), ran()) == {}
    edited = ran(training={"learning_rate": 3e-5, "num_steps": 90})
    assert changed_since(chosen(), edited) == {}  # which the tuned settings cannot tell
    assert changed_since(chosen(method=method), edited) == {"training.num_steps": (9, 90)}
    assert changed_since(chosen(kind="ipo"), ran()) == {"kind": ("ipo", "dpo")}


# -------------------------------------------------------------------------------------------- sensitivity


def test_a_setting_that_decides_is_told_from_one_that_does_not() -> None:
    generator = np.random.default_rng(0)
    trials = []
    for number, rate in enumerate(generator.permutation(24)):
        settings = {"training.learning_rate": 1e-4 * (1 + int(rate)), "form": ("a", "b")[number % 2], "same": 1}
        trials.append(trial("dpo", number, float(rate) / 10, **settings))
    (curve,) = tuned_curves(compared(tuning(trials), "dpo"))
    rate, form = sensitivities(curve, 0)  # what was never varied has no row
    assert rate.correlation == pytest.approx(1.0) and rate.p < 0.001 and rate.num_trials == 24
    # Of ranks 1 … 24 the variance is (24² − 1) / 12, that of the means 4.5, 12.5, 20.5 of their thirds 128 / 3.
    assert rate.share == pytest.approx((128 / 3) / ((24**2 - 1) / 12))
    assert [name for name, _ in rate.groups] == ["0.0001 to 0.0008", "0.0009 to 0.0016", "0.0017 to 0.0024"]
    assert [median for _, median in rate.groups] == pytest.approx([0.35, 1.15, 1.95])
    assert form.correlation is None and form.p > 0.05 and [name for name, _ in form.groups] == ["a", "b"]
    assert rate.medians == "0.350 · 1.150 · 1.950" and rate.best == "0.0017 to 0.0024"
    assert re.fullmatch(r"a: \d\.\d{3} · b: \d\.\d{3}", form.medians)


def test_the_share_between_groups_is_that_of_kruskal_and_wallis() -> None:
    """H = 12 / (n (n + 1)) Σ R² / n_g − 3 (n + 1) without ties, over n − 1."""
    ranks, groups = np.array([1.0, 2, 5, 3, 6, 7, 4, 8, 9]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    sums = [ranks[groups == g].sum() for g in range(3)]
    h = 12 / (9 * 10) * sum(total**2 / 3 for total in sums) - 3 * 10
    share, p = between_groups(ranks, groups, 0)
    assert share == pytest.approx(h / 8) and 0.1 < p < 0.25
    assert between_groups(np.full(9, 5.0), groups, 0) == (0.0, 1.0)


def test_p_values_of_settings_that_do_nothing_are_spread_evenly() -> None:
    generator = np.random.default_rng(0)
    found = [between_groups(generator.permutation(12) + 1.0, np.arange(12) // 4, 0)[1] for _ in range(200)]
    assert 0.4 < np.mean(found) < 0.6 and np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.06)


def test_equal_values_share_their_rank() -> None:
    assert average_ranks(np.array([-np.inf, 2.0, -np.inf, 1.0, 2.0])).tolist() == [1.5, 4.5, 1.5, 3.0, 4.5]


def test_five_trials_say_nothing_of_a_setting() -> None:
    few, enough = (tuning([trial("dpo", n, float(n), beta=0.1 + n) for n in range(size)]) for size in (5, 6))
    assert sensitivity_table(compared(few, "dpo")) is None
    assert sensitivity_table(compared(enough, "dpo")) is not None


# -------------------------------------------------------------------------------------------------- pages


def test_both_pages_show_the_tuning(tmp_path: Path) -> None:
    results = compared(plausible_tuning(), "mpo", "dpo", "ipo", "rlhf", "sft")
    write_page(results, tmp_path)
    page, report = (tmp_path / "report.html").read_text(), write_report(results, tmp_path).read_text()
    for table in (budget_table(results), chosen_table(results), sensitivity_table(results)):
        assert table is not None
        for cell in (cell for row in table.rows for cell in row):
            assert cell.replace("<", "&lt;") in page and cell in report
    said = "selected on two other languages, by the reward at a KL of at most 5 nats. No number measured there is"
    assert said in page and said in report and "## Tuning" in report
    assert (tmp_path / "figures" / "expected_best.png").stat().st_size > 10_000
    assert [len(one.rows) for one in trial_tables(results)] == [24] * 4 and page.count("its loss was no number") > 0
    for cell in (cell for one in trial_tables(results) for row in one.rows for cell in row):
        assert cell in page


def test_a_comparison_without_tuning_shows_nothing_of_it(tmp_path: Path) -> None:
    results = compared(plausible_tuning(), "mpo", "dpo")
    results.tuning = None
    write_page(results, tmp_path)
    sections = re.sub(r"<script.*?</script>", "", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    said = [sections, write_report(results, tmp_path).read_text(), *findings(results)]
    assert not any(re.search(r"tuned|tuning|trial", text, re.IGNORECASE) for text in said)
    assert not (tmp_path / "figures" / "expected_best.png").exists()


def test_charts_have_the_numbers_of_the_curves(tmp_path: Path) -> None:
    results = with_tuning(exact_results(tmp_path), plausible_tuning())
    expected, costly, happened = tuning_charts(results)
    (curve,) = (one for one in tuned_curves(results) if one.entry.name == "dpo")
    band, line = (one for one in expected["lines"] if one["key"] == "dpo")
    assert line["y"] == pytest.approx(list(curve.expected.mean), rel=1e-5) and line["x"] == list(range(1, 25))
    assert band["role"] == "band" and len(band["x"]) == 24 and max(band["x"]) == 12
    assert band["y"][0] == pytest.approx(curve.expected.interval[0, 1], rel=1e-5)
    assert band["y"][-1] == pytest.approx(curve.expected.interval[0, 0], rel=1e-5)
    tuned = plausible_tuning().entry("dpo")
    assert tuned is not None
    assert [one for one in costly["lines"] if one["key"] == "dpo"][1]["x"][-1] == pytest.approx(
        tuned.device_seconds, rel=1e-5
    )
    dots, so_far = (one for one in happened["lines"] if one["key"] == "dpo")
    assert len(dots["text"]) == 24 and so_far["y"] == list(np.maximum.accumulate(dots["y"]))


def test_what_a_trial_says_is_shown_as_text(tmp_path: Path) -> None:
    found = tuning([trial("dpo", n, None if n == 2 else 1.0 * n, form=HOSTILE) for n in range(6)])
    found.trials[2].reason = HOSTILE
    results = with_tuning(scored_results(tmp_path), found)
    page = write_page(results, tmp_path).read_text()
    assert "alert(1)</script>" not in page and "<img" not in page


def test_results_with_a_tuning_are_read_back_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = with_tuning(exact_results(tmp_path), plausible_tuning(8))
    save_results(results, tmp_path)
    assert load_results(tmp_path) == results
    found = prefarena.load_results(tmp_path)
    trials = found.trials
    assert trials is not None and len(trials) == 32 and trials.groupby("policy")["chosen"].sum().eq(1).all()
    assert {"training.learning_rate", "tau", "reward", "kl", "device_seconds"} <= set(trials.columns)
    assert "expected_best" in found.figures
    assert main(["show", str(tmp_path)]) == 0
    assert "Budgets of tuning differ: mpo, dpo, ipo and rlhf with 8 trials" in " ".join(capsys.readouterr().out.split())
    other = tmp_path / "other"
    save_results(exact_results(tmp_path), other)
    assert main(["diff", str(tmp_path), str(other)]) == 0 and prefarena.load_results(other).trials is None


# ---------------------------------------------------------------------------------------- the key `tuned`


def altered(**changed: object) -> str:
    """A record in which something of its entry was changed by hand."""
    tree = four_trials().model_dump(mode="json")
    tree["entries"][0] |= changed
    return json.dumps(tree)


def config(tmp_path: Path, tuned: str | None) -> Comparison:
    entries = [{"name": "dpo", "method": {"kind": "dpo"}}]
    return parse_config({"output": str(tmp_path), "tuned": tuned, "entries": entries})


def test_the_tuning_that_a_config_names_is_read_before_any_work(tmp_path: Path) -> None:
    path = tuned_by(tmp_path, four_trials())
    check_input(config(tmp_path, path))
    assert tuning_of(config(tmp_path, path)) == four_trials() and tuning_of(config(tmp_path, None)) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read .No such file or directory.; `prefarena tune` writes it"),
        ("{", "not what `prefarena tune` writes .Invalid JSON"),
        ('{"name": 1}', "not what `prefarena tune` writes .name: "),
        (altered(num_trials=24), "not what `prefarena tune` writes .entry 'dpo' has 4 trials, but says 24"),
        (altered(settings={"beta": 0.3}), "writes .entry 'dpo': its settings are not those of its trial 0"),
        (altered(best=2), "writes .entry 'dpo': its settings are not those of its trial 2"),
        (
            tuning([trial("ipo", 0, 1.0)]).model_dump_json(),
            "is of ipo, but the comparison has none of them; its entries are dpo",
        ),
    ],
)
def test_a_tuning_that_cannot_be_used_is_one_sentence(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "tuning.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"tuning.json.*{told}") as caught:
        check_input(config(tmp_path, str(path)))
    assert "\n" not in str(caught.value)


def test_a_tuning_on_an_object_store_is_read_from_there(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/tuning-report/tuning.json", four_trials().model_dump_json().encode())
    assert tuning_of(config(tmp_path, "memory://tuning-report/tuning.json")) == four_trials()
    with pytest.raises(UserError, match="there is no such file"):
        tuning_of(config(tmp_path, "memory://tuning-report/other.json"))


def test_a_job_is_not_sent_away_with_a_relative_path_to_its_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned_by(tmp_path, four_trials())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"tuned: tuning\.json is a relative path"):
        check_paths(config(tmp_path, "tuning.json"))
    check_paths(config(tmp_path, str(tmp_path / "tuning.json")))


def test_where_settings_came_from_changes_no_stage_and_only_its_own_run_folder(tmp_path: Path) -> None:
    path = tuned_by(tmp_path, four_trials())
    plain, told = config(tmp_path, None), config(tmp_path, path)
    folders = [[stage.key for stage in plan.shared()] for one in (plain, told) for plan in make_plan(one)]
    assert folders[0] == folders[1]
    assert run_folder(plain, make_plan(plain)) != run_folder(told, make_plan(told))


def test_the_default_comparison_names_no_tuning() -> None:
    assert load_config().tuned is None
