"""report.html in a real Chromium, by mouse and keyboard: hover, legend, sorting, filters, samples, colours, widths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, browser_path, scored_results, why_no_browser
from tuning import plausible_tuning, with_tuning

from prefarena.report import html
from prefarena.report.html import write_page

_REASON = why_no_browser()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"report.html cannot be driven: {_REASON}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser_path())
        yield running
        running.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return write_page(scored_results(folder), folder).as_uri()


class Opened:
    """A page, and what it complained of or asked of the network."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", self._dismiss)
        self.page.on("console", lambda said: self.troubles.extend([said.text] if said.type == "error" else []))
        self.page.on("request", lambda asked: self.troubles.extend([asked.url] if asked.url.startswith("http") else []))
        self.page.set_default_timeout(10_000)
        self.page.goto(url)
        assert self.troubles == []
        self.page.locator("#plot-reward-kl").scroll_into_view_if_needed()  # charts are drawn when they come near
        self.page.wait_for_selector("#plot-reward-kl .main-svg")

    def _dismiss(self, dialog: Any) -> None:
        """A dialog would come from a text that was run."""
        self.troubles.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def traces(self, plot: str) -> list[str]:
        """Names of what a chart draws."""
        return list(self.page.evaluate("id => document.getElementById(id).data.map(trace => trace.name)", plot))

    def prompts(self) -> list[str]:
        return list(self.page.locator(".sample .prompt").all_text_contents())


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Opened]:
    found = Opened(browser, url)
    yield found
    assert found.troubles == []
    found.page.context.close()


def column(opened: Opened, index: int) -> list[str]:
    rows = opened.page.locator("#results tbody tr")
    return [rows.nth(row).locator("th, td").nth(index).inner_text() for row in range(rows.count())]


def test_the_mouse_over_a_point_shows_its_numbers(opened: Opened) -> None:
    page = opened.page
    point = page.evaluate(
        """() => {
            const plot = document.getElementById("plot-reward-kl");
            const trace = plot.data.find((one) => one.name === "rlhf" && one.error_y);
            const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
            return [box.x + xaxis._offset + xaxis.d2p(trace.x[0]), box.y + yaxis._offset + yaxis.d2p(trace.y[0])];
        }"""
    )
    page.mouse.move(point[0] - 30, point[1] - 30)
    page.mouse.move(*point, steps=4)
    label = page.locator("#plot-reward-kl .hoverlayer .hovertext")
    label.first.wait_for()
    text = label.first.text_content()
    assert "rlhf" in text and "0.800" in text and "3.050 ± 0.050" in text and "mean of 2 seeds" in text


def test_names_stand_beside_points_and_on_nothing_else(opened: Opened) -> None:
    names = opened.page.locator("#plot-reward-kl .textpoint text")
    assert sorted(names.all_text_contents()) == ["dpo", "reference", "rlhf"]
    boxes = [names.nth(place).bounding_box() for place in range(3)]
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            apart = one["x"] >= other["x"] + other["width"] or other["x"] >= one["x"] + one["width"]
            assert apart or one["y"] >= other["y"] + other["height"] or other["y"] >= one["y"] + one["height"]


def test_the_legend_switches_charts_and_samples_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.locator("#samples-list .answer").first.wait_for()
    assert "dpo" in opened.traces("plot-reward-kl")
    key = page.locator('#legend .key[data-key="dpo"]')
    key.focus()
    page.keyboard.press("Space")
    assert key.get_attribute("aria-pressed") == "false"
    assert "dpo" not in opened.traces("plot-reward-kl") and "rlhf" in opened.traces("plot-reward-kl")
    assert page.locator(".answer header strong").all_text_contents()[:3] == ["reference", "rlhf", "reference"]
    page.get_by_role("button", name="Hide all").click()
    assert opened.traces("plot-reward-kl") == [] and opened.prompts() == []
    page.get_by_role("button", name="Show all").click()
    assert "dpo" in opened.traces("plot-reward-kl") and len(opened.prompts()) == 10


def test_a_failed_entry_is_named_and_cannot_be_switched(opened: Opened) -> None:
    key = opened.page.locator('#legend .key[data-key="ipo"]')
    assert key.is_disabled() and key.inner_text() == "ipo (failed)"
    assert "ipo failed with seeds 0 and 1: its memory ran out." in opened.page.locator("#findings").inner_text()


def test_headings_sort_up_down_and_back_with_what_is_missing_last(opened: Opened) -> None:
    heading = opened.page.locator("#results thead th").nth(1)
    button = heading.get_by_role("button")
    names = column(opened, 0)
    button.focus()
    opened.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(opened, 0) == ["reference", "dpo", "rlhf", "ipo (failed)"]
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(opened, 0) == ["rlhf", "dpo", "reference", "ipo (failed)"]
    button.click()
    assert heading.get_attribute("aria-sort") == "none" and column(opened, 0) == names


def test_numbers_sort_by_value(opened: Opened) -> None:
    found = opened.page.evaluate('["-0.5 ± 0.1", "1,234.5", "–", "0.062", "12"].map(numberIn)')
    assert found == [-0.5, 1234.5, None, 0.062, 12]


def test_a_filter_leaves_the_rows_that_it_names(browser: Any, tmp_path: Path) -> None:
    results = scored_results(tmp_path)
    results.entries += [results.entries[1].model_copy(update={"name": f"dpo {n}"}) for n in range(8)]
    opened = Opened(browser, write_page(results, tmp_path).as_uri())
    opened.page.get_by_label("Show rows with").first.fill("DPO 3")
    shown = opened.page.locator("#results tbody tr:visible")
    assert shown.count() == 1 and "dpo 3" in shown.inner_text() and opened.troubles == []


def test_samples_begin_with_the_largest_disagreement_and_can_be_turned_over(opened: Opened) -> None:
    page, browser = opened.page, opened.page.locator("#samples-browser")
    assert opened.prompts()[:4] == ["question 24?", "question 24?", "question 23?", "question 23?"]
    assert "scores differ by 4.8" in page.locator(".sample h3").first.inner_text()
    best = page.locator(".sample").first.locator(".answer.best")
    assert best.locator("strong").inner_text() == "dpo" and "score 2.4 · 6 tokens" in best.inner_text()
    page.get_by_role("button", name="Next").first.click()
    assert "11 to 20 of 50" in page.locator(".pager p").first.inner_text() and opened.prompts()[0] == "question 19?"
    browser.get_by_label("Order").select_option("place")
    assert opened.prompts()[0] == "question 0?"
    browser.get_by_label("Order").select_option("difference")
    browser.get_by_label("Score of").select_option("rlhf")
    browser.get_by_label("above that of").select_option("dpo")
    assert opened.prompts()[0] == "question 1?"  # where it falls behind the least
    browser.get_by_label("Seed").select_option("1")
    assert "of 25" in page.locator(".pager p").first.inner_text()
    browser.get_by_label("Prompts and responses with").fill("dpo ANSWERS 17")
    assert opened.prompts() == ["question 17?"]
    browser.get_by_label("Prompts and responses with").fill("no such words")
    assert opened.prompts() == [] and "No sample" in page.locator(".pager p").first.inner_text()


def test_what_a_model_wrote_is_shown_as_text(opened: Opened) -> None:
    opened.page.get_by_label("Prompts and responses with").fill("alert(1)")
    texts = opened.page.locator(".answer .text").all_text_contents()
    assert f"{HOSTILE} 0" in texts
    assert opened.page.locator("#samples-list script, #samples-list img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader(browser: Any, url: str, scheme: str) -> None:
    opened = Opened(browser, url, color_scheme=scheme)
    colours = "() => [legend => legend.find(item => item.key === 'dpo')].map(find => find(DATA.legend))[0]"
    item = opened.page.evaluate(colours)
    trace = "() => document.getElementById('plot-reward-kl').data.find(trace => trace.name === 'dpo').marker.color"
    assert opened.page.evaluate(trace) == item[scheme]
    opened.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    opened.page.wait_for_function(
        f"colour => ({trace})() === colour", arg=item["dark" if scheme == "light" else "light"]
    )
    assert opened.troubles == []


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_no_width_makes_the_page_scroll_sideways(browser: Any, url: str, width: int) -> None:
    opened = Opened(browser, url)
    opened.page.set_viewport_size({"width": width, "height": 800})
    opened.page.wait_for_timeout(300)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.locator(".plot").first.bounding_box()["width"] <= width


def test_a_missing_plotting_library_is_told_in_place_of_charts(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = scored_results(tmp_path)
    monkeypatch.setattr(html, "plotting_library", lambda: None)
    page = browser.new_page()
    page.goto(write_page(results, tmp_path).as_uri())
    assert "the package plotly was not installed" in page.locator("#reward-and-kl .warning").inner_text()
    assert page.locator("#samples-list .answer").count() > 0


def test_without_scripts_findings_and_tables_are_there(browser: Any, url: str) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(url)
    assert "highest judge score" in page.locator("#findings").inner_text()
    assert page.locator("#results tbody tr").count() == 4 and "need JavaScript" in page.locator("noscript").inner_text()


def test_tuning_is_charted_with_bands_that_the_legend_hides_and_trials_that_sort(browser: Any, tmp_path: Path) -> None:
    results = with_tuning(scored_results(tmp_path), plausible_tuning(8, ("dpo", "rlhf")))
    opened = Opened(browser, write_page(results, tmp_path).as_uri())
    page = opened.page
    for plot in ("plot-expected-best", "plot-expected-best-cost", "plot-best-so-far"):
        page.locator(f"#{plot}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#{plot} .main-svg")
    assert opened.traces("plot-expected-best") == ["dpo, 95 %", "dpo", "rlhf, 95 %", "rlhf"]
    assert page.locator("#plot-expected-best .scatterlayer .js-fill").count() == 2
    page.locator("#legend").get_by_role("button", name="rlhf").click()
    assert opened.traces("plot-expected-best") == ["dpo, 95 %", "dpo"]
    assert opened.traces("plot-best-so-far") == ["dpo", "dpo, best so far"]
    page.locator("#tuning summary").click()
    trials = page.locator("#tuning details table").first
    trials.get_by_role("button", name="training.learning_rate").click()
    rates = [float(row.locator("td").nth(1).inner_text()) for row in trials.locator("tbody tr").all()]
    assert rates == sorted(rates) and min(rates) < 1e-4 < max(rates)  # some are written as 3e-05
    assert opened.troubles == []
    page.context.close()
