"""`import prefarena`, results as data frames, and `prefarena show` and `diff` on finished runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from pages import scored_results
from s3 import BUCKET, fs, server
from test_report import exact_results, sweep_results

import prefarena
from pipelines.api import resolve
from pipelines.cli import main
from prefarena.config import Comparison
from prefarena.errors import UserError
from prefarena.report.differences import differences, settings
from prefarena.report.html import write_page
from prefarena.report.results import Results, save_results

__all__ = ["fs", "server"]  # fixtures

DPO: dict[str, Any] = {"name": "dpo", "method": {"kind": "dpo"}}


def saved(results: Results, folder: Path) -> prefarena.ComparisonResult:
    folder.mkdir(exist_ok=True)
    save_results(results, folder)
    return prefarena.load_results(folder)


def test_importing_the_package_brings_nothing_heavy() -> None:
    code = "import sys, prefarena; dir(prefarena); print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    heavy = ["torch", "ray", "transformers", "pandas", "pydantic", "matplotlib", "numpy", "pipelines", "vllm"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'compaer'"):
        prefarena.compaer  # noqa: B018


def test_a_result_is_read_as_typed_views_of_the_numbers(tmp_path: Path) -> None:
    result = saved(exact_results(tmp_path), tmp_path)
    assert result.table.loc["mpo", "reward, pairs"] == pytest.approx(1.42)
    assert result.table.loc["mpo", "reward, pairs (stderr)"] == pytest.approx(0.02 / np.sqrt(3))
    assert "wall, s (stderr)" not in result.table  # which no policy has
    seeds = result.seeds.set_index(["policy", "seed"])
    assert seeds.loc[("mpo", 2), "reward/covered"] == pytest.approx(1.44)
    assert len(result.costs) == len(result.results.costs) and result.costs["wall_seconds"].max() == 100
    assert result.win_rates is not None and result.win_rates.loc["sft", "reference"] == pytest.approx(0.55)
    curves = result.curves
    assert set(curves["policy"]) == {"sft", "mpo", "dpo", "ipo", "rlhf"} and curves["seed"].dtype == np.int64
    assert result.samples is None and result.failures == {}
    assert any("highest expected reward" in sentence for sentence in result.findings)
    assert {"reward_kl", "curves_off_policy", "curves_on_policy"} <= result.figures.keys()
    assert all(isinstance(figure, Figure) for figure in result.figures.values())
    shown = result._repr_html_()
    assert "<strong>rlhf</strong>" in shown and "1.420 ± 0.012" in shown


def test_samples_failures_and_models_of_a_text_run(tmp_path: Path) -> None:
    model = tmp_path / "stages" / "dpo" / "model"
    model.mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "dpo-s0").symlink_to(model)
    result = saved(scored_results(tmp_path), tmp_path)
    assert isinstance(result.samples, pd.DataFrame) and len(result.samples) == 3 * 2 * 25
    assert result.failures == {"ipo": {"0": "its memory ran out", "1": "its memory ran out"}}
    assert result.models == {"dpo-s0": str(model)}
    assert result.table.loc["ipo"].isna().all()


def test_a_sweep_has_its_drift_among_the_figures(tmp_path: Path) -> None:
    assert {"reward_kl", "drift"} == saved(sweep_results(), tmp_path).figures.keys()


def test_a_config_may_be_a_path_a_mapping_or_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("entries: [{name: dpo, method: {kind: dpo}}]\n", encoding="utf-8")
    tree = {"entries": [DPO]}
    changed = ["entries.dpo.method.beta=0.3"]
    assert resolve(path, changed) == resolve(tree, changed) != resolve(tree) == resolve(path)
    assert tree == {"entries": [DPO]} and "beta" not in DPO["method"]
    config = resolve(tree)
    assert resolve(config) is config and isinstance(resolve(None), Comparison)
    with pytest.raises(UserError, match="bta"):
        resolve({"entries": [{"name": "dpo", "method": {"kind": "dpo", "bta": 1}}]})


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no such results file"):
        prefarena.load_results(tmp_path)
    assert main(["show", str(tmp_path)]) == 2 and main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "no such results file" in capsys.readouterr().err


def test_a_run_on_an_object_store_is_read_by_its_url_and_again_when_it_has_changed(
    fs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, url = tmp_path / "made", f"s3://{BUCKET}/from-python/text-12345678"
    run.mkdir()
    results = scored_results(run)
    for seed in (0, 1):
        results.entries[1].seeds["0"]["judge_score"] = results.entries[1].seeds["1"]["judge_score"] = float(seed)
        save_results(results, run)
        fs.put(str(run), url, recursive=True) if seed == 0 else fs.put(str(run / "results.json"), f"{url}/results.json")
        result = prefarena.load_results(url)
        assert result.table.loc["dpo", "judge score"] == seed and result.samples is not None
        assert result.folder.is_relative_to(tmp_path / "cache")
    with pytest.raises(UserError, match="no-such-run: no such results"):
        prefarena.load_results(f"s3://{BUCKET}/from-python/no-such-run")


def test_show_prints_findings_table_and_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = saved(scored_results(tmp_path), tmp_path)
    write_page(result.results, tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "rlhf has the highest judge score: 0.800 ± 0.050" in printed and "ipo (failed)" in printed
    assert f"report: {tmp_path / 'report.html'}" in printed


# ------------------------------------------------------------------------------------------ differences


def test_settings_are_flat_and_entries_go_by_name() -> None:
    config = {"seeds": [0, 1], "task": {"kind": "text"}, "entries": [{"name": "a", "method": {"beta": 0.1}}], "x": None}
    assert settings(config) == {"seeds": "[0, 1]", "task.kind": "text", "entries.a.method.beta": "0.1", "x": "null"}


def test_differences_are_what_was_changed_and_nothing_else(tmp_path: Path) -> None:
    first, second = exact_results(tmp_path), exact_results(tmp_path)
    assert differences(first, second) == []
    first.config = {"entries": [{"name": "dpo", "method": {"beta": 0.1}}], "seeds": [0]}
    second.config = {"entries": [{"name": "dpo", "method": {"beta": 0.3}}], "seeds": [0]}
    second.versions = {"torch": "2"}
    for row in second.entry("dpo").seeds.values():
        row["reward/covered"] += 0.5
    second.entries.remove(second.entry("sft"))
    config, versions, policies, numbers = differences(first, second)
    assert config.rows == (("entries.dpo.method.beta", "0.1", "0.3"),)
    assert versions.rows == (("torch", "1", "2"),)
    assert policies.rows == (("sft", "measured", "–"),)
    # errors 0.0115 each: in squares 0.0163
    assert numbers.rows == (("dpo", "reward, pairs", "1.620 ± 0.012", "2.120 ± 0.012", "0.500 ± 0.016", "yes"),)


def test_diff_prints_tables_or_that_there_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = exact_results(tmp_path)
    saved(results, tmp_path / "one")
    results.seeds = [0]
    results.config = {"seeds": [0]}
    saved(results, tmp_path / "other")
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    printed = capsys.readouterr().out
    assert "Settings that differ" in printed and "Numbers" not in printed
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "one")]) == 0
    assert "the same settings, versions and numbers" in capsys.readouterr().out
