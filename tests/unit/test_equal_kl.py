"""The table at equal KL: what is read off a curve, and which entries have how much of it."""

from __future__ import annotations

import math

import pytest

from prefarena.report.equal_kl import equal_kl_table, reward_at
from prefarena.report.results import EntryResult, EvalRow, Results
from prefarena.report.tables import MISSING

CURVE = [(0.0, 0.1), (1.0, 0.5), (4.0, 0.7), (3.0, 0.2)]


@pytest.mark.parametrize(
    ("kl", "reward"),
    [
        (0.0, 0.1),
        (0.25, 0.3),
        (1.0, 0.5),
        (2.25, 0.6),
        (4.0, 0.7),
        (3.5, 0.5 + 0.2 * (math.sqrt(3.5) - 1)),
        (4.1, None),
    ],
)
def test_a_curve_is_read_where_it_first_has_the_kl_linearly_in_its_root(kl: float, reward: float | None) -> None:
    assert reward_at(CURVE, kl) == (None if reward is None else pytest.approx(reward))


def of(curves: dict[str, list[list[tuple[float, float]]]], *, exact: bool = True) -> Results:
    end = "/covered" if exact else ""

    def rows(curve: list[tuple[float, float]]) -> list[EvalRow]:
        return [{"step": i, f"kl{end}": kl, f"reward{end}": reward} for i, (kl, reward) in enumerate(curve)]

    return Results(
        name="x",
        task={},
        seeds=[0, 1],
        exact=exact,
        entries=[EntryResult(name=name, kind="dpo", seeds={"0": {}}) for name in curves],
        trajectories={name: {str(i): rows(c) for i, c in enumerate(seeds)} for name, seeds in curves.items()},
    )


@pytest.mark.parametrize("exact", [True, False], ids=["language", "text"])
def test_entries_are_read_at_kls_that_half_of_them_reach_with_every_seed(exact: bool) -> None:
    line = [(0.0, 0.0), (1.0, 1.0), (4.0, 2.0), (9.0, 3.0)]  # the reward is the root of the KL
    doubled = [(kl, 2 * reward) for kl, reward in line]
    curves = {"short": [line[:2], line[:2]], "middle": [line[:3], doubled[:3]], "long": [line, line[:3]]}
    table = equal_kl_table(of(curves, exact=exact))
    assert table is not None
    assert table.header == ("policy", "at KL 1.00", "at KL 2.25", "at KL 4.00", "at the end", "KL at the end")
    short, middle, long = table.rows
    assert short[1].startswith("1.000") and short[2:4] == (MISSING, MISSING) and short[4].startswith("1.000")
    assert [cell.split(" ")[0] for cell in middle[1:]] == ["1.500", "2.250", "3.000", "3.000", "4.000"]
    assert [cell.split(" ")[0] for cell in long[1:]] == ["1.000", "1.500", "2.000", "2.500", "6.500"]


def test_one_entry_alone_is_compared_with_nothing() -> None:
    assert equal_kl_table(of({"dpo": [CURVE]})) is None
    assert equal_kl_table(of({"dpo": [CURVE], "unmeasured": [[(0.0, 0.1)]]})) is None
