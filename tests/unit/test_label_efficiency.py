"""What the report tells of labelled pairs: curves over their number, and how many a method needs for a level."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import exact_results, text_results

from prefarena.report.charts import label_charts
from prefarena.report.findings import findings
from prefarena.report.html import write_page
from prefarena.report.label_efficiency import (
    Needed,
    label_curves,
    label_finding,
    levels,
    measured_table,
    measures,
    needed_table,
    pairs_needed,
)
from prefarena.report.label_plots import labels_figure
from prefarena.report.page import write_report
from prefarena.report.results import EntryResult, Results

NUMBERS = (1000, 10_000)


def entry(group: str, pairs: int, *rewards: float, learned: bool = False, **training: Any) -> EntryResult:
    """One at a number of pairs, with a reward for each seed; its regret is 2 less that, its KL the reward's square."""
    own: dict[str, Any] = {"num_pairs": pairs, "training": training}
    settings = {"group": group, **({"reward": own, "training": {}} if learned else own)}
    rows = {
        str(seed): {"reward/covered": value, "regret/covered": 2 - value, "kl/covered": value**2, "kl/uncovered": 0.1}
        for seed, value in enumerate(rewards)
    }
    return EntryResult(name=f"{group}-{pairs}", kind=group, settings=settings, seeds=rows)


def labelled(*entries: EntryResult, seeds: tuple[int, ...] = (0, 1)) -> Results:
    return Results(name="labels", task={"kind": "language"}, seeds=list(seeds), exact=True, entries=list(entries))


def two_methods(**training: Any) -> Results:
    """dpo from 0 to 2 and 4 to 2 in its seeds, rlhf from 0 to 1 in both."""
    return labelled(
        entry("dpo", 10_000, 2.0, 2.0, **training),
        entry("dpo", 1000, 0.0, 1.0, **training),
        entry("rlhf", 1000, 0.0, 0.0, learned=True, **training),
        entry("rlhf", 10_000, 1.0, 1.0, learned=True, **training),
    )


# ------------------------------------------------------------------------------------------- pairs for a level


def test_between_two_numbers_the_curve_is_straight_in_the_logarithm() -> None:
    assert pairs_needed(NUMBERS, [0.0, 1.0], 0.5).pairs == pytest.approx(math.sqrt(10) * 1000)
    assert pairs_needed(NUMBERS, [0.0, 1.0], 0.25).pairs == pytest.approx(10**0.25 * 1000)
    assert pairs_needed(NUMBERS, [0.0, 1.0], 1.0).pairs == pytest.approx(10_000)
    assert pairs_needed((100, 1000, 10_000), [0.0, 1.0, 3.0], 2.0).pairs == pytest.approx(math.sqrt(10) * 1000)


def test_nothing_is_said_beyond_the_ends() -> None:
    assert pairs_needed(NUMBERS, [0.5, 1.0], 0.5) == Needed(1000.0, at_most=True)
    assert pairs_needed(NUMBERS, [0.5, 1.0], 0.2) == Needed(1000.0, at_most=True)
    assert pairs_needed(NUMBERS, [0.0, 1.0], 1.01) == Needed(None)
    assert [str(one) for one in (Needed(None), Needed(1000.0, True), Needed(3162.3))] == [
        "not reached", "≤ 1,000", "3,200",
    ]  # fmt: skip


def test_a_curve_that_falls_again_has_reached_what_it_reached_first() -> None:
    assert pairs_needed((100, 1000, 10_000), [0.0, 2.0, 1.0], 1.0).pairs == pytest.approx(math.sqrt(10) * 100)


def test_levels_are_what_each_method_has_with_the_most_pairs() -> None:
    easy, hard = levels(two_methods(), measures(two_methods())[0])
    assert (easy.group, easy.pairs, easy.value) == ("rlhf", 10_000, 1.0)
    assert (hard.group, hard.pairs, hard.value) == ("dpo", 10_000, 2.0)
    need = easy.needs["dpo"]  # the mean goes from 0.5 to 2, the seeds from 0 and from 1
    assert need.mean.pairs == pytest.approx(1000 * 10 ** (1 / 3))
    assert need.seeds[0].pairs == pytest.approx(1000 * math.sqrt(10)) and need.seeds[1] == Needed(1000.0, True)
    assert str(need) == "2,200 (≤ 1,000 to 3,200)"
    assert str(hard.needs["rlhf"]) == "not reached"


def test_of_regret_less_is_better() -> None:
    results = two_methods()
    regret = measures(results)[1]
    found = levels(results, regret)
    assert [(one.group, one.value) for one in found] == [("rlhf", 1.0), ("dpo", 0.0)]
    assert str(found[0].needs["dpo"]) == "2,200 (≤ 1,000 to 3,200)"
    assert levels(results, measures(results)[2]) == []  # of KL neither is


def test_a_seed_that_an_entry_failed_with_counts_for_none() -> None:
    results = two_methods()
    del results.entries[0].seeds["1"]
    (easy, _) = levels(results, measures(results)[0])
    assert str(easy.needs["dpo"]) == "3,200"
    results.entries[0].seeds.clear()  # then dpo has one number left, which is no curve
    assert [curve.group for curve in label_curves(results)] == ["rlhf"]
    assert levels(results, measures(results)[0]) == [] and needed_table(results) is None


# ------------------------------------------------------------------------------------------- what is shown


def test_both_tables_to_the_digit() -> None:
    measured, needed = measured_table(two_methods(num_steps=5)), needed_table(two_methods())
    assert measured is not None and measured.header == ("method", "measure", "1,000", "10,000")
    assert measured.rows[:2] == (
        ("dpo", "reward", "0.500 ± 0.500", "2.000"),
        ("rlhf", "reward", "0.000", "1.000"),
    )
    assert [row[1] for row in measured.rows] == ["reward", "reward", "regret", "regret", "KL", "KL"]
    assert needed is not None and needed.header == ("measure", "level", "dpo", "rlhf")
    assert needed.rows[0] == (
        "reward", "rlhf with 10,000: 1.000", "2,200 (≤ 1,000 to 3,200)", "10,000",
    )  # fmt: skip


def test_the_caption_says_whether_fewer_pairs_were_fewer_steps() -> None:
    captions = [measured_table(two_methods(**training)) for training in ({"num_steps": 5}, {"num_epochs": 1})]
    steps, epochs = (table.caption for table in captions if table)
    assert "takes the same number of steps however many pairs" in steps and "fewer steps" not in steps
    assert "take fewer steps on fewer pairs" in epochs
    results = two_methods(num_steps=5)
    for one in results.entries[0].seeds.values():
        one["data_labels"] = 320.0
    table = measured_table(results)
    assert table is not None and "end before they have seen all of their pairs" in table.caption


def test_the_easiest_level_is_a_finding() -> None:
    (sentence,) = label_finding(two_methods())
    assert sentence == (
        "**Labels:** the reward that rlhf has with 10,000 labelled pairs (1.000) takes dpo about 2,200 (≤ 1,000 to "
        "3,200)."
    )
    assert sentence in findings(two_methods())


def test_a_comparison_at_one_number_has_nothing_of_it(tmp_path: Path) -> None:
    for results in (exact_results(tmp_path), text_results(), labelled(entry("dpo", 5, 1.0, 2.0))):
        assert measured_table(results) is None and needed_table(results) is None
        assert label_charts(results) == [] and label_finding(results) == []


def test_text_is_measured_by_its_judge() -> None:
    results = text_results()
    for place, name in enumerate(("dpo-10", "dpo-1000")):
        row = dict(results.entries[1].seeds["0"]) | {"judge_score": float(place)}
        settings = {"group": "dpo", "num_pairs": 10 ** (1 + 2 * place)}
        results.entries.append(EntryResult(name=name, kind="dpo", settings=settings, seeds={"0": row}))
    table = measured_table(results)
    assert table is not None and [row[:2] for row in table.rows] == [("dpo", "judge score"), ("dpo", "KL")]
    assert table.rows[0][2:] == ("0.000 ± 0.050", "1.000 ± 0.050") and "held-out" in table.caption


def test_charts_have_the_table_s_numbers_on_an_axis_of_logarithms() -> None:
    reward, regret, kl = label_charts(two_methods())
    assert (reward["id"], regret["id"], kl["id"]) == ("labels-reward", "labels-regret", "labels-kl")
    dpo, rlhf = reward["lines"]
    assert reward["ticks"] == [1000, 10_000] and dpo["x"] == [1000.0, 10_000.0]
    assert (dpo["y"], rlhf["y"], dpo["ey"]) == ([0.5, 2.0], [0.0, 1.0], [0.5, None])
    assert (dpo["key"], dpo["name"]) == ("dpo", "dpo")


def test_the_figure_has_a_panel_for_each_measure() -> None:
    figure = labels_figure(two_methods())
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Reward: higher is better",
        "Regret: lower is better",
        "KL",
    ]
    drawn = [np.column_stack(line.get_data()).tolist() for line in figure.axes[0].lines]
    assert [[1000, 0.5], [10_000, 2.0]] in drawn and [[1000, 0.0], [10_000, 1.0]] in drawn
    assert figure.axes[0].get_xscale() == "log"


def test_both_pages_have_the_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("prefarena.report.page.write_figure", lambda figure, folder, name: drawn.append(name))
    results = two_methods(num_steps=5)
    report = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert "## By number of labelled pairs" in report and "## Labelled pairs needed for the same result" in report
    assert "labels" in drawn
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert '<section id="labels"' in page and "≤ 1,000 to 3,200" in page
    data = re.search(r'<script[^>]*id="report-data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert data is not None
    charts = json.loads(data[1])["charts"]["labels"]
    assert [chart["id"] for chart in charts] == ["labels-reward", "labels-regret", "labels-kl"]
