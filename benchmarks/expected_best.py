"""How good the estimates of the expected best of k trials are: the table in docs/tuning.md. It takes two seconds.

Searches of 24 trials whose values have a known distribution are made many times. Of each the best of 12 is estimated,
without replacement (ours) and with it (Dodge et al., arXiv 1909.03004), and intervals are drawn as the report draws
them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prefarena.report.expected_best import expected_best, expected_best_with_interval

NUM_TRIALS, NUM_SEARCHES = 24, 1000
AT = 12  # k of the estimates
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def capped(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """40 % at 0, the others between 0 and 1, denser towards 1: rewards within a limit."""
    share = (generator.random(shape) - 0.4) / 0.6
    return np.where(share < 0, 0.0, 1 - (1 - share) ** 2)


DISTRIBUTIONS: dict[str, Draw] = {
    "capped": capped,
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "exponential": lambda generator, shape: generator.standard_exponential(shape),
}


def with_replacement(values: np.ndarray) -> np.ndarray:
    """[n]: the estimator of 1909.03004."""
    shares = np.arange(len(values) + 1) / len(values)
    powers = shares[:, None] ** np.arange(1, len(values) + 1)
    return np.sort(values) @ np.diff(powers, axis=0)


def _holds(search: np.ndarray, seed: int, truth: dict[int, float]) -> list[bool]:
    """Whether the interval at each k holds the truth."""
    interval = expected_best_with_interval(search, seed).interval
    return [bool(interval[k - 1, 0] <= best <= interval[k - 1, 1]) for k, best in truth.items()]


def main() -> None:
    print("distribution   without: bias, rmse   with: bias, rmse   interval holds the truth at k = 1, 4, 12")
    for name, draw in DISTRIBUTIONS.items():
        generator = np.random.default_rng(0)
        truth = {k: float(draw(generator, (200_000, k)).max(axis=1).mean()) for k in (1, 4, AT)}
        searches = draw(generator, (NUM_SEARCHES, NUM_TRIALS))
        parts = []
        for estimate in (expected_best, with_replacement):
            errors = np.array([estimate(search)[AT - 1] for search in searches]) - truth[AT]
            parts.append(f"{errors.mean():+.3f}, {np.sqrt((errors**2).mean()):.3f}")
        held = np.mean([_holds(search, seed, truth) for seed, search in enumerate(searches)], axis=0)
        print(f"{name:<12}   {parts[0]:<19}   {parts[1]:<16}   {', '.join(f'{share:.0%}' for share in held)}")


if __name__ == "__main__":
    main()
