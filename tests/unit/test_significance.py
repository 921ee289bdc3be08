"""p-values and their correction for several comparisons, against tables and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefarena.report.results import Aggregate
from prefarena.report.significance import holm, p_value, significant, student_coverage, student_quantile


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.04]) == [0.04]


def test_holm_keeps_the_chance_of_any_false_difference() -> None:
    """Ten differences that are none, tested 2000 times: uncorrected, 40 % of the families hold a false one."""
    rng = np.random.default_rng(0)
    false, uncorrected = 0, 0
    for _ in range(2000):
        values = [Aggregate(float(z), 1.0, 1, False) for z in rng.normal(size=10)]
        false += any(significant(values))
        uncorrected += any(p < 0.05 for value in values if (p := p_value(value)) is not None)
    assert 0.03 < false / 2000 < 0.065 and uncorrected / 2000 > 0.35


def test_a_p_value_is_of_student_over_seeds_and_normal_within_a_run() -> None:
    assert p_value(Aggregate(0.5 + 0.0196, 0.01, 3, False), 0.5) == pytest.approx(0.05, abs=1e-3)
    assert p_value(Aggregate(4.302653, 1.0, 3, True)) == pytest.approx(0.05, abs=1e-6)
    assert p_value(Aggregate(0.5, None, 1, False)) is None
    assert p_value(Aggregate(0.7, 0.0, 3, True), 0.5) == 0.0 and p_value(Aggregate(0.5, 0.0, 3, True), 0.5) == 1.0


def test_what_has_no_error_is_not_counted_among_the_comparisons() -> None:
    clear, none = Aggregate(2.0, 1.0, 1, False), Aggregate(9.0, None, 1, False)
    assert significant([clear, none, None]) == [True, None, None]
    assert significant([clear, clear]) == [False, False]  # 0.0455 each


@pytest.mark.parametrize(
    ("degrees", "width"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (29, 2.04523), (100, 1.98397)]
)
def test_students_quantiles_are_those_of_the_tables(degrees: int, width: float) -> None:
    assert student_quantile(degrees) == pytest.approx(width, abs=1e-4)
    assert student_coverage(width, degrees) == pytest.approx(0.95, abs=1e-5)
    assert student_coverage(0.0, degrees) == 0 and student_coverage(1e9, degrees) == pytest.approx(1)


def test_many_degrees_are_a_normal_distribution() -> None:
    assert student_coverage(1.3, 2000) == pytest.approx(math.erf(1.3 / math.sqrt(2)), abs=1e-3)
