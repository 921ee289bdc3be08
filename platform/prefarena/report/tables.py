"""Tables of a comparison. Each is made once, as text cells, and shown as GitHub Markdown or in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import rich.table

from prefarena.report.results import (
    Aggregate,
    Cost,
    EntryResult,
    Results,
    WinMatrix,
    aggregate,
    kl_key,
    mean_and_error,
)
from prefarena.report.significance import significant

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Text cells under `header`; the first `num_labels` columns are labels. Rows in `strong` are totals."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    num_labels: int = 1
    strong: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """A GitHub table; the title is left to the page, the caption follows the table."""
        marks = ["---"] * self.num_labels + ["---:"] * (len(self.header) - self.num_labels)
        lines = [_markdown_row(self.header), _markdown_row(tuple(marks))]
        for index, row in enumerate(self.rows):
            lines.append(_markdown_row(tuple(f"**{cell}**" if cell and index in self.strong else cell for cell in row)))
        return "\n".join(lines) + (f"\n\n{self.caption}" if self.caption else "") + "\n"

    def rich(self) -> rich.table.Table:
        """The table for the terminal, with the same cells."""
        shown = rich.table.Table(title=self.title, caption=self.caption or None, caption_justify="left")
        for index, name in enumerate(self.header):
            is_label = index < self.num_labels
            shown.add_column(name, justify="left" if is_label else "right", no_wrap=is_label)
        for index, row in enumerate(self.rows):
            shown.add_row(*row, style="bold" if index in self.strong else None)
        return shown


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None, digits: int) -> str:
    """Fixed-point text without a minus sign on zero; a dash for None."""
    if value is None:
        return MISSING
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.,") else text


def plus_minus(value: Aggregate | None, digits: int) -> str:
    """`mean ± standard error`, or just the mean if there is no error."""
    if value is None:
        return MISSING
    text = number(value.mean, digits)
    return text if value.stderr is None else f"{text} ± {number(value.stderr, digits)}"


# ------------------------------------------------------------------------------------------- main table


@dataclass(frozen=True)
class Column:
    """A column of the main table: its heading and where its value comes from."""

    title: str
    value: Callable[[Results, EntryResult], Aggregate | None]
    digits: int
    brief: bool = True  # shown on a narrow terminal, too
    optional: bool = False  # left out where no policy has a value


def wall_seconds(results: Results, entry: EntryResult) -> Aggregate | None:
    """Seconds of the entry's own stages for one seed, evaluation left out; stages that seeds share count once."""
    own = results.own_costs(entry)
    if not own:
        return None
    shared = sum(cost.wall_seconds for cost in own if cost.seed is None)
    by_seed: dict[int, float] = {}
    for cost in own:
        if cost.seed is not None:
            by_seed[cost.seed] = by_seed.get(cost.seed, 0.0) + cost.wall_seconds
    seconds = [shared + value for value in by_seed.values()] or [shared]
    return Aggregate(mean_and_error(seconds)[0], None, len(seconds), False)


def _measured(key: str) -> Callable[[Results, EntryResult], Aggregate | None]:
    return lambda results, entry: aggregate(entry, key)


_WALL = Column("wall, s", wall_seconds, 1)
EXACT_COLUMNS = (
    Column("reward, pairs", _measured("reward/covered"), 3),
    Column("KL, pairs", _measured("kl/covered"), 3),
    Column("best reward at that KL", _measured("frontier_reward/covered"), 3),
    Column("regret", _measured("regret/covered"), 3),
    Column("KL, no pairs", _measured("kl/uncovered"), 3),
    Column("forward KL", _measured("forward_kl/all"), 3, brief=False),
    Column("entropy", _measured("entropy/all"), 3, brief=False),
    Column("win rate", _measured("win_rate"), 3),
    Column("accuracy", _measured("preference_accuracy"), 3, brief=False),
    Column("length", _measured("response_length"), 2, brief=False),
    _WALL,
)
TEXT_COLUMNS = (
    Column("judge score", _measured("judge_score"), 3, optional=True),
    Column("win rate", _measured("win_rate"), 3),
    Column("win rate at equal length", _measured("win_rate_at_equal_length"), 3, brief=False, optional=True),
    Column("regret", _measured("regret"), 3, optional=True),
    Column("position bias", _measured("position_bias"), 3, brief=False, optional=True),
    Column("KL", lambda results, entry: aggregate(entry, kl_key(results)), 3),
    Column("KL at most", _measured("kl_bound"), 3, optional=True),
    Column("accuracy", _measured("preference_accuracy"), 3),
    Column("length", _measured("response_length"), 1),
    _WALL,
)


def main_columns(results: Results, *, brief: bool = False) -> list[Column]:
    """The main table's columns for this task. `brief` keeps those that fit a narrow terminal."""
    return [
        column
        for column in (EXACT_COLUMNS if results.exact else TEXT_COLUMNS)
        if (column.brief or not brief)
        and not (column.optional and all(column.value(results, entry) is None for entry in results.entries))
    ]


def main_table(results: Results, *, brief: bool = False) -> Table:
    """Reference, every entry and the optimum, one row each. `brief` keeps the columns that fit a narrow terminal."""
    columns = main_columns(results, brief=brief)
    cells = [[column.value(results, entry) for column in columns] for entry in results.entries]
    rows = [
        (entry.shown_name, *(plus_minus(cell, column.digits) for cell, column in zip(row, columns, strict=True)))
        for entry, row in zip(results.entries, cells, strict=True)
    ]
    values = [cell for row in cells for cell in row if cell is not None]
    caption = f"{_legend(results)} {_error_note(results, values)}"
    return Table(f"{results.name}: the comparison", ("policy", *(c.title for c in columns)), tuple(rows), caption)


def _legend(results: Results) -> str:
    common = (
        "Win rate: against the reference, ties counting half. Accuracy: share of held-out pairs that the log-ratio to "
        "the reference ranks as labelled. Length is in tokens. Wall: time of the entry's own stages for one seed, "
        "without evaluation and without stages that entries share."
    )
    if results.exact:
        return (
            "Exact values over all responses. `pairs` / `no pairs`: on prompts with / without preference pairs; "
            "forward KL, KL(ref ‖ π), and entropy on all prompts; KL is KL(π ‖ ref); all in nats per response. "
            f"Regret: the best reward possible at the policy's own KL, minus its reward. {common}"
        )
    bound = " KL at most: best-of-n's analytic bound, log n − (n − 1)/n, instead of an estimate."
    has_bound = any(aggregate(entry, "kl_bound") for entry in results.entries)
    bias = (
        " Position bias: share of pairs in which the judge preferred the response shown first in both orders, minus "
        "the share in which it preferred the one shown second; 0 for a judge that ignores position."
    )
    has_bias = any(aggregate(entry, "position_bias") for entry in results.entries)
    equal = (
        " Win rate at equal length: the prediction, at a length difference of zero, of a logistic regression of wins "
        "on the difference in tokens (as in AlpacaEval 2, without its term for prompts)."
    )
    regret = (
        " Regret: the best judge score possible at the policy's own KL, as estimated from reference samples, minus "
        "its score; none where there are too few samples for that."
    )
    has_regret = any(aggregate(entry, "regret") for entry in results.entries)
    has_equal = any(aggregate(entry, "win_rate_at_equal_length") for entry in results.entries)
    notes = f"{regret if has_regret else ''}{equal if has_equal else ''}{bound if has_bound else ''}"
    notes += bias if has_bias else ""
    how = ", the sum along each of the exact divergences over the vocabulary" if kl_key(results) != "kl" else ""
    return f"KL(π ‖ ref) in nats per response, estimated from samples{how}.{notes} {common}"


def _error_note(results: Results, values: list[Aggregate]) -> str:
    over_seeds = [value for value in values if value.over_seeds]
    within = any(value.stderr is not None and not value.over_seeds for value in values)
    notes = []
    if over_seeds:
        num_seeds = sorted({value.num_seeds for value in over_seeds})
        notes.append(f"±: one standard error of the mean over {_or(num_seeds)} seeds")
        if within:
            notes.append("over prompts or pairs where all seeds share one value")
    elif within:
        notes.append(
            "±: one standard error within the single run, over prompts or pairs; it does not cover the variation "
            "between training seeds"
        )
    if not over_seeds and len(results.seeds) == 1:
        notes.append("one seed, so numbers without ± have no error estimate")
    return "; ".join(notes)[:1].upper() + "; ".join(notes)[1:] + "." if notes else ""


def _or(numbers: list[int]) -> str:
    return " or ".join(str(value) for value in numbers)


# ------------------------------------------------------------------------------------------- win matrix


def win_table(results: Results) -> Table | None:
    """A table of how often the row's policy beats the column's; None where it was not measured."""
    matrix = results.win_matrix
    if matrix is None:
        return None
    size, num_seeds = len(matrix.rows), len(results.seeds)
    cells = {place: _win_cell(matrix, place, num_seeds) for place in product(range(size), repeat=2)}
    pairs = [place for place in cells if place[0] < place[1]]
    told = dict(zip(pairs, significant([cells[place] for place in pairs], 0.5), strict=True))
    rows = [
        (name, *(_marked(cells[i, j], told.get((min(i, j), max(i, j)))) for j in range(size)))
        for i, name in enumerate(matrix.rows)
    ]
    caption = "Share of comparisons in which the row's policy beats the column's, ties half, ± one standard error."
    if any(told.values()):
        caption += f" *: not one half at the 5 % level, after Holm's correction for {len(pairs)} comparisons."
    return Table(f"{results.name}: win rates", ("row beats", *matrix.rows), tuple(rows), caption)


def _win_cell(matrix: WinMatrix, place: tuple[int, ...], num_seeds: int) -> Aggregate | None:
    """A cell of the win table; None on the diagonal, and where the two were not compared."""
    i, j = place
    rate, error = matrix.win_rate[i][j], matrix.stderr[i][j]
    return None if i == j or rate is None else Aggregate(rate, error or None, num_seeds, num_seeds > 1)


def _marked(cell: Aggregate | None, is_told: bool | None) -> str:
    return plus_minus(cell, 3) + (" *" if is_told else "")


# ------------------------------------------------------------------------------------------------ costs


def cost_table(results: Results) -> Table | None:
    """Every stage's cost for one seed (means over seeds), shared stages first, with a total for each entry."""
    if not results.costs:
        return None
    owners: dict[str | None, list[Cost]] = {None: []}
    for entry in results.entries:
        owners[entry.name] = []
    for cost in results.costs:
        owners.setdefault(cost.entry, []).append(cost)
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for owner, costs in owners.items():
        name = "shared by all" if owner is None else owner
        stages = {cost.stage: [other for other in costs if other.stage == cost.stage] for cost in costs}
        for stage, its_costs in stages.items():
            rows.append((name, stage, *_cost_cells([its_costs]), _reused(its_costs)))
        if costs:
            strong.add(len(rows))
            counted = [its_costs for its_costs in stages.values() if not its_costs[0].is_evaluation]
            rows.append((name, "total", *_cost_cells(counted), ""))
    header = (
        "policy",
        "stage",
        "wall, s",
        "device, s",
        "peak memory, MiB",
        "tokens trained",
        "tokens generated",
        "reused",
    )
    caption = (
        "Costs of one seed: means over seeds, and the largest for peaks. Totals exclude evaluation. A reused stage "
        "shows what it cost when it ran. Device seconds: wall seconds times the number of devices held."
    )
    return Table(f"{results.name}: costs", header, tuple(rows), caption, 2, frozenset(strong))


def _cost_cells(stages: list[list[Cost]]) -> tuple[str, ...]:
    """Sums over stages of means over each stage's runs; the peak is the largest of all."""
    peaks = [cost.peak_memory_mib for costs in stages for cost in costs if cost.peak_memory_mib is not None]

    def total(field: str) -> float:
        return sum(_per_seed(costs, field) for costs in stages)

    return (
        number(total("wall_seconds"), 1),
        number(total("device_seconds"), 1),
        number(max(peaks), 0) if peaks else MISSING,
        number(total("num_tokens_trained"), 0),
        number(total("num_tokens_generated"), 0),
    )


def _per_seed(costs: list[Cost], field: str) -> float:
    """A stage may hold several rows for a seed (its parts): they add up; then the mean over seeds."""
    num_seeds = len({cost.seed for cost in costs})
    return sum(getattr(cost, field) for cost in costs) / num_seeds if num_seeds else 0.0


def _reused(costs: list[Cost]) -> str:
    num_reused = sum(cost.reused for cost in costs)
    if num_reused in (0, len(costs)):
        return "yes" if num_reused else "no"
    return f"{num_reused} of {len(costs)}"
