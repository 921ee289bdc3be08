"""The frontier estimated from samples of the reference, against the exact one of an enumerable language."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_sampled import TASK, Arena

from prefarena.evaluation.estimated_frontier import EstimatedFrontier
from prefarena.evaluation.exact import Frontier
from prefarena.tasks.pairs import sample_responses

_DRAWS, _PROMPTS = 20, 128


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena"))


def drawn(arena: Arena, seed: int, per_prompt: int) -> tuple[np.ndarray, EstimatedFrontier]:
    """The prompts [P] that were drawn, and the frontier from samples of the reference on them."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(TASK.num_prompts, size=_PROMPTS)
    rows = np.stack([sample_responses(rng, arena.exact[0].logps[prompt], per_prompt) for prompt in prompts])
    scores = arena.rewards[prompts[:, None], rows]
    return prompts, EstimatedFrontier(scores.ravel(), np.repeat(np.arange(_PROMPTS), per_prompt))


@pytest.mark.parametrize("per_prompt", [16, 64])
def test_twenty_draws_agree_with_the_exact_frontier_as_far_as_they_are_trusted(arena: Arena, per_prompt: int) -> None:
    exact = Frontier(arena.exact[0].logps, arena.rewards)
    for seed in range(_DRAWS):
        _, found = drawn(arena, seed, per_prompt)
        for share in (0.02, 0.1, 0.3, 0.6, 1.0):
            kl = share * found.largest_kl
            point = found.optimum_at(kl)
            assert point is not None and point.stderr > 0
            assert abs(point.reward - exact.optimum_at(kl).reward) < 3 * point.stderr, (seed, share)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_its_standard_error_is_the_spread_of_its_height(arena: Arena, share: float) -> None:
    """With fresh prompts each time; a height that is biased beside its error, or an error too small, would show."""
    exact, z_scores = Frontier(arena.exact[0].logps, arena.rewards), []
    for seed in range(200):
        _, found = drawn(arena, seed, 16)
        point = found.optimum_at(share * found.largest_kl)
        assert point is not None
        z_scores.append((point.reward - exact.optimum_at(share * found.largest_kl).reward) / point.stderr)
    assert 0.8 < np.std(z_scores) < 1.2 and abs(np.mean(z_scores)) < 0.5


def test_without_the_jackknife_the_bias_would_be_several_errors(arena: Arena) -> None:
    """What 16 samples show by the plain formulas, near the end of what is trusted."""
    exact, shifts = Frontier(arena.exact[0].logps, arena.rewards), []
    for seed in range(_DRAWS):
        prompts, found = drawn(arena, seed, 16)
        optimum = exact.at(found.optimum_at(found.largest_kl).inverse_temperature)  # type: ignore[union-attr]
        scores, strength = found._scores, optimum.inverse_temperature
        height = (np.log(np.exp(strength * scores).mean(axis=1)) + optimum.kl) / strength
        shifts.append((height.mean() - optimum.reward) / (height.std(ddof=1) / math.sqrt(len(prompts))))
    assert np.mean(shifts) < -1.2


@pytest.mark.parametrize("distance", [0.15, 0.3])
def test_regret_agrees_with_the_exact_one(arena: Arena, distance: float) -> None:
    """Of a policy between the reference and another one; its KL and reward are estimated too, on the same prompts."""
    ref, other = arena.exact
    logps = (1 - distance) * ref.logps + distance * other.logps
    logps -= np.logaddexp.reduce(logps, axis=1, keepdims=True)
    policy, ratio = np.exp(logps), logps - ref.logps
    kl, reward = float((policy * ratio).sum(1).mean()), float((policy * arena.rewards).sum(1).mean())
    exact, z_scores = Frontier(ref.logps, arena.rewards).optimum_at(kl).reward - reward, []
    for seed in range(5 * _DRAWS):
        prompts, found = drawn(arena, seed, 32)
        rng = np.random.default_rng(1000 + seed)
        rows = np.stack([sample_responses(rng, logps[prompt], 4) for prompt in prompts])
        kls, rewards = (table[prompts[:, None], rows].mean(axis=1) for table in (ratio, arena.rewards))
        regret = found.regret(kls, rewards)
        assert regret is not None and kl < found.largest_kl
        z_scores.append((regret.mean - exact) / regret.stderr)
    assert np.abs(z_scores[:_DRAWS]).max() < 3
    assert 0.8 < np.std(z_scores) < 1.2 and abs(np.mean(z_scores)) < 0.4


def test_the_jackknife_is_that_of_leaving_each_sample_out() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 6))
    scores[2, 4:] = np.nan  # a prompt with fewer known scores
    found = EstimatedFrontier(scores.ravel(), np.repeat([5, 2, 9], 6))
    assert found.prompts.tolist() == [2, 5, 9]
    strength = 0.8

    def reward(row: np.ndarray) -> float:
        weights = np.exp(strength * row)
        return float((weights * row).sum() / weights.sum())

    def log_partition(row: np.ndarray) -> float:
        return float(np.log(np.exp(strength * row).mean()))

    expected: dict[str, list[float]] = {"reward": [], "log_partition": []}
    for row in (scores[1], scores[0], scores[2, :4]):
        for name, estimate in (("reward", reward), ("log_partition", log_partition)):
            less = [estimate(np.delete(row, place)) for place in range(len(row))]
            expected[name].append(len(row) * estimate(row) - (len(row) - 1) * float(np.mean(less)))
    moments = found._moments(strength)
    np.testing.assert_allclose(moments.reward, expected["reward"], rtol=1e-9)
    np.testing.assert_allclose(moments.log_partition, expected["log_partition"], rtol=1e-9)
    kl = strength * np.array(expected["reward"]) - np.array(expected["log_partition"])
    assert found.at(strength).kl == pytest.approx(kl.mean())
    height = np.array(expected["log_partition"]) / strength
    assert found.at(strength).stderr == pytest.approx(height.std(ddof=1) / math.sqrt(3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_unit_of_the_reward_changes_nothing(arena: Arena, scale: float) -> None:
    rng = np.random.default_rng(0)
    scores, prompts = rng.normal(size=40 * 16), np.repeat(np.arange(40), 16)
    plain, scaled = (EstimatedFrontier(unit * scores + 3.0, prompts) for unit in (1.0, scale))
    assert scaled.largest_kl == pytest.approx(plain.largest_kl, rel=1e-2)
    one, other = plain.optimum_at(0.2), scaled.optimum_at(0.2)
    assert one is not None and other is not None
    assert (other.reward - 3.0) / scale == pytest.approx(one.reward - 3.0, rel=1e-3)
    assert other.stderr / scale == pytest.approx(one.stderr, rel=1e-3)


@pytest.mark.filterwarnings("error")
def test_at_no_distance_stands_the_reference_and_below_nothing() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 16))
    frontier = EstimatedFrontier(scores.ravel(), np.repeat(np.arange(20), 16))
    start = frontier.optimum_at(0.0)
    assert start is not None and start.kl == 0 and start.reward == pytest.approx(scores.mean(), abs=1e-5)
    assert frontier.optimum_at(-0.01) == start and frontier.optimum_at(frontier.largest_kl + 1e-9) is None
    own = frontier.regret(np.zeros(20), scores.mean(axis=1))
    assert own is not None and own.mean == pytest.approx(0, abs=1e-5)
    curve = frontier.curve(9)
    assert [point.kl for point in curve] == sorted(point.kl for point in curve) and len(curve) == 9
    assert [point.reward for point in curve] == sorted(point.reward for point in curve)


@pytest.mark.filterwarnings("error")
def test_a_reward_of_one_value_shows_a_frontier_that_is_flat() -> None:
    frontier = EstimatedFrontier(np.full(64, 2.5), np.repeat(np.arange(4), 16))
    assert frontier.largest_kl == pytest.approx(0, abs=1e-9)
    assert {round(point.reward, 9) for point in frontier.curve()} == {2.5}


@pytest.mark.filterwarnings("error")
def test_a_reward_of_two_values_is_shown_to_its_end() -> None:
    """Half of the samples score 1: the best policy gives those alone, at log 2, which 16 samples show."""
    frontier = EstimatedFrontier(np.tile([0.0, 1.0], 8 * 10), np.repeat(np.arange(10), 16))
    end = frontier.curve()[-1]
    assert end.reward == pytest.approx(1.0, abs=1e-6) and end.kl == pytest.approx(math.log(2), abs=0.05)
    assert frontier.optimum_at(3.0) == end
    regret = frontier.regret(np.full(10, 3.0), np.linspace(0.5, 0.95, 10))
    assert regret is not None and regret.mean == pytest.approx(1 - 0.725, abs=1e-6)


def test_no_scores_show_nothing() -> None:
    frontier = EstimatedFrontier(np.array([np.nan, 1.0, np.nan]), np.array([0, 1, 1]))
    assert not len(frontier.prompts) and frontier.curve() == [] and frontier.optimum_at(0.0) is None
    assert frontier.regret(np.zeros(0), np.zeros(0)) is None


def test_more_samples_reach_further(arena: Arena) -> None:
    reached = [drawn(arena, 0, per_prompt)[1].largest_kl for per_prompt in (8, 32, 128)]
    assert reached == sorted(reached) and reached[0] < math.log(8) - 1 + 1e-9
