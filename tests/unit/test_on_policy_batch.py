"""What the on-policy methods learn from, against arithmetic on rollouts that fit on a page."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prefarena.config import GRPOTraining, OnPolicyTraining, PPOTraining, RLOOTraining
from prefarena.methods.on_policy import discover
from prefarena.methods.on_policy.reinforce_pp import ReinforcePPTraining
from prefarena.modeling.logprobs import Sequences
from prefarena.objectives.rollouts import Minibatch
from prefarena.settings.on_policy import CriticTraining
from prefarena.training.experience import Experience
from prefarena.training.on_policy_batch import Batch, experience_metrics, learnable

SIZES = {"rollouts_per_iteration": 4, "group_size": 2}
METHODS: dict[str, OnPolicyTraining] = {
    "ppo": PPOTraining(rollouts_per_iteration=4),
    "grpo": GRPOTraining(**SIZES),
    "rloo": RLOOTraining(**SIZES),
    "reinforce_pp": ReinforcePPTraining(rollouts_per_iteration=4),
}
WITHOUT_GROUPS = ("ppo", "reinforce_pp")


def judged(scores: list[float], finished: list[bool]) -> Experience:
    """One prompt token and two response tokens per row; policy, reference and generator agree."""
    sequences = Sequences.of([[1]] * len(scores), [[3, 4]] * len(scores))
    logps = torch.full((len(scores), 2), -1.0)
    return Experience(
        sequences=sequences,
        generator_logps=logps,
        old_logps=logps,
        reference_logps=logps,
        entropy=torch.ones_like(logps),
        scores=torch.tensor(scores),
        finished=torch.tensor(finished).float(),
        staleness=torch.zeros(len(scores)),
        values=torch.zeros_like(logps),
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_response_cut_off_without_eos_is_worth_less_by_the_penalty(method: str) -> None:
    settings = METHODS[method].model_copy(update={"missing_eos_penalty": 0.75})
    targets = learnable(judged([2.0, 2.0, -1.0, -1.0], [True, False, False, True]), settings, kl_coef=0.3)
    assert targets.rewards.tolist() == [2.0, 1.25, -1.75, -1.0]
    totals = targets.batch.advantages.sum(1)
    assert totals[0] > totals[1] and totals[3] > totals[2]  # what is cut off is learnt away from


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_clipped_on_both_sides(method: str) -> None:
    settings = METHODS[method].model_copy(update={"reward_clip": 1.5})
    targets = learnable(judged([7.0, 1.0, -1.0, -7.0], [True] * 4), settings, kl_coef=0.3)
    assert targets.rewards.tolist() == [1.5, 1.0, -1.0, -1.5]


def test_the_penalty_comes_after_the_clip_and_is_not_clipped_itself() -> None:
    settings = METHODS["rloo"].model_copy(update={"reward_clip": 1.5, "missing_eos_penalty": 1.0})
    targets = learnable(judged([7.0, 7.0, -7.0, -7.0], [True, False, True, False]), settings, kl_coef=0.0)
    assert targets.rewards.tolist() == [1.5, 0.5, -1.5, -2.5]


@pytest.mark.parametrize("method", METHODS)
def test_a_long_response_is_worth_less_whether_it_ended_or_not(method: str) -> None:
    settings = with_settings(method, overlong_penalty=2.0, overlong_tokens=2)
    plain = learnable(ragged([3.0, 1.0, -1.0, 5.0]), with_settings(method), kl_coef=0.0, response_limit=3)
    targets = learnable(ragged([3.0, 1.0, -1.0, 5.0]), settings, kl_coef=0.0, response_limit=3)
    lost = plain.rewards - targets.rewards
    assert lost.tolist() == pytest.approx([0.0, 1.0, 2.0, 1.0])  # of one, two, three and two tokens


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_learnt_from_a_rollout_without_a_score(method: str) -> None:
    """The others learn what they would without it, and its group's mean is of those that have a score."""
    settings = METHODS[method].model_copy(update={} if method in WITHOUT_GROUPS else {"group_size": 3})
    scores, ended = [2.0, 0.0, -1.0, 3.0, 0.0, 0.0], [True] * 6
    silent = torch.tensor([0.0, 1, 0, 0, 1, 1])
    whole = replace(judged(scores, ended), silent=silent)
    targets = learnable(whole, settings, kl_coef=0.3)
    assert not targets.batch.mask[silent > 0].any() and not targets.batch.advantages[silent > 0].any()
    assert torch.isfinite(targets.batch.advantages).all()
    row = experience_metrics(whole, targets, None)
    assert row["reward/num_silent"] == 3 and row["reward/mean"] == pytest.approx(4 / 3)
    assert all(math.isfinite(value) for value in row.values()) and row["response_length"] == 2
    if method in WITHOUT_GROUPS:
        kept = [0, 2, 3]
        alone = learnable(judged([scores[place] for place in kept], [True] * 3), settings, kl_coef=0.3)
    else:
        kept = [0, 2]
        pair = METHODS[method].model_copy(update={"group_size": 2})
        alone = learnable(judged([scores[place] for place in kept], [True] * 2), pair, kl_coef=0.3)
        assert not targets.batch.advantages[3].any()  # alone in its group
    torch.testing.assert_close(targets.batch.advantages[kept], alone.batch.advantages)
    torch.testing.assert_close(targets.batch.weights[kept], alone.batch.weights)


def test_a_watching_judge_that_is_silent_is_left_out_of_its_mean_and_counted() -> None:
    experience = replace(ragged([3.0, 1.0, -1.0, 5.0]), monitor_scores=torch.tensor([1.0, math.nan, 3.0, math.nan]))
    targets = learnable(experience, METHODS["rloo"], kl_coef=0.0)
    row = experience_metrics(experience, targets, None)
    assert (row["reward/judge"], row["reward/judge_num_silent"]) == (2.0, 2)
    silent = replace(experience, monitor_scores=torch.full((4,), math.nan))
    row = experience_metrics(silent, targets, None)
    assert "reward/judge" not in row and row["reward/judge_num_silent"] == 4


def test_a_score_that_is_not_a_number_is_no_silence() -> None:
    """Of a judge that may not be silent it is a fault, which the guard of the optimizer's steps must see."""
    for settings in METHODS.values():
        targets = learnable(judged([2.0, math.nan, 1.0, 0.0], [True] * 4), settings, kl_coef=0.0)
        assert targets.batch.advantages.isnan().any()


#: Of four rollouts with one, two, three and two tokens after a prompt of one; two groups of two.
LENGTHS = [1, 2, 3, 2]
#: log pi - log pi_ref of their tokens, and its sum; log pi - log pi_generator likewise.
KL = [[0.5], [1.0, -0.25], [0.25, 0.25, 0.5], [-1.0, 0.0]]
KL_SUMS = [0.5, 0.75, 1.0, -1.0]
DRIFT = [[0.0], [math.log(2), -math.log(2)], [math.log(4), 0.0, 0.0], [math.log(1.5), math.log(2)]]


def over_tokens(rows: list[list[float]]) -> Tensor:
    """[4, 3], zero outside the responses."""
    return torch.tensor([[*row, *[0.0] * (3 - len(row))] for row in rows])


def ragged(scores: list[float]) -> Experience:
    """Rollouts whose policy, reference and generator differ."""
    sequences = Sequences.of([[1]] * 4, [[3, 4, 5][:length] for length in LENGTHS])
    old_logps = over_tokens([[-2.0] * length for length in LENGTHS])
    return Experience(
        sequences=sequences,
        generator_logps=old_logps - over_tokens(DRIFT),
        old_logps=old_logps,
        reference_logps=old_logps - over_tokens(KL),
        entropy=over_tokens([[0.5 * length] * length for length in LENGTHS]),
        scores=torch.tensor(scores),
        finished=torch.tensor([1.0, 1, 1, 0]),
        staleness=torch.tensor([0.0, 1, 1, 2]),
        values=over_tokens([[0.5], [1.0, 2.0], [0.0, 1.0, -1.0], [3.0, 4.0]]),
    )


def with_settings(method: str, **changed: object) -> OnPolicyTraining:
    return METHODS[method].model_copy(update={"missing_eos_penalty": 0.0, **changed})


def test_grpo_with_the_kl_in_the_loss_compares_scores_and_keeps_the_reference() -> None:
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    targets = learnable(experience, with_settings("grpo", kl_in="loss", normalise_std=False), kl_coef=0.5)
    assert targets.rewards.tolist() == [3, 1, -1, 5]
    torch.testing.assert_close(targets.batch.advantages, over_tokens([[1], [-1, -1], [-3, -3, -3], [3, 3]]))
    assert targets.batch.reference_logps is experience.reference_logps
    assert targets.batch.sequences is experience.sequences
    assert targets.batch.old_logps is experience.old_logps
    torch.testing.assert_close(targets.batch.mask, experience.sequences.response_mask)


def test_grpo_with_the_kl_in_the_reward_takes_it_from_the_scores() -> None:
    settings = with_settings("grpo", kl_in="reward", normalise_std=False)
    targets = learnable(ragged([3.0, 1.0, -1.0, 5.0]), settings, kl_coef=2.0)
    assert targets.rewards.tolist() == [2, -0.5, -3, 7]
    expected = over_tokens([[1.25], [-1.25] * 2, [-5] * 3, [5] * 2])
    torch.testing.assert_close(targets.batch.advantages, expected)
    assert targets.batch.reference_logps is None


def test_grpo_divides_by_the_groups_deviation_where_it_is_told_to() -> None:
    targets = learnable(ragged([3.0, 1.0, -1.0, 5.0]), with_settings("grpo", normalise_std=True), kl_coef=0.5)
    expected = over_tokens([[1], [-1, -1], [-1, -1, -1], [1, 1]])
    torch.testing.assert_close(targets.batch.advantages, expected, rtol=1e-5, atol=0)


def test_rloo_compares_penalised_scores_with_the_others_of_the_group() -> None:
    targets = learnable(ragged([3.0, 1.0, -1.0, 5.0]), with_settings("rloo"), kl_coef=2.0)
    assert targets.rewards.tolist() == [2, -0.5, -3, 7]
    torch.testing.assert_close(targets.batch.advantages, over_tokens([[2.5], [-2.5] * 2, [-10] * 3, [10] * 2]))
    assert targets.batch.reference_logps is None and targets.batch.values is None


def whitened(rows: list[list[float]]) -> Tensor:
    """Less the mean of all tokens, over their population deviation."""
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    mean, deviation = float(flat.mean()), float(flat.std(correction=0))
    return over_tokens([[(value - mean) / deviation for value in row] for row in rows])


def test_reinforce_pp_whitens_the_score_less_the_kl_from_each_token_on() -> None:
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    targets = learnable(experience, with_settings("reinforce_pp"), kl_coef=2.0)
    assert targets.rewards.tolist() == [2, -0.5, -3, 7]
    to_go: list[list[float]] = [
        [2],
        [1 - 2 * 0.75, 1 + 2 * 0.25],
        [-1 - 2 * 1.0, -1 - 2 * 0.75, -1 - 2 * 0.5],
        [5 + 2 * 1.0, 5.0],
    ]
    torch.testing.assert_close(targets.batch.advantages, whitened(to_go), rtol=1e-5, atol=1e-6)
    assert targets.batch.reference_logps is None and targets.batch.values is None


def test_reinforce_pp_with_groups_compares_within_them_and_whitens_over_all() -> None:
    settings = with_settings("reinforce_pp", group_size=2, kl_in="loss")
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    targets = learnable(experience, settings, kl_coef=2.0)
    assert targets.rewards.tolist() == [3, 1, -1, 5]  # the penalty is in the loss
    expected = whitened([[1], [-1, -1], [-3, -3, -3], [3, 3]])
    torch.testing.assert_close(targets.batch.advantages, expected, rtol=1e-5, atol=1e-6)
    assert targets.batch.reference_logps is experience.reference_logps
    in_reward = learnable(experience, with_settings("reinforce_pp", group_size=2), kl_coef=2.0)
    to_go: list[list[float]] = [[0], [-2.5, -0.5], [-5, -4.5, -4], [5, 3]]
    torch.testing.assert_close(in_reward.batch.advantages, whitened(to_go), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_loss", [False, True])
def test_reinforce_pp_adds_the_kl_to_the_clipped_loss_where_it_is_told_to(in_loss: bool) -> None:
    settings = ReinforcePPTraining(kl_in="loss" if in_loss else "reward", clip=0.2)
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    batch = learnable(experience, settings, kl_coef=0.5).batch
    logps, expected = batch.old_logps + 0.1 * batch.mask, 0.0
    ratio = math.exp(0.1)
    for weight, advantage, kl in zip(
        batch.weights[batch.mask], batch.advantages[batch.mask], over_tokens(KL)[batch.mask], strict=True
    ):
        expected -= float(weight * ratio * advantage)  # within the clip
        expected += 0.5 * float(weight) * 0.5 * (float(kl) + 0.1) ** 2 if in_loss else 0.0
    assert float(settings.policy_loss(logps, batch, 0.5).loss.total) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", discover())
def test_losses_of_every_method_are_sums_over_rows(kind: str) -> None:
    """So that micro-batches and workers change nothing: in float64, totals and gradients add up exactly."""
    training = discover()[kind]().training.model_copy(update={"kl_estimator": "k3", "loss_mean": "sequences"})
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 2, 3, 4, 1])
    mask = torch.arange(4) < lengths[:, None]
    tensors = {
        name: torch.randn(6, 4, generator=random, dtype=torch.float64) * mask
        for name in ("old_logps", "advantages", "weights", "reference_logps", "values", "returns")
    }
    logps = torch.randn(6, 4, generator=random, dtype=torch.float64).requires_grad_()

    def loss(rows: slice) -> Tensor:
        part = Minibatch(mask=mask[rows], **{name: tensor[rows] for name, tensor in tensors.items()})
        total = training.policy_loss(logps[rows], part, 0.3).loss.total
        if isinstance(training, CriticTraining):
            total = total + training.value_loss(logps[rows], part).loss.total
        return total

    whole, parts = loss(slice(None)), loss(slice(0, 2)) + loss(slice(2, 5)) + loss(slice(5, 6))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(one, logps)[0] for one in (parts, whole)), rtol=0, atol=1e-12)
    counts = [training.loss_count(mask[rows], 9) for rows in (slice(0, 2), slice(2, 6))]
    assert sum(counts) == training.loss_count(mask, 9) > 0


def test_ppo_learns_whitened_advantages_and_keeps_what_the_critic_needs() -> None:
    """Discount and lambda 1: a return is the sum of the rewards from its token on, an advantage that less the value."""
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    targets = learnable(experience, with_settings("ppo", discount=1.0, gae_lambda=1.0), kl_coef=2.0)
    assert targets.rewards.tolist() == [2, -0.5, -3, 7]
    returns = over_tokens([[2], [-0.5, 1.5], [-3, -2.5, -2], [7, 5]])
    assert targets.batch.returns is not None and targets.batch.values is not None
    torch.testing.assert_close(targets.batch.values, experience.values)
    torch.testing.assert_close(targets.batch.returns, returns)
    inside = experience.sequences.response_mask
    advantages = (returns - targets.batch.values)[inside].double()
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(targets.batch.advantages[inside].double(), white, rtol=1e-5, atol=1e-6)
    assert not targets.batch.advantages[~inside].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_tokens_weight_is_its_truncated_ratio_to_the_generator(method: str) -> None:
    """Ratios are 1; 2, 1/2; 4, 1, 1; 1.5, 2. There is none outside the responses."""
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    expected: dict[float | None, list[list[float]]] = {
        1.75: [[1], [1.75, 0.5], [1.75, 1, 1], [1.5, 1.75]],
        9.0: [[1], [2, 0.5], [4, 1, 1], [1.5, 2]],
        None: [[1], [1, 1], [1, 1, 1], [1, 1]],
    }
    for cap, rows in expected.items():
        targets = learnable(experience, with_settings(method, importance_cap=cap), kl_coef=0.5)
        torch.testing.assert_close(targets.batch.weights, over_tokens(rows))


def test_a_loss_that_is_a_mean_over_sequences_divides_weights_by_their_lengths() -> None:
    settings = with_settings("grpo", importance_cap=9.0, loss_mean="sequences")
    weights = learnable(ragged([3.0, 1.0, -1.0, 5.0]), settings, kl_coef=0.5).batch.weights
    torch.testing.assert_close(weights, over_tokens([[1], [1, 0.25], [4 / 3, 1 / 3, 1 / 3], [0.75, 1]]))


def test_rollouts_of_a_batch_come_in_the_order_asked_for_without_padding_that_none_needs() -> None:
    experience = ragged([3.0, 1.0, -1.0, 5.0])
    for method in METHODS:
        batch = learnable(experience, with_settings(method), kl_coef=0.5).batch
        picked = batch.select(torch.tensor([3, 0]))
        assert len(picked) == 2 and [ids.tolist() for ids in picked.sequences.responses] == [[3, 4], [3]]
        assert picked.sequences.response_lengths.tolist() == [2, 1]
        for name in ("mask", "old_logps", "advantages", "weights", "reference_logps", "values", "returns"):
            whole, part = getattr(batch, name), getattr(picked, name)
            assert (part is None) == (whole is None)
            if whole is not None:
                assert part.tolist() == [whole[3, :2].tolist(), whole[0, :2].tolist()]
        assert isinstance(picked, Batch) and picked.mask.tolist() == [[True, True], [True, False]]


def test_metrics_of_a_rollout_batch_by_hand() -> None:
    experience = replace(ragged([3.0, 1.0, -1.0, 5.0]), monitor_scores=torch.tensor([1.0, 2, 3, 6]))
    targets = learnable(experience, with_settings("ppo", discount=1.0, gae_lambda=1.0), kl_coef=2.0)
    row = experience_metrics(experience, targets, 1.0)
    weights = [1.0, 1.0, 4.0, 3.0]  # of sequences: the products of their tokens' ratios
    k3 = [math.expm1(-kl) + kl for tokens in KL for kl in tokens]
    k3_sums = torch.tensor([k3[0], sum(k3[1:3]), sum(k3[3:6]), sum(k3[6:])], dtype=torch.float64)
    k1_sums = torch.tensor(KL_SUMS, dtype=torch.float64)
    returns = torch.tensor([2, -0.5, 1.5, -3, -2.5, -2, 7, 5], dtype=torch.float64)
    values = torch.tensor([0.5, 1, 2, 0, 1, -1, 3, 4], dtype=torch.float64)
    assert row == {
        "reward/mean": 2.0,
        "reward/penalised": pytest.approx(5.5 / 4),
        "reward/judge": 3.0,
        "entropy": pytest.approx((0.5 + 1 + 1 + 1.5 * 3 + 1 + 1) / 8),
        "logp_gap/mean": pytest.approx((4 * math.log(2) + math.log(2) + math.log(1.5)) / 8),
        "logp_gap/max": pytest.approx(math.log(4)),
        "response_length": 2.0,
        "truncation_rate": 0.25,
        "staleness": 1.0,
        "importance/ess": pytest.approx(sum(weights) ** 2 / (4 * sum(weight**2 for weight in weights))),
        "importance/capped": pytest.approx(4 / 8),  # 2, 4, 1.5 and 2; those of 1 are at the cap and not above it
        "kl/k1": pytest.approx(float(k1_sums.mean())),
        "kl/k1_stderr": pytest.approx(float(k1_sums.std() / 2)),
        "kl/k3": pytest.approx(float(k3_sums.mean()), rel=1e-5),
        "kl/k3_stderr": pytest.approx(float(k3_sums.std() / 2), rel=1e-5),
        "value/explained_variance": pytest.approx(
            float(1 - (returns - values).var(correction=0) / returns.var(correction=0))
        ),
    }
    uncapped = experience_metrics(experience, learnable(experience, with_settings("rloo"), kl_coef=0.0), None)
    assert uncapped["importance/capped"] == 0 and "value/explained_variance" not in uncapped
