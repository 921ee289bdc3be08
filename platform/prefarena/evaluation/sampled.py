"""Estimates from samples, for tasks whose responses cannot be listed.

N samples, each with the index of its prompt; samples of one prompt hang together, so every standard error is
clustered by prompt. KL estimates hold for the distribution that was sampled: log-probs must be at the sampling
temperature. Nats and tokens are per sequence, eos counted.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from prefarena.data.plan import bounded_passes, largest_scored
from prefarena.evaluation.statistics import Estimate, clustered, mean_and_stderr
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.records import Rollout


def clusters_of(prompts: list[list[int]]) -> np.ndarray:
    """The index [N] of each of N prompts among the different ones, in order of first appearance."""
    order: dict[tuple[int, ...], int] = {}
    return np.array([order.setdefault(tuple(prompt), len(order)) for prompt in prompts], dtype=np.int64)


def prompt_clusters(rollouts: list[Rollout]) -> np.ndarray:
    """The index [N] of each rollout's prompt among the different prompts."""
    return clusters_of([rollout.prompt_ids for rollout in rollouts])


@torch.no_grad()
def response_logps(
    model: PreTrainedModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    pad_id: int,
    batch_size: int,
    temperature: float = 1.0,
) -> np.ndarray:
    """log pi(y|x) [N], by the trainer's own code.

    Passes are of sequences of similar length: at most `batch_size` of them, and as many tokens as
    `largest_scored` or one sequence.
    """
    module, logps = LogProbs(model), np.empty(len(prompts))
    there = torch.empty(len(prompts), dtype=torch.float64, device=model.device)
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], np.int64)
    passes = bounded_passes(lengths, batch_size, largest_scored(model.device.type))
    start = 0
    for rows in passes:
        found, _ = sequence_logps(
            module,
            [prompts[i] for i in rows],
            [[responses[i]] for i in rows],
            temperature=temperature,
            device=model.device,
            pad_id=pad_id,
        )
        there[start : start + len(rows)] = found
        start += len(rows)
    # Once: every copy to the host waits for all that came before.
    logps[np.concatenate(passes) if passes else []] = there.cpu().numpy()
    return logps


def kl_estimates(logps: np.ndarray, ref_logps: np.ndarray, clusters: np.ndarray) -> tuple[Estimate, Estimate]:
    """KL(pi || pi_ref) from samples of pi: the k1 and the k3 estimator, both unbiased.

    k1 is the mean of d = log pi - log pi_ref and may come out negative; k3 the mean of exp(-d) - 1 + d, which cannot,
    and spreads less where the policies are close. Far from the reference k3 is heavy-tailed, and its standard error too
    small: rely on k1 there.
    """
    ratio = np.subtract(logps, ref_logps, dtype=np.float64)
    return clustered(ratio, clusters), clustered(np.expm1(-ratio) + ratio, clusters)


def k1_and_k3(logps: np.ndarray, ref_logps: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """`kl_estimates` as `kl` and `kl_k3`, each with its `_stderr`."""
    k1, k3 = kl_estimates(logps, ref_logps, clusters)
    return _named("kl", k1) | _named("kl_k3", k3)


def divergence_metrics(
    along: np.ndarray, clusters: np.ndarray, beside: np.ndarray, ref_clusters: np.ndarray
) -> dict[str, float]:
    """kl_vocabulary, KL(pi || pi_ref), and forward_kl, KL(pi_ref || pi), each with its `_stderr`.

    Means of sums over positions that are exact over the vocabulary (`divergence.along_samples`): `along` [N] samples of
    the policy, `beside` [M] samples of the reference. Both unbiased. Without samples there is no estimate.
    """
    row: dict[str, float] = {}
    for name, values, own in (("kl_vocabulary", along, clusters), ("forward_kl", beside, ref_clusters)):
        if len(values):
            row |= _named(name, clustered(values, own))
    return row


def demonstration_metrics(logps: np.ndarray, ref_logps: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """How likely held-out demonstrations [N] are to the policy, nats per sequence, and what training changed about it.

    demonstration_logp: mean log pi(y|x); demonstration_gain: mean log pi(y|x) - log pi_ref(y|x), paired, so that its
    error is not that of how likely one demonstration is beside another.
    """
    gain = np.subtract(logps, ref_logps, dtype=np.float64)
    found = {"demonstration_logp": clustered(logps, clusters), "demonstration_gain": clustered(gain, clusters)}
    return {key: value for name, estimate in found.items() for key, value in _named(name, estimate).items()}


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_stderr": estimate.stderr}


def sampled_metrics(
    rollouts: list[Rollout], logps: np.ndarray | None, ref_logps: np.ndarray | None, scores: np.ndarray | None
) -> dict[str, float]:
    """Every estimate for one policy from its rollouts, whose `logps`, `ref_logps` and judge `scores` are [N].

    kl (k1), kl_k3, judge_score, response_length and truncation_rate (share cut off at the limit), each with its
    `_stderr`. Without log-probs (best-of-n, whose own probabilities nobody knows) there are no KLs. Rollouts that the
    judge is silent about (nan) are left out of its score and counted as `num_silent`, beside `num_judged`;
    without any score there is no mean. `scores` is None where the judge gives none.
    """
    clusters = prompt_clusters(rollouts)
    estimates = {
        "response_length": clustered([len(rollout.response_ids) for rollout in rollouts], clusters),
        "truncation_rate": clustered([not rollout.finished for rollout in rollouts], clusters),
    }
    row: dict[str, float] = {}
    if logps is not None and ref_logps is not None:
        row = k1_and_k3(logps, ref_logps, clusters)
    if scores is not None:
        judged = ~np.isnan(scores)
        row |= {"num_judged": int(judged.sum()), "num_silent": int((~judged).sum())}
        if judged.any():
            estimates["judge_score"] = clustered(scores[judged], clusters[judged])
    for name, estimate in estimates.items():
        row |= _named(name, estimate)
    return row


def score_metrics(name: str, scores: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of scores [N] as `name`, with its `_stderr`. Silence (nan) is left out; empty without any score."""
    known = ~np.isnan(scores)
    return _named(name, clustered(scores[known], clusters[known])) if known.any() else {}


def win_rate(
    scores: np.ndarray, clusters: np.ndarray, other_scores: np.ndarray, other_clusters: np.ndarray
) -> Estimate:
    """P(score > other's score) + P(equal) / 2, paired by prompt, with its standard error over prompts.

    On each prompt every sample [N] of one policy meets every sample [M] of the other; prompts weigh alike. Cluster
    labels name prompts and must mean the same in both. Pairs in which a response has no score (nan) are left out, and
    so is a prompt that has no other pairs; where none is left, rate and error are nan. Raises ValueError when the
    prompts differ.
    """
    prompts = np.unique(clusters)
    if not np.array_equal(prompts, np.unique(other_clusters)):
        raise ValueError("win rates are paired by prompt, but the two policies answered different prompts")
    known, other_known = ~np.isnan(scores), ~np.isnan(other_scores)
    shares = []
    for prompt in prompts:
        own = scores[(clusters == prompt) & known]
        others = other_scores[(other_clusters == prompt) & other_known]
        if len(own) and len(others):
            shares.append((np.sign(own[:, None] - others).mean() + 1) / 2)
    return mean_and_stderr(shares) if shares else Estimate(float("nan"), float("nan"))


def win_matrix(scores: list[np.ndarray], clusters: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates [K, K] between K policies (row beats column) and their standard errors; the diagonal is 1/2 ± 0."""
    number = len(scores)
    rates, errors = np.full((number, number), 0.5), np.zeros((number, number))
    for i in range(number):
        for j in range(i + 1, number):
            estimate = win_rate(scores[i], clusters[i], scores[j], clusters[j])
            rates[i, j], rates[j, i] = estimate.mean, 1 - estimate.mean
            errors[i, j] = errors[j, i] = estimate.stderr
    return rates, errors
