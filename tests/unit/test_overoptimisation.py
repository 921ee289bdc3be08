"""Gao's laws of over-optimisation: on curves that follow them, on noisy ones, and on the language."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from test_sampled import Arena

from prefarena.evaluation.best_of_n import best_of_n_logps
from prefarena.report.html import write_page
from prefarena.report.overoptimisation import Law, fit_law, fits, law_line, law_table
from prefarena.report.page import write_report
from prefarena.report.results import EntryResult, Results
from prefarena.report.significance import student_quantile

_DRAWS = 20
_NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)
LAWS: tuple[Law, ...] = ("best of n", "learning")


def gain(law: Law, kl: float, alpha: float, beta: float) -> float:
    d = math.sqrt(kl)
    if d == 0:
        return 0.0
    return d * (alpha - beta * d) if law == "best of n" else d * (alpha - beta * math.log(d))


def curve(
    law: Law, alpha: float, beta: float, noise: np.ndarray | float = 0.0, start: float = 0.3
) -> list[dict[str, float]]:
    """Twelve policies on a law, and the reference before them, whose reward is `start`."""
    kls = np.linspace(0, 3, 13) ** 2
    errors = np.broadcast_to(noise, 12)
    rows = [{"step": 0.0, "kl": 0.0, "reward": start}]
    for place, kl in enumerate(kls[1:]):
        rows.append(
            {"step": place + 1.0, "kl": float(kl), "reward": start + gain(law, kl, alpha, beta) + errors[place]}
        )
    return rows


@pytest.mark.parametrize("law", LAWS)
def test_a_curve_on_a_law_has_its_parameters_and_its_peak(law: Law) -> None:
    found = fit_law(law, [curve(law, 1.2, 0.4)])
    assert found is not None
    assert (found.alpha.value, found.beta.value) == pytest.approx((1.2, 0.4))
    assert found.residual == pytest.approx(0, abs=1e-12) and found.num_points == 12 and found.largest_kl == 9.0
    for kl in (0.0, 0.5, 4.0):
        assert found.at(kl) == pytest.approx(gain(law, kl, 1.2, 0.4))
    peak = fit_law(law, [curve(law, 1.2, 0.6)])
    assert peak is not None and peak.peak is not None
    kl, height = peak.peak
    assert kl == pytest.approx(1.0 if law == "best of n" else math.exp(2 * (1.2 / 0.6 - 1)))
    assert height == pytest.approx(peak.at(kl)) and height > max(peak.at(0.98 * kl), peak.at(1.02 * kl))


@pytest.mark.parametrize("law", LAWS)
def test_a_peak_far_beyond_what_was_measured_is_none(law: Law) -> None:
    for beta in (0.001, 0.0, -0.3):
        found = fit_law(law, [curve(law, 1.2, beta)])
        assert found is not None and found.peak is None


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(law: Law, num_seeds: int) -> None:
    rng, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        found = fit_law(law, [curve(law, 1.2, 0.4, 0.05 * rng.normal(size=12)) for _ in range(num_seeds)])
        assert found is not None
        for place, (interval, truth) in enumerate(((found.alpha, 1.2), (found.beta, 0.4))):
            assert interval.low is not None and interval.high is not None
            held[place] += interval.low < truth < interval.high
    assert ((held / 400 > 0.92) & (held / 400 < 0.98)).all()


def test_too_few_policies_have_no_law() -> None:
    assert fit_law("learning", [curve("learning", 1, 0.1)[:4]]) is None
    assert fit_law("learning", [curve("learning", 1, 0.1), curve("learning", 1, 0.1)[:3]]) is None
    assert fit_law("learning", []) is None and fit_law("learning", [[]]) is None
    same = [{"step": float(s), "kl": 1.0, "reward": 0.5} for s in range(6)]
    assert fit_law("best of n", [same]) is None  # at one distance nothing is told apart


def test_of_several_seeds_three_policies_each_are_enough() -> None:
    """Their interval is that over seeds, not of what is left of one curve."""
    found = fit_law("learning", [curve("learning", 1.0, 0.1)[:4], curve("learning", 1.2, 0.1)[:4]])
    assert found is not None and found.num_points == 6
    assert found.alpha.value == pytest.approx(1.1) and found.beta.value == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------ the language


def listed(arena: Arena, own: np.ndarray) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """The exact curve of the best of ever more samples by a reward [P, N], and each one's probabilities."""
    ref, rows, policies = arena.exact[0].logps, [], []
    for number in _NUMBERS:
        logps = best_of_n_logps(ref, own, number)
        policies.append(np.exp(logps))
        kl, reward = ((policies[-1] * values).sum(1).mean() for values in (logps - ref, arena.rewards))
        rows.append({"step": float(number), "kl": float(kl), "reward": float(reward)})
    return rows, policies


def test_on_the_language_the_best_of_n_follows_its_law_better_than_the_other(tmp_path: Path) -> None:
    """By the gold reward and by a proxy that is as much noise as reward: to two per cent of what is gained."""
    arena = Arena(tmp_path)
    noise = np.random.default_rng(0).normal(size=arena.rewards.shape)
    for own in (arena.rewards, arena.rewards + noise):
        rows, _ = listed(arena, own)
        found, other = (fit_law(law, [rows]) for law in LAWS)
        assert found is not None and other is not None
        assert found.residual < 0.02 * (rows[-1]["reward"] - rows[0]["reward"]) and found.residual < other.residual


def test_twenty_draws_agree_with_the_law_of_the_exact_curve(tmp_path: Path) -> None:
    """Gold rewards measured on 1,000 samples of each best-of-n policy, through which the law is fitted."""
    arena = Arena(tmp_path)
    rows, policies = listed(arena, arena.rewards + np.random.default_rng(0).normal(size=arena.rewards.shape))
    exact = fit_law("best of n", [rows])
    assert exact is not None
    for seed in range(_DRAWS):
        rng, drawn = np.random.default_rng(seed), [rows[0]]
        for row, policy in zip(rows[1:], policies[1:], strict=True):
            prompts = np.resize(np.arange(len(policy)), 1000)  # every prompt equally often
            chosen = [rng.choice(policy.shape[1], p=policy[p] / policy[p].sum()) for p in prompts]
            drawn.append(row | {"reward": float(arena.rewards[prompts, chosen].mean())})
        found = fit_law("best of n", [drawn])
        assert found is not None
        for own, truth in ((found.alpha, exact.alpha.value), (found.beta, exact.beta.value)):
            assert own.high is not None
            stderr = (own.high - own.value) / student_quantile(found.num_points - 2)
            assert abs(own.value - truth) < 3 * stderr, seed


# ---------------------------------------------------------------------------------------------- report


def results() -> Results:
    """One entry that learns, on its law; one that draws; one that was measured at its end alone."""
    names = ("rlhf", "best-of-8", "dpo")
    row = {
        "reward/covered": 1.0,
        "kl/covered": 2.0,
        "regret/covered": 0.1,
        "kl/uncovered": 1.0,
        "reward/uncovered": 0.2,
    }
    kinds = ("rlhf", "best_of_n", "dpo")
    entries = [EntryResult(name="reference", kind="reference", seeds={"0": dict.fromkeys(row, 0.0)})]
    entries += [EntryResult(name=n, kind=k, seeds={"0": row}) for n, k in zip(names, kinds, strict=True)]
    extra = {"frontier_reward": 3.0, "regret": 0.5, "entropy": 1.0}
    learned = [point | extra for point in curve("learning", 1.2, 0.6)]
    return Results(
        name="laws",
        task={"kind": "language"},
        seeds=[0],
        exact=True,
        entries=entries,
        trajectories={"rlhf": {"0": learned}},
        best_of_curves={"best-of-8": {"0": curve("best of n", 1.0, 0.25)}},
    )


def test_the_report_shows_each_law_with_its_interval_and_peak(tmp_path: Path) -> None:
    found = results()
    assert {name: fit.law for name, fit in fits(found).items()} == {"rlhf": "learning", "best-of-8": "best of n"}
    table = law_table(found)
    assert table is not None
    assert table.rows[0][:4] == ("rlhf", "d(α − β log d)", "1.200 [1.200, 1.200]", "0.600 [0.600, 0.600]")
    assert table.rows[0][4:] == ("7.39", "1.631", "0.000", "12")
    assert table.rows[1][1:2] == ("d(α − βd)",) and table.rows[1][4:6] == ("4.00", "1.000")
    for text in (write_report(found, tmp_path).read_text(encoding="utf-8"), write_page(found, tmp_path).read_text()):
        assert "Laws of over-optimisation" in text and "arXiv 2210.10760" in text and "1.200 [1.200, 1.200]" in text
    line = law_line(found, found.entry("rlhf"))
    assert line is not None and line.shape == (60, 2)
    assert line[0].tolist() == pytest.approx([0.0, 0.3]) and line[-1, 1] == pytest.approx(
        0.3 + gain("learning", 9, 1.2, 0.6)
    )
    assert law_line(found, found.entry("dpo")) is None


def test_without_policies_on_the_way_there_is_no_table() -> None:
    found = results()
    found.trajectories, found.best_of_curves = {}, {}
    assert law_table(found) is None
