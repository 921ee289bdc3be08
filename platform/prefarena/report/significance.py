"""Whether differences in a table are more than chance, where it holds several of them.

Of 20 differences that are none, one looks significant at 5 %. Holm's step-down correction keeps the chance that any of
them is called one at 5 %, whatever their dependence (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefarena.report.results import Aggregate

LEVEL = 0.05


def p_value(value: Aggregate, null: float = 0.0) -> float | None:
    """Two-sided: Student's t where the error is over seeds, the normal distribution where it is within a run.

    None where no error is known.
    """
    if value.stderr is None:
        return None
    if value.stderr == 0:
        return 0.0 if value.mean != null else 1.0
    width = abs(value.mean - null) / value.stderr
    return 1 - student_coverage(width, value.num_seeds - 1) if value.over_seeds else math.erfc(width / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct each p-value for all of them: it is below `LEVEL` where it is significant among them."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    found, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found


def significant(values: Sequence[Aggregate | None], null: float = 0.0) -> list[bool | None]:
    """Which values differ from `null` at 5 % after Holm's correction for all of them; None where no error is known."""
    known = {
        place: p for place, value in enumerate(values) if value is not None and (p := p_value(value, null)) is not None
    }
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    return [corrected[place] < LEVEL if place in corrected else None for place in range(len(values))]


def student_coverage(width: float, degrees: int) -> float:
    """P(|t| < width) for Student's t with `degrees` of freedom, by its finite series (Abramowitz and Stegun, 26.7)."""
    angle = math.atan(width / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for place in range(degrees // 2):
        total += term
        term *= cosine**2 * (2 * place + 1 + odd) / (2 * place + 2 + odd)
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside


def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """The width w with P(|t| < w) = 1 - level, by bisection."""
    low, high = 0.0, 1.0
    while student_coverage(high, degrees) < 1 - level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_coverage(middle, degrees) < 1 - level else (low, middle)
    return high
