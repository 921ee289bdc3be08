"""Finished runs in the terminal: `prefarena show RUN` and `prefarena diff RUN RUN`."""

from __future__ import annotations

from rich.markdown import Markdown

from pipelines.console import new_console
from prefarena.report.comparison import load_results
from prefarena.report.differences import differences
from prefarena.report.findings import compared
from prefarena.report.tables import main_table

_WIDE = 150  # characters from which the whole table fits


def show(run: str) -> int:
    """Print what a run found: its findings, its table, and where the rest is. Returns the exit status."""
    result = load_results(run)
    console = new_console()
    console.print(Markdown(compared(result.results)))
    console.print(Markdown("\n".join(f"- {sentence}" for sentence in result.findings)))
    console.print(main_table(result.results, brief=console.width < _WIDE).rich())
    if result.page.is_file():
        console.print(f"report: {result.page}", markup=False, soft_wrap=True)
    return 0


def diff(first: str, second: str) -> int:
    """Print which settings, versions and numbers differ between two runs. Returns the exit status."""
    one, other = load_results(first), load_results(second)
    console = new_console()
    console.print(f"first:  {one.folder}\nsecond: {other.folder}", markup=False, soft_wrap=True)
    tables = differences(one.results, other.results)
    for table in tables:
        console.print(table.rich())
    if not tables:
        console.print("The two runs have the same settings, versions and numbers.")
    return 0
