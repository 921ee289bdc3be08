"""report.html without a browser: nothing that is fetched, nothing that a text can break out of, samples, colours."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pages import HOSTILE, scored_results, write_samples
from setuptools import build_meta
from test_report import exact_results, sweep_results

from prefarena.report import html as page_module
from prefarena.report.charts import DARK, LIGHT, legend, reward_kl_charts, thinned, training_charts
from prefarena.report.html import embedded, inline, write_page
from prefarena.report.results import Results, aggregate
from prefarena.report.samples import disagreement, load_samples
from prefarena.report.style import contrast, on_ground
from prefarena.report.tables import cost_table, main_table

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "platform" / "prefarena" / "report" / "assets"


class Page(HTMLParser):
    """A page's elements, and the text of each script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and not self.scripts[-1][1]:
            self.scripts[-1] = (self.scripts[-1][0], data)

    @property
    def data(self) -> Any:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "report-data"))


def written(results: Results, folder: Path) -> Page:
    return Page(write_page(results, folder))


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    """Every reference is to the page itself, and its policy forbids the browser to ask anyone for anything."""
    page = written(scored_results(tmp_path), tmp_path)
    for tag, attributes in page.elements:
        assert "src" not in attributes and tag not in ("link", "iframe", "img", "object", "base"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    own = "".join(path.read_text(encoding="utf-8") for path in ASSETS.iterdir())
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", own)
    assert set(re.findall(r"https?://[^\s\"']+", own)) == {"http://www.w3.org/2000/svg"}  # a name, never an address


def test_texts_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    results = scored_results(tmp_path)
    results.name = results.entries[3].name = "<script>alert(3)</script>"
    results.notes = [HOSTILE]
    results.data = {HOSTILE: HOSTILE}
    page = written(results, tmp_path)
    assert len(page.scripts) == 3  # the data, the plotting library, the page's own
    assert "alert(3)</script>" not in page.text and "alert(1)</script>" not in page.text
    assert "\u2028" not in page.scripts[0][1]
    answers = [answer for row in page.data["samples"]["rows"] for answer in row[3] if answer]
    assert f"{HOSTILE} 0" in {answer[0] for answer in answers}  # and is whole when it is read


def test_embedded_json_is_what_was_put_in() -> None:
    data = {"a": [HOSTILE, 1.5, None], "</script>": "\u2029 \\u003c é 語"}
    text = embedded(data)
    assert json.loads(text) == data and not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded({"kl": float("nan")})


def test_sentences_are_text_but_for_strong_and_code() -> None:
    assert inline("**a<b** has `x & y`, 2 * 3") == "<strong>a&lt;b</strong> has <code>x &amp; y</code>, 2 * 3"


@pytest.mark.parametrize("made", ["seeds", "one seed", "sweep", "failed"])
def test_every_kind_of_comparison_has_a_page_with_its_tables(tmp_path: Path, made: str) -> None:
    results = sweep_results() if made == "sweep" else exact_results(tmp_path, (0,) if made == "one seed" else (0, 1, 2))
    if made == "failed":
        for entry in results.trained():
            entry.failures, entry.seeds = dict.fromkeys(entry.seeds, "the disk is full"), {}
        results.win_matrix = None
    page = written(results, tmp_path)
    for row in main_table(results).rows:
        assert all(cell.replace("'", "&#x27;") in page.text for cell in row)
    assert {a.get("scope") for tag, a in page.elements if tag == "th"} == {"col", "row"}
    switched = {item["key"]: item["failed"] for item in page.data["legend"]}
    lines = [line for charts in page.data["charts"].values() for chart in charts for line in chart["lines"]]
    assert {line["key"] for line in lines} <= switched.keys() | {None}
    assert switched.get("dpo") == (made == "failed")


def test_charts_have_the_numbers_of_the_tables(tmp_path: Path) -> None:
    results = exact_results(tmp_path)
    plane, drift = reward_kl_charts(results)
    mean = next(line for line in plane["lines"] if line["key"] == "mpo" and line["role"] == "mean")
    reward, kl = (aggregate(results.entry("mpo"), key) for key in ("reward/covered", "kl/covered"))
    assert reward and kl and reward.stderr
    assert (mean["x"][0], mean["y"][0]) == (pytest.approx(kl.mean, 1e-5), pytest.approx(reward.mean, 1e-5))
    assert mean["ey"][0] == pytest.approx(reward.stderr, 1e-5)
    assert "1.420 ± 0.012" in mean["text"][0] and "mean of 3 seeds" in mean["text"][0]
    seeds = next(line for line in plane["lines"] if line["key"] == "mpo" and line["role"] == "seed")
    assert seeds["y"] == [1.4, 1.42, 1.44]
    assert any(line["role"] == "frontier" for line in plane["lines"])
    assert not any(line["role"] == "frontier" for line in drift["lines"])


def test_training_curves_are_thinned_between_their_ends(tmp_path: Path) -> None:
    points = np.stack([np.arange(5000.0), np.arange(5000.0) ** 2], axis=1)
    kept = thinned(points)
    assert len(kept) == 240 and (kept[[0, -1]] == points[[0, -1]]).all() and (np.diff(kept[:, 0]) > 0).all()
    charts = {chart["title"]: chart for chart in training_charts(exact_results(tmp_path), tmp_path)}
    assert len(charts["demonstration/nll"]["lines"]) == 3 and charts["loss"]["note"] and not charts["entropy"]["note"]


# ------------------------------------------------------------------------------------------------ samples


def test_the_largest_disagreements_come_first_and_what_has_no_scores_last(tmp_path: Path) -> None:
    write_samples(tmp_path, 25)
    samples = load_samples(tmp_path)
    assert samples is not None and samples.num_left_out == 0
    assert [(row.place, row.seed) for row in samples.rows[:3]] == [(24, 0), (24, 1), (23, 0)]
    assert {row.place for row in samples.rows[-2:]} == {0}
    first = samples.rows[0]
    assert first.prompt == "question 24?" and first.answers["rlhf"] == ("rlhf answers 24 of seed 0", -2.4, 6)
    assert disagreement([1.0, None, 3.0], [1, 2, 3]) == (True, 2.0) > disagreement([1.0, None], [1, 900])


def test_what_the_page_has_no_room_for_is_what_agrees_most_and_is_counted(tmp_path: Path) -> None:
    results = scored_results(tmp_path)
    samples = load_samples(tmp_path, most_bytes=1000)
    assert samples is not None and samples.num_all == 50 and 2 < len(samples.rows) < 20
    assert min(row.place for row in samples.rows) >= 24 - len(samples.rows) // 2
    size = sum(len(row.prompt) + sum(len(answer[0]) for answer in row.answers.values()) for row in samples.rows)
    assert size <= 1000
    shown = page_module._samples(results, samples)
    assert "there are 50." in shown and f"The {len(samples.rows)} on which the policies disagree most" in shown
    assert f"the other {samples.num_left_out} are left out" in shown


def test_policies_must_have_answered_the_same_prompts(tmp_path: Path) -> None:
    table = pq.read_table(write_samples(tmp_path, 2))
    prompts = table["prompt"].to_pylist()
    prompts[-1] = "another question"
    pq.write_table(
        table.set_column(table.schema.get_field_index("prompt"), "prompt", [prompts]), tmp_path / "samples.parquet"
    )
    with pytest.raises(ValueError, match="has two prompts"):
        load_samples(tmp_path)


def test_a_run_without_samples_says_so(tmp_path: Path) -> None:
    results = scored_results(tmp_path)
    (tmp_path / "samples.parquet").unlink()
    page = written(results, tmp_path)
    assert page.data["samples"] is None and "No samples were kept" in page.text


def test_twenty_entries_and_tens_of_thousands_of_samples_stay_within_the_page(tmp_path: Path) -> None:
    results = scored_results(tmp_path, num_samples=6000)
    size = write_page(results, tmp_path).stat().st_size
    library = len(page_module.plotting_library() or "")
    assert size - library < 8 * 2**20


# ------------------------------------------------------------------------------------- looks and packaging


@pytest.mark.parametrize("ground", [LIGHT, DARK])
def test_colours_are_told_from_the_ground(tmp_path: Path, ground: str) -> None:
    results = exact_results(tmp_path)
    name = "light" if ground == LIGHT else "dark"
    for item in legend(results):
        assert contrast(item[name], ground) >= 3.2, item
    assert contrast("#ffffff", "#000000") == pytest.approx(21) and contrast("#767676", "#ffffff") == pytest.approx(
        4.54, abs=0.01
    )
    assert on_ground("#0072B2", LIGHT) == "#0072b2"  # dark enough as it is


def test_the_styles_have_the_grounds_that_colours_are_made_for() -> None:
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    assert re.findall(r"--card: (#\w+)", style) == [LIGHT, DARK]


def test_texts_of_the_page_are_told_from_their_grounds() -> None:
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", block))
        for text in ("text", "soft", "accent"):
            assert all(contrast(colours[text], colours[ground]) >= 4.5 for ground in ("page", "card", "faint")), text
        assert contrast(colours["warning"], colours["warning-soft"]) >= 4.5
        assert contrast(colours["accent"], colours["accent-soft"]) >= 4.5


def test_without_the_plotting_library_the_page_is_written_without_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = written(scored_results(tmp_path), tmp_path)
    assert len(page.text) < 200_000 and not page.scripts[1][1].strip()


@pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="the package plotly is not installed")
def test_the_plotting_library_is_inside() -> None:
    library = page_module.plotting_library()
    assert library is not None and "plotly.js v" in library[:200] and "</script" not in library.lower()


# setuptools warns of the folders of data, with a class that pytest's processes cannot hand to each other.
@pytest.mark.filterwarnings("ignore")
def test_a_built_wheel_has_the_files_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "project" / name).write_bytes((ROOT / name).read_bytes())
    for name in ("platform", "pipelines"):
        shutil.copytree(
            ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "project")
        wheel = tmp_path / build_meta.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"prefarena/report/assets/{path.name}" for path in ASSETS.iterdir()} | {"prefarena/py.typed"} <= names


def test_long_tables_have_a_filter_and_totals_are_marked(tmp_path: Path) -> None:
    results = exact_results(tmp_path)
    table = cost_table(results)
    assert table is not None
    shown = page_module.table_html(table)
    assert 'data-filter="true"' in shown and shown.count('class="total"') == len(table.strong)
    assert "data-filter" not in page_module.table_html(main_table(scored_results(tmp_path)))
