"""Divergences along samples, exact over the vocabulary, against the exact values of an enumerable language."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_model, save_model
from test_sampled import SIZES, TASK, Arena
from transformers import PreTrainedModel

from prefarena.evaluation import divergence
from prefarena.evaluation.divergence import Samples, along_samples
from prefarena.evaluation.enumeration import Enumeration
from prefarena.evaluation.exact import Frontier, exact_metrics
from prefarena.evaluation.sampled import demonstration_metrics, divergence_metrics
from prefarena.evaluation.statistics import Estimate, clustered
from prefarena.modeling.arithmetic import in_weights
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.tasks.language import PAD_ID, unpadded
from prefarena.tasks.pairs import sample_responses

_DRAWS = 20


class Held:
    """A policy that counts how often its weights were read and with which others they were there together."""

    def __init__(self, model: PreTrainedModel, together: list[Held]) -> None:
        self.model, self.loaded, self.num_loads, self.together = model, False, 0, together
        together.append(self)

    def module(self) -> LogProbs:
        if not self.loaded:
            self.loaded, self.num_loads = True, self.num_loads + 1
        self.most_together = sum(one.loaded for one in self.together)
        return LogProbs(self.model)

    def release(self) -> None:
        self.loaded = False


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena"))


@pytest.fixture(scope="module")
def along(arena: Arena) -> np.ndarray:
    """[4, P, N]: the two sums along every response to every prompt, and its log-probs."""
    every = [unpadded(row) for row in arena.exact[0].sequences]
    prompts = [prompt for prompt in arena.language.prompt_ids for _ in every]
    held: list[Held] = []
    found = along_samples(
        Held(arena.models[1], held), Held(arena.models[0], held), samples_of(prompts, every * TASK.num_prompts)
    )
    return found.T.reshape(4, TASK.num_prompts, len(every))


def samples_of(prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0) -> Samples:
    return Samples(prompts, responses, PAD_ID, 64, temperature)


def test_the_sums_along_all_responses_are_the_exact_divergences(arena: Arena, along: np.ndarray) -> None:
    """Unbiased: weighed by the probability of each response they add up to KL(pi || ref), and to KL(ref || pi)."""
    ref, policy = arena.exact
    exact = exact_metrics(policy.logps, ref.logps, arena.rewards, arena.language.covered, ref.lengths)
    assert (np.exp(policy.logps) * along[0]).sum(1).mean() == pytest.approx(exact["kl/all"], abs=1e-5)
    assert (np.exp(ref.logps) * along[1]).sum(1).mean() == pytest.approx(exact["forward_kl/all"], abs=1e-5)
    assert exact["kl/all"] > 0.5 and along[:2].min() > 0


def test_log_probs_of_the_same_passes_are_the_exact_ones(arena: Arena, along: np.ndarray) -> None:
    for logps, exact in zip(along[2:], reversed(arena.exact), strict=True):
        np.testing.assert_allclose(logps, exact.logps, atol=1e-5)


def test_each_position_is_taken_at_the_temperature_of_sampling(arena: Arena) -> None:
    prompt = arena.language.prompt_ids[0]
    held: list[Held] = []
    first, second = (Held(model, held) for model in reversed(arena.models))
    found = along_samples(first, second, samples_of([prompt], [[2]], 0.5))
    with torch.no_grad():
        ids = torch.tensor([prompt])
        p, q = ((model(input_ids=ids).logits[0, -1] / 0.5).log_softmax(-1) for model in reversed(arena.models))
    expected = [float((p.exp() * (p - q)).sum()), float((q.exp() * (q - p)).sum())]
    np.testing.assert_allclose(found[0], [*expected, float(p[2]), float(q[2])], atol=1e-5)


def test_one_model_is_held_at_a_time_whatever_fits_on_the_host(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts, _ = arena.sample(arena.exact[1], 3, seed=0)
    samples = samples_of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    found = []
    for most_tokens in (10_000, 20):
        monkeypatch.setattr(divergence, "_MOST_NUMBERS", most_tokens * SIZES["hidden_size"])
        together: list[Held] = []
        held = [Held(model, together) for model in reversed(arena.models)]
        found.append(along_samples(held[0], held[1], samples))
        assert max(one.most_together for one in held) == 1
        assert (held[0].num_loads > 1) == (most_tokens == 20)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("most_logits", [1 << 25, 40])
def test_a_head_that_is_more_than_a_linear_map_has_the_same_divergences(
    monkeypatch: pytest.MonkeyPatch, most_logits: int
) -> None:
    """Gemma 2 caps its logits: they are taken whole, a few responses at a time."""
    monkeypatch.setattr(divergence, "_MOST_LOGITS", most_logits)
    models = [random_model("gemma2", final_logit_softcapping=2.0), random_model("gemma2", initializer_range=0.3)]
    prompt, responses = [1, 4], [[5, 6, 2], [7], [8, 9, 10, 2]]
    held: list[Held] = []
    first, second = (Held(model, held) for model in models)
    assert not first.module().plain_head
    found = along_samples(first, second, samples_of([prompt] * 3, responses))
    for response, sums in zip(responses, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + response])
            p, q = (model(input_ids=ids).logits[0, 1:-1].log_softmax(-1) for model in models)
            given = [float(one[torch.arange(len(response)), torch.tensor(response)].sum()) for one in (p, q)]
        np.testing.assert_allclose(sums[2:], given, atol=1e-5)
        assert sums[0] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert sums[1] == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-5)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_a_policy_that_is_its_reference_is_exactly_0_away(arena: Arena, tmp_path: Path, arithmetic: str) -> None:
    folder = save_model(tmp_path / "policy", random_model("llama"))
    held: list[Held] = []
    first, second = (
        Held(in_weights(load_policy(folder), "bfloat16" if arithmetic == "bfloat16" else "float32"), held)
        for _ in range(2)
    )
    rollouts, _ = arena.sample(arena.exact[1], 2, seed=0)
    samples = samples_of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    found = along_samples(first, second, samples)
    assert (found[:, :2] == 0).all() and (found[:, 2] == found[:, 3]).all()


# -------------------------------------------------------------------------------------------- estimates


def drawn(
    policy: Enumeration, values: np.ndarray, seed: int, num_prompts: int = 40, per_prompt: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [M] of samples of a policy on prompts that are drawn too, their responses, and clusters; values [P, N]."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(len(values), size=num_prompts)
    rows = np.stack([sample_responses(rng, policy.logps[prompt], per_prompt) for prompt in prompts])
    return values[prompts[:, None], rows].ravel(), rows.ravel(), np.repeat(np.arange(num_prompts), per_prompt)


def within_three(estimates: list[Estimate], exact: float) -> bool:
    return all(abs(found.mean - exact) < 3 * found.stderr for found in estimates)


def test_twenty_draws_of_each_divergence_agree_with_the_exact_values(arena: Arena, along: np.ndarray) -> None:
    ref, policy = arena.exact
    exact = exact_metrics(policy.logps, ref.logps, arena.rewards, arena.language.covered, ref.lengths)
    kls, forward = [], []
    for seed in range(_DRAWS):
        own, _, clusters = drawn(policy, along[0], seed)
        others, _, ref_clusters = drawn(ref, along[1], _DRAWS + seed)
        row = divergence_metrics(own, clusters, others, ref_clusters)
        kls.append(Estimate(row["kl_vocabulary"], row["kl_vocabulary_stderr"]))
        forward.append(Estimate(row["forward_kl"], row["forward_kl_stderr"]))
    assert within_three(kls, exact["kl/all"]) and within_three(forward, exact["forward_kl/all"])


def test_its_standard_error_is_at_most_half_of_k1s_at_equal_samples(arena: Arena, along: np.ndarray) -> None:
    """At the two samples per prompt that an evaluation draws by default; given the prompts it is a third.

    With many samples per prompt what is left of both is how much prompts differ, which no estimator takes away.
    """
    ref, policy = arena.exact
    ratio, errors = policy.logps - ref.logps, []
    for seed in range(_DRAWS):
        own, rows, clusters = drawn(policy, along[0], seed, num_prompts=128, per_prompt=2)
        k1_values, same, _ = drawn(policy, ratio, seed, num_prompts=128, per_prompt=2)
        np.testing.assert_array_equal(rows, same)
        errors.append((clustered(own, clusters).stderr, clustered(k1_values, clusters).stderr))
    own_error, k1_error = np.sqrt((np.array(errors) ** 2).mean(axis=0))
    assert own_error < 0.5 * k1_error
    assert within_prompts(policy, along[0]) < 0.36 * within_prompts(policy, ratio)


def test_near_the_reference_nearly_all_of_k1s_noise_is_gone(arena: Arena) -> None:
    """Of the optimum at 0.03, 0.4 and 1.1 nats, listed: the nearer, the smaller the share that is left."""
    ref, shares = arena.exact[0], []
    for inverse_temperature in (0.25, 1.0, 2.0):
        logps = Frontier(ref.logps, arena.rewards).logps(inverse_temperature)
        optimum = Enumeration(ref.responses, logps)
        sums = listed_sums(optimum, ref)
        assert (np.exp(logps) * sums).sum() == pytest.approx((np.exp(logps) * (logps - ref.logps)).sum())
        shares.append(within_prompts(optimum, sums) / within_prompts(optimum, logps - ref.logps))
    assert shares[0] < 0.03 and shares[1] < 0.15 and shares[2] < 0.3


def within_prompts(policy: Enumeration, values: np.ndarray) -> float:
    """The exact standard deviation of one sample's value given its prompt; values [P, N]."""
    probabilities = np.exp(policy.logps)
    means = (probabilities * values).sum(axis=1, keepdims=True)
    return float(np.sqrt((probabilities * (values - means) ** 2).sum(axis=1).mean()))


def listed_sums(policy: Enumeration, other: Enumeration) -> np.ndarray:
    """[P, N]: the sum over positions of KL(policy || other) along each response, from the probabilities alone."""
    sequences, lengths = policy.sequences, policy.lengths
    found = np.zeros_like(policy.logps)
    for length in range(sequences.shape[1]):
        before = np.unique(sequences[:, :length], axis=0, return_inverse=True)[1].ravel() if length else 0 * lengths
        after = np.unique(sequences[:, : length + 1], axis=0, return_inverse=True)[1].ravel()
        for prompt in range(len(found)):
            chances = [np.exp(one.logps[prompt]) for one in (policy, other)]
            nexts = [np.bincount(after, weights=p)[after] / np.bincount(before, weights=p)[before] for p in chances]
            ratio = np.where(lengths > length, np.log(nexts[0] / nexts[1]), 0.0)
            total = np.bincount(before, weights=chances[0] * ratio) / np.bincount(before, weights=chances[0])
            found[prompt] += np.where(lengths > length, total[before], 0.0)
    return found


def test_twenty_draws_of_held_out_demonstrations_agree_with_the_exact_likelihood(arena: Arena) -> None:
    """Demonstrations are the source's; what is estimated is the policy's cross-entropy with it, and what it gained."""
    ref, policy = arena.exact
    source = Enumeration(policy.responses, arena.language.source_logps(policy.sequences))
    assert np.exp(source.logps).sum(1) == pytest.approx(1)
    exact = {
        "demonstration_logp": float((np.exp(source.logps) * policy.logps).sum(1).mean()),
        "demonstration_gain": float((np.exp(source.logps) * (policy.logps - ref.logps)).sum(1).mean()),
    }
    estimates: dict[str, list[Estimate]] = {name: [] for name in exact}
    for seed in range(_DRAWS):
        own, rows, clusters = drawn(source, policy.logps, 100 + seed, per_prompt=2)
        others, same, _ = drawn(source, ref.logps, 100 + seed, per_prompt=2)
        np.testing.assert_array_equal(rows, same)
        row = demonstration_metrics(own, others, clusters)
        for name in exact:
            estimates[name].append(Estimate(row[name], row[f"{name}_stderr"]))
    for name, value in exact.items():
        assert within_three(estimates[name], value), name
