"""report.html: the report as one file that opens from a disk or an object store, with nothing to fetch.

Words and tables stand in the page itself and can be read without a script. What the script shows (charts, samples) is
in one block of JSON. The plotting library is plotly.js, which the package `plotly` carries as a file: it draws SVG,
which a reader can zoom and a test can read, and its project is active. Where that package is missing, as in an image
that is older than the code of a job, the page is written without charts and says so.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from prefarena.report.abilities import TITLE, abilities_table
from prefarena.report.against import against_table
from prefarena.report.charts import (
    Chart,
    cost_chart,
    key_of,
    label_charts,
    legend,
    reward_kl_charts,
    through_training_charts,
    training_charts,
    tuning_charts,
)
from prefarena.report.cost_charts import against_cost_charts
from prefarena.report.equal_kl import equal_kl_table
from prefarena.report.findings import compared, data_lines, findings, limits
from prefarena.report.label_efficiency import measured_table, needed_table
from prefarena.report.leakage import leakage, leakage_tables
from prefarena.report.measures import coverage_table, divergence_table
from prefarena.report.online import online_table
from prefarena.report.overoptimisation import law_table
from prefarena.report.proxies import proxy_table
from prefarena.report.proxy_charts import proxy_charts
from prefarena.report.results import Results
from prefarena.report.samples import SAMPLES_FILE, Samples, load_samples
from prefarena.report.sensitivity import sensitivity_table
from prefarena.report.tables import Table, cost_table, main_table, win_table
from prefarena.report.trajectories import (
    agreement_summary,
    agreement_table,
    measured_on_the_way,
    summary_table,
    trajectory_table,
)
from prefarena.report.tuning import tuning_text
from prefarena.report.tuning_tables import budget_table, chosen_table, trial_tables
from prefarena.report.whole_costs import whole_cost_table
from prefarena.stages import write_text

PAGE_FILE = "report.html"
_SCRIPTS = ("legend.js", "charts.js", "tables.js", "samples.js", "main.js")
_FILTERED_FROM = 9  # rows from which a table has a field that filters them


def write_page(results: Results, folder: str | Path) -> Path:
    """Write report.html into `folder`; returns its path. Samples are those of the folder's samples.parquet."""
    target = Path(folder)
    samples = load_samples(target)
    sections = [
        _section("findings", "Findings", listing_html(findings(results))),
        _section("results", "Results", table_html(main_table(results))),
        _section("distance", "Distance from the reference", table_html(divergence_table(results))),
        _section("coverage", "With pairs and without", table_html(coverage_table(results))),
        _section("online", "Where pairs came from", table_html(online_table(results))),
        _section("reward-and-kl", "Reward and KL", '<div class="charts" data-charts="reward"></div>', *_sweep(results)),
        _labels(results),
        _through_training(results, target),
        _section("laws", "Laws of over-optimisation", table_html(law_table(results))),
        _section("win-rates-matrix", "Win rates", table_html(win_table(results))),
        _section("abilities", TITLE, table_html(abilities_table(results))),
        _tuning(results),
        _section("training", "Training curves", _charts("training", training_charts(results, target))),
        _samples(results, samples),
        _costs(results),
        _section("data", "Data", listing_html(data_lines(results))),
        _section("notes", "Notes and limits", listing_html(limits(results))),
        _section(
            "versions", "Versions", listing_html([f"{name} {version}" for name, version in results.versions.items()])
        ),
        _section("reproduce", "To reproduce", _REPRODUCE),
    ]
    parts = {
        "title": html.escape(results.name),
        "compared": inline(compared(results)),
        "contents": _contents([section for section in sections if section]),
        "sections": "\n".join(section for section in sections if section),
        "data": embedded(_data(results, target, samples)),
        "style": _asset("report.css"),
        "plotly": plotting_library() or "",
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    page = target / PAGE_FILE
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))
    write_text(page, text)
    return page


def plotting_library() -> str | None:
    """The text of plotly.js; None where the package that carries it is not installed."""
    if importlib.util.find_spec("plotly") is None:
        return None
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """JSON that may stand in a <script> block, whatever its texts are: nothing in it ends the block or a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def inline(text: str) -> str:
    """Convert a sentence to HTML: `**…**` is strong and backticks are code; all else is text."""
    shown = html.escape(text)
    shown = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", shown)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", shown)


_REPRODUCE = (
    "<p><code>config.yaml</code>, next to this page, holds every setting, defaults included; finished stages are "
    "reused. "
    "All numbers are in <code>results.json</code>.</p>\n<pre>prefarena compare config.yaml</pre>"
)


def _asset(name: str) -> str:
    return (resources.files("prefarena.report") / "assets" / name).read_text(encoding="utf-8")


def _data(results: Results, folder: Path, samples: Samples | None) -> dict[str, Any]:
    """The data that the page's script shows."""
    return {
        "legend": legend(results),
        "charts": {
            "reward": reward_kl_charts(results),
            "through": _through_training_charts(results, folder),
            "training": training_charts(results, folder),
            "costs": _cost_charts(results),
            "tuning": tuning_charts(results),
            "labels": label_charts(results),
        },
        "samples": _sample_data(results, samples),
    }


def _sample_data(results: Results, samples: Samples | None) -> dict[str, Any] | None:
    if samples is None:
        return None
    keys = {entry.name: key_of(results, entry) for entry in results.entries}
    present = {name for row in samples.rows for name in row.answers}
    policies = [entry.name for entry in results.entries if entry.name in present]
    rows = [[row.seed, row.place, row.prompt, [row.answers.get(policy) for policy in policies]] for row in samples.rows]
    return {"policies": [[policy, keys[policy]] for policy in policies], "rows": rows}


# ---------------------------------------------------------------------------------------------- sections


def _section(name: str, title: str, *parts: str) -> str:
    """A section under its heading; empty where it has no content."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{content}\n</section>'


def _contents(sections: list[str]) -> str:
    """Links to the sections."""
    found = [re.search(r'<section id="([\w-]+)".*?<h2 [^>]*>(.*?)</h2>', section, re.DOTALL) for section in sections]
    return "".join(f'<a href="#{match[1]}">{match[2]}</a>' for match in found if match)


def _charts(group: str, charts: list[Any]) -> str:
    """The place where the script puts the charts of a group; empty where there are none."""
    return f'<div class="charts" data-charts="{group}"></div>' if any(charts) else ""


def listing_html(items: list[str]) -> str:
    """Sentences as an HTML list; empty where there are none."""
    if not items:
        return ""
    return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in items) + "\n</ul>"


def table_html(table: Table | None, *, heading: bool = False) -> str:
    """A table with its note; empty for none. Columns behind the labels are numbers; the page's script sorts them."""
    if table is None:
        return ""
    marks = ['scope="col"'] * table.num_labels + ['scope="col" class="number"'] * (len(table.header) - table.num_labels)
    head = "".join(f"<th {mark}>{html.escape(name)}</th>" for name, mark in zip(table.header, marks, strict=True))
    body = "\n".join(_row(table, index) for index in range(len(table.rows)))
    is_long = ' data-filter="true"' if len(table.rows) >= _FILTERED_FROM else ""
    title = html.escape(table.title)
    shown = f"<h3>{title}</h3>\n" if heading else ""
    note = f'<p class="note">{inline(table.caption)}</p>' if table.caption else ""
    return (
        f'{shown}<div class="scroll" role="region" tabindex="0" aria-label="{title}"><table{is_long}>'
        f'<caption class="unseen">{title}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
        f"</div>\n{note}"
    )


def _row(table: Table, index: int) -> str:
    cells = [html.escape(cell) for cell in table.rows[index]]
    labels = "".join(f"<td>{cell}</td>" for cell in cells[1 : table.num_labels])
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells[table.num_labels :])
    strong = ' class="total"' if index in table.strong else ""
    return f'<tr{strong}><th scope="row">{cells[0]}</th>{labels}{numbers}</tr>'


def _sweep(results: Results) -> list[str]:
    """A sweep's tables of KL at equal gain."""
    parts = []
    if results.is_sweep and results.exact:
        for measure, where in (("kl/uncovered", "without"), ("kl/covered", "with")):
            found = leakage(results, measure)
            if found is not None:
                title = f"KL on prompts {where} pairs, at equal gain on prompts with pairs"
                parts += [table_html(table, heading=True) for table in leakage_tables(found, title)]
        if (against := against_table(results)) is not None:
            parts.append(table_html(against, heading=True))
        if not parts:
            parts = [
                "<p>The methods' grids have no range of gains in common, so they cannot be compared at equal gain.</p>"
            ]
    return parts


def _costs(results: Results) -> str:
    return _section(
        "costs",
        "Costs",
        _charts("costs", _cost_charts(results)),
        table_html(whole_cost_table(results), heading=True),
        table_html(cost_table(results), heading=True),
    )


def _cost_charts(results: Results) -> list[Chart]:
    chart = cost_chart(results)
    return [*([chart] if chart else []), *against_cost_charts(results)]


def _labels(results: Results) -> str:
    return _section(
        "labels",
        "Labelled pairs",
        _charts("labels", label_charts(results)),
        table_html(measured_table(results), heading=True),
        table_html(needed_table(results), heading=True),
    )


def _through_training_charts(results: Results, folder: Path) -> list[Chart]:
    return [*through_training_charts(results, folder), *proxy_charts(results)]


def _through_training(results: Results, folder: Path) -> str:
    charts = _charts("through", _through_training_charts(results, folder))
    if not charts:
        return ""
    parts = [charts]
    entries = measured_on_the_way(results)
    if entries:
        tables = (summary_table(results), equal_kl_table(results), proxy_table(results))
        parts += [table_html(table, heading=True) for table in tables]
        steps = [table_html(trajectory_table(results, entry), heading=True) for entry in entries]
        parts.append(_details("Every policy measured during training", "\n".join(steps)))
        agreement = [table for entry in entries if (table := table_html(agreement_table(results, entry), heading=True))]
        if agreement:
            words = f'<p class="note">{inline(agreement_summary(results))}</p>'
            parts.append(_details("Logged KL against exact KL", "\n".join([words, *agreement])))
    return _section("through-training", "Through training", *parts)


def _tuning(results: Results) -> str:
    table = budget_table(results)
    if table is None:
        return ""
    trials = "\n".join(table_html(one, heading=True) for one in trial_tables(results))
    return _section(
        "tuning",
        "Tuning",
        f"<p>{inline(tuning_text(results))}</p>",
        table_html(table),
        _charts("tuning", tuning_charts(results)),
        table_html(chosen_table(results), heading=True),
        table_html(sensitivity_table(results), heading=True),
        _details("All trials", trials),
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n{content}\n</details>"


def _samples(results: Results, samples: Samples | None) -> str:
    if results.exact:
        return ""
    if samples is None or not samples.rows:
        return _section(
            "samples",
            "Samples",
            "<p>No samples were kept: evaluations by earlier versions kept only a few.</p>",
        )
    text = f"Each sample is one prompt with the response of every policy; there are {samples.num_all:,}."
    if samples.num_left_out:
        text += (
            f" The {len(samples.rows):,} on which the policies disagree most are shown; the other "
            f"{samples.num_left_out:,} "
            f"are left out to keep the page small; they are in `{SAMPLES_FILE}`, next to it."
        )
    else:
        text += f" `{SAMPLES_FILE}`, next to this page, holds them, too."
    text = f'<p class="note">{inline(text)}</p>'
    return _section("samples", "Samples", text, '<div id="samples-browser"></div>')
