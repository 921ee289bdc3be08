"""The frontier where it is delicate: rewards of any scale, responses of no probability, both its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefarena.evaluation.exact import Frontier, Optimum


def distributions(seed: int, num_prompts: int = 4, num_responses: int = 30) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(num_prompts, num_responses))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


REF, REWARDS = distributions(0), np.random.default_rng(1).normal(size=(4, 30))


class Counting(Frontier):
    """Counts the optima that a search computes."""

    num_computed = 0

    def at(self, inverse_temperature: float) -> Optimum:
        self.num_computed += 1
        return super().at(inverse_temperature)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("kl", [1e-6, 0.1, 1.0, 2.5])
def test_the_frontier_does_not_depend_on_the_unit_of_the_reward(scale: float, kl: float) -> None:
    """A reward in another unit is best met by the same policy: the temperature takes up the unit."""
    unit, scaled = Frontier(REF, REWARDS).optimum_at(kl), Frontier(REF, scale * REWARDS).optimum_at(kl)
    assert scaled.kl == pytest.approx(kl, abs=1e-9)
    assert scaled.reward / scale == pytest.approx(unit.reward, abs=1e-6)
    assert scaled.inverse_temperature * scale == pytest.approx(unit.inverse_temperature, rel=1e-3)


@pytest.mark.parametrize("kl", [0.0, 1e-8, 1e-3, 0.1, 0.7, 1.5, 2.5])
def test_the_search_takes_few_steps(kl: float) -> None:
    """Rewards of spread 1: Newton's method needs no bisection, which would take some thirty steps."""
    frontier = Counting(REF, REWARDS)
    frontier.optimum_at(kl)
    assert frontier.num_computed <= 8


def test_beyond_the_largest_kl_lies_nothing() -> None:
    frontier = Frontier(REF, REWARDS)
    assert frontier.optimum_at(frontier.largest.kl) is frontier.largest
    assert frontier.optimum_at(frontier.largest.kl - 1e-3).inverse_temperature < math.inf


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inverse_temperature", [0.0, 1.0, 1000.0])
def test_responses_that_the_reference_never_gives_are_no_part_of_the_frontier(inverse_temperature: float) -> None:
    """Three more of them, of the highest reward in every prompt: no policy of finite KL can give them."""
    plain = Frontier(REF, REWARDS)
    wider = Frontier(np.hstack([REF, np.full((4, 3), -np.inf)]), np.hstack([REWARDS, np.full((4, 3), 9.0)]))
    assert wider.largest == pytest.approx(plain.largest)
    assert wider.at(inverse_temperature) == pytest.approx(plain.at(inverse_temperature))
    logps = wider.logps(inverse_temperature)
    np.testing.assert_allclose(logps[:, :30], plain.logps(inverse_temperature), atol=1e-12)
    assert (logps[:, 30:] == -np.inf).all()


def test_a_reference_that_misses_one_by_rounding_has_the_same_frontier() -> None:
    plain, rounded = Frontier(REF, REWARDS), Frontier(REF + np.array([[1e-3], [0.0], [-1e-3], [2e-3]]), REWARDS)
    for inverse_temperature in (0.0, 0.5, 2.0):
        assert rounded.at(inverse_temperature) == pytest.approx(plain.at(inverse_temperature), abs=1e-12)
    assert rounded.largest == pytest.approx(plain.largest, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_curve_has_its_points_at_the_same_kls_in_any_unit(scale: float) -> None:
    plain, scaled = np.array(Frontier(REF, REWARDS).curve()), np.array(Frontier(REF, scale * REWARDS).curve())
    assert plain.shape == (33, 2) and len(Frontier(REF, REWARDS).curve(5)) == 5
    np.testing.assert_allclose(scaled, plain * [1, scale], rtol=1e-6, atol=1e-9)
    # Dense where the reward rises fast: a quarter of the points lie within the first twentieth of the KL.
    assert (plain[:, 0] < plain[-1, 0] / 20).mean() > 0.25


@pytest.mark.filterwarnings("error")
def test_a_constant_reward_has_a_curve() -> None:
    curve = np.array(Frontier(REF, np.full((4, 30), 0.25)).curve())
    np.testing.assert_allclose(curve, np.tile([0.0, 0.25], (33, 1)), atol=1e-12)
