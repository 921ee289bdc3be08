"""Tables to the digit, standard errors, leakage against closed forms, and figures that show something."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import rich.console
from PIL import Image

from prefarena.errors import UserError
from prefarena.report.charts import reward_kl_charts
from prefarena.report.curves import read_curves
from prefarena.report.html import write_page
from prefarena.report.labels import Label, place_labels
from prefarena.report.leakage import kl_at_gain, leakage, leakage_tables, paired_ratio
from prefarena.report.measures import coverage_table, divergence_table
from prefarena.report.page import write_report
from prefarena.report.plots import grid_figure, reward_kl_figure
from prefarena.report.results import (
    Cost,
    EntryResult,
    Results,
    WinMatrix,
    aggregate,
    kl_key,
    load_results,
    paired_difference,
    save_results,
    with_gains,
)
from prefarena.report.significance import student_coverage
from prefarena.report.style import write_figure
from prefarena.report.tables import cost_table, main_table, number, win_table
from prefarena.report.trajectories import agreement_summary, agreement_table, summary_table, trajectory_table
from prefarena.report.verdict import verdict


def best(kl: float) -> float:
    """A made-up frontier: sqrt(2 KL), that of a Gaussian reward."""
    return math.sqrt(2 * kl)


def exact_row(reward: float, kl: float, drift: float, win_rate: float = 0.75) -> dict[str, float]:
    row = {"reward/covered": reward, "kl/covered": kl, "frontier_reward/covered": best(kl)}
    row |= {"regret/covered": best(kl) - reward, "kl/uncovered": drift, "reward/uncovered": reward / 4}
    row |= {"forward_kl/all": kl, "entropy/all": 5.0 - kl, "win_rate": win_rate, "win_rate_stderr": 0.01}
    return row | {"preference_accuracy": 0.8, "preference_accuracy_stderr": 0.0125, "response_length": 3.5}


def exact_results(tmp_path: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Results:
    """Five methods with known numbers: seed s adds 0.02 s to every reward and 0.1 s to every KL."""
    made = {
        "sft": (0.5, 0.4, 0.2),
        "mpo": (1.4, 1.2, 0.3),
        "dpo": (1.6, 4.0, 3.0),
        "ipo": (1.3, 1.5, 0.9),
        "rlhf": (1.9, 2.1, 1.6),
    }
    entries = [EntryResult(name="reference", kind="reference", seeds={str(s): exact_row(0, 0, 0, 0.5) for s in seeds})]
    for kind, (reward, kl, drift) in made.items():
        rows = {str(s): exact_row(reward + 0.02 * s, kl + 0.1 * s, drift + 0.05 * s) for s in seeds}
        entries.append(EntryResult(name=kind, kind=kind, seeds=rows))
    optimum = {str(s): exact_row(best(2.1), 2.1, 2.1) for s in seeds}
    entries.append(EntryResult(name="optimum at rlhf's KL", kind="optimum", seeds=optimum))
    curves: dict[str, dict[str, str]] = {}
    costs = [Cost(stage="reference", wall_seconds=20, device_seconds=40, peak_memory_mib=900, reused=True)]
    for kind in made:
        for seed in seeds:
            path = tmp_path / "logs" / f"{kind}-{seed}.jsonl"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text("".join(json.dumps(metric_row(kind, step, seed)) + "\n" for step in range(0, 60, 5)))
            curves.setdefault(kind, {})[str(seed)] = str(path.relative_to(tmp_path))
            costs.append(
                Cost(
                    stage="training",
                    entry=kind,
                    seed=seed,
                    wall_seconds=10.0 + seed,
                    device_seconds=20.0 + 2 * seed,
                    peak_memory_mib=500 + seed,
                    num_tokens_trained=123_456,
                )
            )
            costs.append(Cost(stage="evaluation", entry=kind, seed=seed, wall_seconds=100))
    names = ["reference", *made]
    size = len(names)
    rates = [[0.5 if i == j else 0.5 + 0.05 * (i - j) for j in range(size)] for i in range(size)]
    return Results(
        name="made-up",
        task={"kind": "language"},
        seeds=list(seeds),
        exact=True,
        entries=entries,
        versions={"torch": "1"},
        notes=["All numbers are made up."],
        data={"num_train_pairs": 4096, "num_dropped": 3},
        frontier={str(s): {"covered": [(kl, best(kl)) for kl in np.linspace(0, 8, 60)]} for s in seeds},
        win_matrix=WinMatrix(rows=names, win_rate=rates, stderr=[[0.01] * size] * size),
        curves=curves,
        costs=costs,
    )


def metric_row(kind: str, step: int, seed: int) -> dict[str, float]:
    progress = 1 - math.exp(-step / 20) + 0.02 * seed
    if kind == "rlhf":
        return {
            "step": step,
            "reward/mean": progress,
            "kl/k1": 2 * progress,
            "entropy": 5 - progress,
            "policy/clip_fraction": 0.1,
            "logp_gap/max": 1e-3,
        }
    row = {"step": step, "loss": -progress, "preference/accuracy": 0.5 + progress / 3, "preference/margin": progress}
    return row | ({"demonstration/nll": 6 + progress / 5} if kind == "mpo" else {})


def sweep_results(seeds: tuple[int, ...] = (0, 1, 2)) -> Results:
    """Three groups on curves KL = c_s gain^2: IPO's c is 1 + s/10, MPO's half and DPO's twice that."""
    entries = [EntryResult(name="reference", kind="reference", seeds={"0": exact_row(0.25, 0, 0)})]
    for group, factor in (("mpo", 0.5), ("ipo", 1.0), ("dpo", 2.0)):
        for gain in (0.2, 0.5, 0.9, 1.3, 1.8):
            rows = {str(s): exact_row(gain + 0.25, gain, factor * (1 + s / 10) * gain**2) for s in seeds}
            entries.append(EntryResult(name=f"{group} at {gain}", kind=group, seeds=rows))
    return Results(name="sweep", task={"kind": "language"}, seeds=list(seeds), exact=True, entries=entries)


def text_results() -> Results:
    def row(score: float, win: float, kl: float, length: float) -> dict[str, float]:
        errors = {
            "judge_score_stderr": 0.05,
            "win_rate_stderr": 0.02,
            "kl_stderr": 0.1,
            "preference_accuracy_stderr": 0.02,
        }
        return {
            "judge_score": score,
            "win_rate": win,
            "kl": kl,
            "response_length": length,
            "preference_accuracy": 0.55,
            **errors,
        }

    made = {
        "reference": row(0, 0.5, 0, 40),
        "mpo": row(0.4, 0.6, 1.2, 42),
        "dpo": row(0.5, 0.62, 5, 70),
        "sft": row(0.1, 0.51, 0.4, 41),
    }
    entries = [EntryResult(name=name, kind=name, seeds={"0": values}) for name, values in made.items()]
    return Results(name="text", task={"kind": "text"}, seeds=[0], exact=False, entries=entries)


# ------------------------------------------------------------------------------------- reduction, storage


def test_aggregate_is_mean_and_standard_error_over_seeds() -> None:
    rows = {"0": {"kl": 1.0}, "1": {"kl": 2.0}, "2": {"kl": 6.0}}
    found = aggregate(EntryResult(name="a", kind="mpo", seeds=rows), "kl")
    assert found is not None
    assert found.mean == 3.0
    assert found.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert found.num_seeds == 3 and found.over_seeds


def test_one_seed_has_its_own_error_and_an_exact_value_has_none() -> None:
    entry = EntryResult(
        name="a", kind="mpo", seeds={"0": {"win_rate": 0.6, "win_rate_stderr": 0.02, "kl": 1.0, "kl_stderr": 0.0}}
    )
    assert aggregate(entry, "win_rate") == (0.6, 0.02, 1, False)
    assert aggregate(entry, "kl") == (1.0, None, 1, False)
    assert aggregate(entry, "regret/covered") is None


def test_differences_are_paired_by_seed() -> None:
    first = EntryResult(name="a", kind="mpo", seeds={"0": {"kl": 1.0}, "1": {"kl": 12.0}, "7": {"kl": 99.0}})
    second = EntryResult(name="b", kind="dpo", seeds={"1": {"kl": 10.0}, "0": {"kl": 0.0}})
    assert paired_difference(first, second, "kl") == (1.5, 0.5, 2, True)
    one, other = (
        EntryResult(name=n, kind=n, seeds={"0": {"kl": v, "kl_stderr": e}})
        for n, v, e in (("a", 3, 0.3), ("b", 1, 0.4))
    )
    assert paired_difference(one, other, "kl") == (2.0, pytest.approx(0.5), 1, False)


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = exact_results(tmp_path)
    path = save_results(results, tmp_path)
    assert path == tmp_path / "results.json"
    assert load_results(tmp_path) == results
    assert not list(tmp_path.glob(".results*"))


def test_undefined_errors_do_not_reach_the_file(tmp_path: Path) -> None:
    results = text_results()
    results.entries[1] = EntryResult(name="mpo", kind="mpo", seeds={"0": {"kl": 1.0, "kl_stderr": float("nan")}})
    text = save_results(results, tmp_path).read_text()
    assert "NaN" not in text and load_results(tmp_path).entries[1].seeds == {"0": {"kl": 1.0}}


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no such results file"), ("{", "not valid JSON, line 1"), ('{"name": "x"}', "task")]
)
def test_unusable_results_are_named(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load_results(tmp_path)


# ------------------------------------------------------------------------------------------------- tables


def test_main_table_to_the_digit(tmp_path: Path) -> None:
    table = main_table(exact_results(tmp_path))
    rows = {row[0]: row[1:] for row in table.rows}
    # rewards 1.40, 1.42, 1.44: s = 0.02, / sqrt(3) = 0.0115; KLs 1.2, 1.3, 1.4: 0.0577
    assert rows["mpo"][0] == "1.420 ± 0.012"
    assert rows["mpo"][1] == "1.300 ± 0.058"
    assert rows["mpo"][4] == "0.350 ± 0.029"
    assert rows["mpo"][7:] == ("0.750 ± 0.010", "0.800 ± 0.013", "3.50", "11.0")
    assert rows["reference"][:4] == ("0.000", "0.000", "0.000", "0.000")
    assert rows["optimum at rlhf's KL"][3] == "0.000" and rows["optimum at rlhf's KL"][-1] == "–"
    assert "over 3 seeds" in table.caption


def test_one_seed_is_said_in_the_caption(tmp_path: Path) -> None:
    table = main_table(exact_results(tmp_path, seeds=(0,)))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["mpo"][0] == "1.400"
    assert "one seed" in table.caption and "over 3 seeds" not in table.caption


def test_text_table_shows_the_errors_within_a_run() -> None:
    rows = {row[0]: row[1:] for row in main_table(text_results()).rows}
    assert rows["dpo"] == ("0.500 ± 0.050", "0.620 ± 0.020", "5.000 ± 0.100", "0.550 ± 0.020", "70.0", "–")


def test_markdown_and_terminal_show_the_same_cells(tmp_path: Path) -> None:
    table = cost_table(exact_results(tmp_path))
    assert table is not None
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(table.rich())
    shown = console.export_text()
    body = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in body}) == 1 and len(body) == len(table.rows) + 2
    for row in table.rows:
        assert all(cell in shown for cell in row)
        assert all(cell in table.markdown() for cell in row)


def test_costs_are_per_seed_and_totals_leave_evaluation_out(tmp_path: Path) -> None:
    table = cost_table(exact_results(tmp_path))
    assert table is not None
    rows = {row[:2]: row[2:] for row in table.rows}
    assert rows["shared by all", "reference"] == ("20.0", "40.0", "900", "0", "0", "yes")
    assert rows["mpo", "training"] == ("11.0", "22.0", "502", "123,456", "0", "no")
    assert rows["mpo", "evaluation"][0] == "100.0"
    assert rows["mpo", "total"] == ("11.0", "22.0", "502", "123,456", "0", "")


def test_win_table_has_no_diagonal(tmp_path: Path) -> None:
    table = win_table(exact_results(tmp_path))
    assert table is not None
    assert table.rows[2][:4] == ("mpo", "0.600 ± 0.010", "0.550 ± 0.010", "–")


def with_divergences(results: Results) -> Results:
    """A KL of less spread beside k1 in every row, and what else is measured on text."""
    for place, entry in enumerate(results.entries):
        for row in entry.seeds.values():
            row |= {"kl_vocabulary": 2.0 * place, "kl_vocabulary_stderr": 0.02, "kl_k3": 9.0, "forward_kl": 3.0}
            row |= {"demonstration_logp": -80.0, "demonstration_logp_stderr": 4.0}
            row |= {"demonstration_gain": -2.5, "demonstration_gain_stderr": 0.25}
            row |= {"win_rate_at_equal_length": 0.55, "regret": 0.1 * place, "regret_stderr": 0.01}
    return results


def test_the_kl_of_text_is_that_of_least_spread_where_all_policies_have_it() -> None:
    results = with_divergences(text_results())
    table = main_table(results)
    rows = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    assert rows["dpo"]["KL"] == "4.000 ± 0.020" and rows["dpo"]["regret"] == "0.200 ± 0.010"
    assert rows["dpo"]["win rate at equal length"] == "0.550" and "exact divergences over the voc" in table.caption
    found = divergence_table(results)
    assert found is not None
    assert found.rows[2] == (
        "dpo",
        "4.000 ± 0.020",
        "5.000 ± 0.100",
        "9.000",
        "3.000",
        "-80.000 ± 4.000",
        "-2.500 ± 0.250",
    )
    assert "dpo by mpo" not in "\n".join(verdict(results))  # which has more of either KL, and less score
    del results.entries[1].seeds["0"]["kl_vocabulary"]  # evaluated by an earlier version
    assert kl_key(results) == "kl" and divergence_table(results) is None
    assert {row[0]: row[1:] for row in main_table(results).rows}["dpo"][4] == "5.000 ± 0.100"


def test_what_policies_do_where_there_are_no_pairs_has_a_table(tmp_path: Path) -> None:
    results = text_results()
    assert coverage_table(results) is None and coverage_table(exact_results(tmp_path)) is None
    for entry in results.entries[1:]:
        entry.seeds["0"] |= {"kl_vocabulary/covered": 3.0, "kl_vocabulary/covered_stderr": 0.2}
        entry.seeds["0"] |= {"kl_vocabulary/uncovered": 1.5, "kl_vocabulary/uncovered_stderr": 0.1}
    table = coverage_table(results)
    assert table is not None and table.header == ("policy", "KL, pairs", "KL, no pairs")
    assert table.rows[0] == ("reference", "–", "–") and table.rows[2] == ("dpo", "3.000 ± 0.200", "1.500 ± 0.100")
    for text in (
        write_report(results, tmp_path).read_text(encoding="utf-8"),
        write_page(results, tmp_path).read_text(),
    ):
        assert "With pairs and without" in text and "Leakage is" in text


def test_both_pages_show_the_distances_and_what_they_are(tmp_path: Path) -> None:
    results = with_divergences(text_results())
    results.estimated_frontier = {"0": [(0.0, 0.0, 0.01), (1.0, 0.5, 0.02), (3.0, 0.9, 0.1)]}
    texts = [write_report(results, tmp_path).read_text(encoding="utf-8"), write_page(results, tmp_path).read_text()]
    for text in texts:
        for said in ("Distance from the reference", "log π of demonstrations", "-2.500 ± 0.250", "forward KL"):
            assert said in text, said
        assert "it ends where this number of samples no longer suffices to estimate it" in text
    (plane, _) = reward_kl_charts(results)
    frontier = [line for line in plane["lines"] if line["role"] == "frontier"]
    assert [line["x"] for line in frontier] == [[0.0, 1.0, 3.0]]


def test_wins_that_pass_the_correction_for_all_comparisons_are_marked() -> None:
    results = text_results()
    rates, errors = (
        [[0.5, 0.4, 0.473], [0.6, 0.5, 0.5], [0.527, 0.5, 0.5]],
        [[0.01, 0.02, 0.013], [0.02] * 3, [0.013] * 3],
    )
    results.win_matrix = WinMatrix(rows=["reference", "mpo", "dpo"], win_rate=rates, stderr=errors)
    table = win_table(results)
    assert table is not None
    assert table.rows[0][1:] == ("–", "0.400 ± 0.020 *", "0.473 ± 0.013")  # p is 0.038, twice that too much
    assert table.rows[1][1] == "0.600 ± 0.020 *" and "Holm's correction for 3 comparisons" in table.caption
    results.win_matrix = WinMatrix(
        rows=["reference", "dpo"], win_rate=[[0.5, 0.473], [0.527, 0.5]], stderr=[[0.013] * 2] * 2
    )
    (first, _) = win_table(results).rows  # type: ignore[union-attr]
    assert first[2] == "0.473 ± 0.013 *"  # the only comparison


def test_preference_over_the_reference_is_corrected_for_the_number_of_entries() -> None:
    """Two standard errors and a half are enough for one entry, and not among five."""
    results = text_results()
    entry = results.entries[1].model_copy(deep=True)
    entry.seeds["0"]["win_rate"] = 0.55  # ± 0.02
    results.entries = [results.entries[0], entry]
    assert "at the 5 % level: mpo (0.550 ± 0.020)" in "\n".join(verdict(results))
    for name in "abcd":
        other = entry.model_copy(deep=True, update={"name": name})
        other.seeds["0"]["win_rate"] = 0.51
        results.entries.append(other)
    text = "\n".join(verdict(results))
    assert "at the 5 % level, after Holm's correction for 5 comparisons: none" in text


def test_zero_has_no_sign() -> None:
    assert number(-1e-9, 3) == "0.000" and number(-0.0006, 3) == "-0.001" and number(None, 3) == "–"


# ------------------------------------------------------------------------------------------------ leakage


def test_interpolation_is_exact_on_a_parabola_and_stops_at_its_ends() -> None:
    gains = np.array([1.5, 0.2, 0.9])
    found = kl_at_gain(gains, 3 * gains**2, [0.1, 0.2, 0.5, 1.2, 1.5, 1.6])
    assert np.isnan(found[[0, -1]]).all()
    np.testing.assert_allclose(found[1:-1], 3 * np.array([0.2, 0.5, 1.2, 1.5]) ** 2, rtol=1e-12)


def test_interpolation_is_linear_in_the_root_and_averages_ties() -> None:
    # between (0, 0) and (1, 4) the root is 2 g; the two points at gain 1 have roots 1 and 3
    np.testing.assert_allclose(kl_at_gain([0, 1, 1], [0, 1, 9], [0.25, 0.5]), [0.25, 1.0])
    with pytest.raises(ValueError, match="two different"):
        kl_at_gain([1, 1], [1, 2], [1])
    with pytest.raises(ValueError, match="cannot be negative"):
        kl_at_gain([0, 1], [-1, 2], [0.5])


def test_paired_ratio_and_its_error() -> None:
    mean, error = paired_ratio([1.0, 4.0], [2.0, 4.0])
    assert (mean, error) == (0.75, pytest.approx(0.25))
    assert paired_ratio([1.0], [4.0]) == (0.25, None)


def test_leakage_finds_the_curves_it_was_given() -> None:
    found = leakage(sweep_results())
    assert found is not None and not found.left_out
    np.testing.assert_allclose(found.levels[[0, -1]], [0.2, 1.8])
    scale = 1 + np.arange(3)[:, None] / 10
    np.testing.assert_allclose(found.kls["mpo"], 0.5 * scale * found.levels**2)
    ratios = found.ratios("ipo")
    assert [ratio[0] for ratio in ratios["mpo"]] == pytest.approx([0.5] * 6)
    assert [ratio[1] for ratio in ratios["dpo"]] == pytest.approx([0.0] * 6, abs=1e-12)
    kls, as_ratio = leakage_tables(found, "KL")
    # at gain 1.8: 0.5 * (1.0, 1.1, 1.2) * 3.24: mean 1.782, s 0.162, / sqrt(3) = 0.094
    assert kls.rows[0][0] == "mpo" and kls.rows[0][-1] == "1.782 ± 0.094"
    assert as_ratio.rows[1][1:] == ("1",) * 6 and as_ratio.rows[2][-1] == "2.000 ± 0.000"


def test_a_group_without_a_grid_is_left_out_and_said() -> None:
    results = sweep_results()
    results.entries.append(EntryResult(name="sft", kind="sft", seeds={str(s): exact_row(0.5, 1, 1) for s in range(3)}))
    found = leakage(results)
    assert found is not None and found.left_out == {"sft": "a single setting, no curve"}
    assert "sft is left out" in leakage_tables(found, "KL")[0].caption


def beyond_the_others(results: Results, *kinds: str) -> Results:
    """The kinds' gains moved out of reach, each by another distance."""
    for entry in results.entries:
        if entry.kind in kinds:
            for row in entry.seeds.values():
                row["reward/covered"] += 5 * (1 + kinds.index(entry.kind))
    return results


def test_a_grid_that_does_not_meet_the_others_is_left_out_and_said() -> None:
    found = leakage(beyond_the_others(sweep_results(), "dpo"))
    assert found is not None and set(found.kls) == {"mpo", "ipo"}
    assert "does not reach" in found.left_out["dpo"]
    np.testing.assert_allclose(found.levels[[0, -1]], [0.2, 1.8])


def test_grids_of_which_no_two_meet_have_no_table() -> None:
    assert leakage(beyond_the_others(sweep_results(), "dpo", "ipo")) is None


def test_demonstration_term_makes_its_own_group() -> None:
    def entry(kind: str, weight: float) -> str:
        return EntryResult(name="x", kind=kind, settings={"demonstration_weight": weight}).group

    assert [entry("dpo", 0.0), entry("dpo", 0.1), entry("mpo", 0.1)] == ["dpo", "dpo+eta", "mpo"]


def test_the_gold_reward_makes_its_own_group() -> None:
    def entry(kind: str) -> str:
        return EntryResult(name="x", kind="rlhf", settings={"reward": {"kind": kind}}).group

    assert [entry("learned"), entry("gold")] == ["rlhf", "rlhf+gold"]


# ------------------------------------------------------------------------------------------------ verdict


def test_verdict_follows_the_numbers(tmp_path: Path) -> None:
    results = exact_results(tmp_path)
    text = "\n".join(verdict(results))
    assert "**rlhf** has the highest expected reward" in text
    assert "0.300" in text and "dpo is next" in text
    assert "dpo by rlhf" in text and "mpo by" not in text
    for row in results.entry("sft").seeds.values():
        row["reward/covered"] += 3
    assert "**sft** has the highest expected reward" in "\n".join(verdict(results))


def test_verdict_tells_noise_from_difference() -> None:
    results = text_results()
    text = "\n".join(verdict(results))
    assert "dpo is next" not in text and "mpo is next, 0.100 ± 0.071 behind (within two standard errors" in text
    assert "not told from one half: sft (0.510 ± 0.020)" in text
    assert "dpo (1.8 times the reference's)" in text


@pytest.mark.parametrize(("degrees", "exact"), [(1, 2 / math.pi * math.atan(2)), (2, 2 / math.sqrt(6))])
def test_coverage_of_two_standard_errors(degrees: int, exact: float) -> None:
    assert student_coverage(2.0, degrees) == pytest.approx(exact, abs=1e-9)


def test_gains_are_over_the_reference_and_leave_the_results_alone() -> None:
    results = sweep_results()
    row = with_gains(results).entry("mpo at 0.9").seeds["2"]
    assert row["gain/covered"] == pytest.approx(0.9)
    assert "gain/covered" not in results.entry("mpo at 0.9").seeds["2"]


# ---------------------------------------------------------------------------------------- figures and page


def trained_results(tmp_path: Path) -> Results:
    """An over-optimised entry and one on the gold reward: seed s adds s / 10 to every reward but the first."""
    results = exact_results(tmp_path, seeds=(0, 1))

    def row(step: int, kl: float, gold: float, proxy: float) -> dict[str, float]:
        row = {"step": step, "kl": kl, "reward": gold, "proxy_reward": proxy, "frontier_reward": best(kl)}
        return row | {"regret": best(kl) - gold, "entropy": 5 - kl}

    def rows(seed: int, proxy: bool) -> list[dict[str, float]]:
        made = [(0, 0.0, 0.0, 0.0), (20, 1.0, 1.2, 1.3), (40, 2.0, 1.5, 2.2), (60, 4.0, 1.1, 3.0)]
        shift = seed / 10
        return [row(s, kl, g + shift * (s > 0), (p if proxy else g) + shift * (s > 0)) for s, kl, g, p in made]

    settings = {"reward": {"kind": "learned"}, "prompts": "covered"}
    results.entries[5] = results.entries[5].model_copy(update={"settings": settings})
    gold = {"reward": {"kind": "gold"}, "prompts": "covered"}
    results.entries.insert(6, EntryResult(name="grpo", kind="grpo", settings=gold, seeds=results.entries[5].seeds))
    results.trajectories = {
        "rlhf": {str(seed): rows(seed, True) for seed in (0, 1)},
        "grpo": {str(seed): rows(seed, False) for seed in (0, 1)},
    }
    results.kl_agreement["rlhf"] = {
        "0": [
            {"step": 20, "exact": 1.0, "k1": 1.05, "k1_stderr": 0.04, "k1_exact_stderr": 0.05, "k1_z": 1.0}
            | {"k3": 0.7, "k3_stderr": 0.02, "k3_exact_stderr": 0.05, "k3_z": -6.0},
            {"step": 40, "exact": 2.0, "k1": 1.9, "k1_stderr": 0.05, "k1_exact_stderr": 0.05, "k1_z": -2.0},
        ]
    }
    return results


def test_through_training_to_the_digit(tmp_path: Path) -> None:
    results = trained_results(tmp_path)
    table = summary_table(results)
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    # peaks 1.5 and 1.6; ends 1.1 and 1.2, proxies 3.0 and 3.1: s = 0.0707, / sqrt(2) = 0.05
    assert rows["rlhf"][:5] == ("1.550 ± 0.050", "40 / 40", "2.000 ± 0.000", "1.150 ± 0.050", "4.000 ± 0.000")
    assert rows["rlhf"][6:] == ("3.050 ± 0.050", "1.900 ± 0.000")
    assert rows["grpo"][-1] == "–"
    found = trajectory_table(results, results.entry("rlhf"))
    assert found.header == ("step", "KL", "gold reward", "proxy reward", "best reward at that KL", "regret", "entropy")
    assert found.rows[2][:4] == ("40", "2.000 ± 0.000", "1.550 ± 0.050", "2.250 ± 0.050")
    assert "proxy reward" not in trajectory_table(results, results.entry("grpo")).header


def test_logged_kl_beside_exact_kl(tmp_path: Path) -> None:
    results = trained_results(tmp_path)
    table = agreement_table(results, results.entry("rlhf"))
    assert table is not None and agreement_table(results, results.entry("grpo")) is None
    assert table.rows[0] == ("20", "0", "1.000", "1.050 ± 0.040", "0.050", "1.00", "0.700 ± 0.020", "0.050", "-6.00")
    assert table.rows[1][-3:] == ("–", "–", "–")
    text = agreement_summary(results)
    assert "k1: 2 of 2 within three true standard errors, the largest |z| 2.00; the true error is up to 1.2 " in text
    assert "k3: 0 of 1 within three true standard errors, the largest |z| 6.00; the true error is up to 2.5 " in text


def test_the_page_shows_training_exactly_or_as_logged(tmp_path: Path) -> None:
    text = write_report(trained_results(tmp_path), tmp_path).read_text(encoding="utf-8")
    assert text.index("## Reward and KL through training") < text.index("## Logged KL against exact KL")
    assert text.index("### rlhf") < text.index("### grpo")
    assert_shows_something(tmp_path / "figures" / "through_training.png")
    results = text_results()
    logged = [{"step": i, "kl/k1": i / 9, "reward/mean": i / 10, "reward/judge": 1 - i / 30} for i in range(30)]
    (tmp_path / "ppo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    results.entries.append(EntryResult(name="rlhf", kind="rlhf", seeds=results.entries[1].seeds))
    results.curves = {"rlhf": {"0": "ppo.jsonl"}}
    text = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert "Below: the evaluation's judge" in text
    assert_shows_something(tmp_path / "figures" / "through_training.png")
    alone = [{key: value for key, value in row.items() if key != "reward/judge"} for row in logged]
    (tmp_path / "ppo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    text = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert "Below" not in text and "the evaluation's judge did not score these rollouts" in text


def test_best_of_n_has_a_bound_in_place_of_a_kl() -> None:
    results = text_results()
    assert "KL at most" not in main_table(results).header
    row = {"judge_score": 0.7, "judge_score_stderr": 0.05, "kl_bound": 0.6363, "response_length": 40.0}
    results.entries.append(EntryResult(name="best of 4", kind="best_of_n", seeds={"0": row}))
    table = main_table(results)
    cells = dict(zip(table.header, table.rows[-1], strict=True))
    assert (cells["KL"], cells["KL at most"], cells["accuracy"]) == ("–", "0.636", "–")
    assert "best-of-n's analytic bound" in table.caption


def assert_shows_something(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 600 and image.height > 300
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    shades = [(count, colour) for count, colour in colours if isinstance(colour, tuple)]
    strong = [colour for count, colour in shades if count > 20 and max(colour) - min(colour) > 60]
    assert len(strong) >= 2
    svg = path.with_suffix(".svg").read_text(encoding="utf-8")
    assert "<svg" in svg and svg.count("<path") > 20


def test_report_of_an_exact_comparison(tmp_path: Path) -> None:
    page = write_report(exact_results(tmp_path), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert (
        text.index("## In short")
        < text.index("## Results")
        < text.index("## What each method cost")
        < text.index("## To reproduce")
    )
    for name in ("reward_kl", "curves_off_policy", "curves_on_policy"):
        assert f"figures/{name}.png" in text
        assert_shows_something(tmp_path / "figures" / f"{name}.png") if name != "curves_on_policy" else None
    assert "All numbers are made up." in text and "dropped: 3" in text


def test_report_of_a_sweep_and_of_text(tmp_path: Path) -> None:
    sweep = write_report(sweep_results(), tmp_path / "sweep").read_text(encoding="utf-8")
    assert "mpo (5 settings)" in sweep and "**At equal gain**" in sweep and "mpo 0.50 ± 0.00 times" in sweep
    assert_shows_something(tmp_path / "sweep" / "figures" / "drift.png")
    text = write_report(text_results(), tmp_path / "text").read_text(encoding="utf-8")
    assert "estimated from samples" in text and "One seed" in text
    assert_shows_something(tmp_path / "text" / "figures" / "reward_kl.png")


def test_figures_are_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_figure(reward_kl_figure(text_results()), tmp_path / name, "figure")
    assert (tmp_path / "a" / "figure.svg").read_bytes() == (tmp_path / "b" / "figure.svg").read_bytes()


def test_labels_of_close_points_do_not_overlap() -> None:
    figure = grid_figure(sweep_results(), "gain/covered", "kl/uncovered", "t", "x", "y")
    axes = figure.axes[0]
    labels = [Label(1.0 + 0.01 * i, 2.0, f"a rather long name {i}", "black") for i in range(5)]
    place_labels(axes, labels, np.empty((0, 2)))
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("a rather")]
    assert len(boxes) == 5
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(5) for j in range(i))


def test_broken_metrics_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    with pytest.raises(UserError, match="line 2"):
        read_curves([path], ("loss",))
