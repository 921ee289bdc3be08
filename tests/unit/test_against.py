"""Methods against DPO at equal KL and at equal gain, on curves that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prefarena.report.against import against, against_table
from prefarena.report.results import EntryResult, Results

#: A curve's settings: KL, and what regret is of the root of it; every seed scales both alike.
KLS = (0.25, 1.0, 4.0)


def entry(group: str, place: int, rows: dict[str, dict[str, float]]) -> EntryResult:
    return EntryResult(name=f"{group}-{place}", kind="dpo", settings={"group": group}, seeds=rows)


def row(kl: float, regret: float, gain: float, leaked: float) -> dict[str, float]:
    return {"kl/covered": kl, "regret/covered": regret, "reward/covered": gain, "kl/uncovered": leaked}


def results(**groups: Any) -> Results:
    """groups: from a seed's number and a setting's KL to a row."""
    nothing = {str(seed): row(0, 0, 0, 0) for seed in range(3)}
    reference = EntryResult(name="reference", kind="reference", seeds=nothing)
    entries = [
        entry(group, place, {str(seed): make(seed, kl) for seed in range(3)})
        for group, make in groups.items()
        for place, kl in enumerate(KLS)
    ]
    return Results(name="x", task={"kind": "language"}, seeds=[0, 1, 2], exact=True, entries=[reference, *entries])


def dpo(seed: int, kl: float) -> dict[str, float]:
    return row(kl, 0.1 * math.sqrt(kl), 2 * math.sqrt(kl), kl)


def worse(seed: int, kl: float) -> dict[str, float]:
    """At every KL a regret that is larger by 0.05, 0.06 or 0.07; at equal gain half of the KL without pairs."""
    return row(kl, 0.1 * math.sqrt(kl) + 0.05 + 0.01 * seed, 2 * math.sqrt(kl), kl / 2)


def shifted(seed: int, kl: float) -> dict[str, float]:
    """Other points of the same curve, but for 0.02 that come with one seed and go with another."""
    found = dpo(seed, 1.7 * kl)
    return found | {"regret/covered": found["regret/covered"] + 0.02 * (seed - 1)}


def elsewhere(seed: int, kl: float) -> dict[str, float]:
    return row(10 + kl, 3.0, 20 + kl, 12 + kl)


def test_regret_is_compared_at_equal_kl_and_leakage_at_equal_gain() -> None:
    found = {one.group: one for one in against(results(dpo=dpo, worse=worse, shifted=shifted, elsewhere=elsewhere))}
    assert list(found) == ["worse", "shifted", "elsewhere"]
    one = found["worse"]
    assert one.kls == (0.25, 4.0) and one.regret is not None and one.leaked is not None
    assert one.regret.mean == pytest.approx(0.06) and one.regret.stderr == pytest.approx(0.01 / math.sqrt(3))
    assert one.leaked.mean == pytest.approx(-math.log(2)) and one.leaked.stderr == pytest.approx(0, abs=1e-12)
    other = found["shifted"]
    assert other.regret is not None and other.regret.mean == pytest.approx(0, abs=1e-12)
    assert found["elsewhere"].regret is None is found["elsewhere"].leaked


def test_the_table_corrects_for_the_number_of_methods() -> None:
    """t is 0.06 / (0.01 / sqrt 3) with two degrees of freedom; Holm doubles the smaller of two p-values."""
    table = against_table(results(dpo=dpo, worse=worse, shifted=shifted, elsewhere=elsewhere))
    assert table is not None and table.title == "Against dpo"
    cells = {cells[0]: cells[1:] for cells in table.rows}
    t = 0.06 / (0.01 / math.sqrt(3))
    alone = 1 - t / math.sqrt(2 + t * t)
    assert cells["worse"][:3] == ("0.25 – 4.00", "0.060 ± 0.006", f"{2 * alone:.3f}")
    assert cells["worse"][3] == "0.50 ± 0.00"
    assert cells["elsewhere"][1:] == ("–", "–", "–", "–")


def test_without_a_curve_of_dpo_there_is_no_such_table() -> None:
    assert against_table(results(worse=worse, shifted=shifted)) is None
    assert against_table(results(dpo=dpo)) is None
