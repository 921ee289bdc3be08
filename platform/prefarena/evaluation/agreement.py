"""Do the KL estimates that on-policy training logged agree with the exact KL of the policies that were sampled?

The rollouts of iteration i + 1 are drawn from the policy after i updates. So the exact KL of the snapshot of step i
belongs to the estimates in the metric row of step i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from prefarena.evaluation.enumeration import Responses
from prefarena.objectives.kl import LOG_RATIO_LIMIT

ESTIMATORS = ("k1", "k3")


def estimator_spread(responses: Responses, logps: np.ndarray, ref_logps: np.ndarray) -> dict[str, float]:
    """`k1_std` and `k3_std`: the exact standard deviation, in nats, of one sequence's estimate of the KL.

    Each is the sum over tokens that training logs, of a prompt drawn from the P given and a response drawn from the
    policy; `logps`, `ref_logps` [P, N]. A sample's own standard error misses the tail of k3, which this does not.
    """
    probabilities = np.exp(logps)
    sums = {name: np.zeros_like(logps) for name in ESTIMATORS}
    before = np.zeros_like(logps), np.zeros_like(ref_logps)  # log-probs of the prefix so far, under each
    for length in range(1, responses.limit + 1):
        prefix = np.unique(responses.sequences[:, :length], axis=0, return_inverse=True)[1].ravel()
        after = _prefix_logps(probabilities, prefix), _prefix_logps(np.exp(ref_logps), prefix)
        k1 = (after[0] - before[0]) - (after[1] - before[1])  # of the token at this place
        negative = np.clip(-k1, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        inside = responses.lengths >= length
        sums["k1"] += np.where(inside, k1, 0.0)
        sums["k3"] += np.where(inside, np.expm1(negative) - negative, 0.0)
        before = after
    weights = probabilities / probabilities.sum()
    means = {name: float((weights * value).sum()) for name, value in sums.items()}
    return {f"{name}_std": float(np.sqrt((weights * (value - means[name]) ** 2).sum())) for name, value in sums.items()}


def _prefix_logps(probabilities: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """[P, N] log-probs of each response's prefix: the responses that share it, together. `prefix` [N] numbers them.

    They are finite: a probability of 0 counts as the least that there is.
    """
    sums = np.stack([np.bincount(prefix, weights=row) for row in probabilities])
    return np.log(np.maximum(sums, np.finfo(np.float64).tiny))[:, prefix]


def kl_agreement(
    trajectory: Iterable[Mapping[str, float]], metrics: Iterable[Mapping[str, float]], num_rollouts: int
) -> list[dict[str, float]]:
    """One row for each policy that was both enumerated and sampled from; nats per sequence.

    `trajectory` rows hold `step` (updates done), `kl`, the exact mean KL over the prompts that are sampled on, and of
    `estimator_spread` k1_std and k3_std; `metrics` rows are those of the training, each from `num_rollouts`. Rows
    returned: `step`, `exact`, and for k1 and k3 the estimate `k1`, the standard error `k1_stderr` that was logged with
    it, the true one `k1_exact_stderr` = k1_std / sqrt(num_rollouts), and `k1_z` = (estimate - exact) / true error.

    An iteration whose rollouts are older than its weights (`staleness` above 0) samples another policy than the
    snapshot and is left out, and so is an estimate without an error (the start, where every ratio is 1).

    Both errors treat the rollouts as independent draws of prompt and response. Where an iteration uses every prompt
    equally often, prompts are strata: their differences are in the error but not in the estimate, which makes z too
    small rather than too large. Where it uses a part of the prompts, the error is that of a random part.
    """
    sampled = {int(row["step"]): row for row in metrics}
    found = []
    for policy in trajectory:
        logged = sampled.get(int(policy["step"]) + 1)
        if logged is None or logged.get("staleness", 0.0) > 0:
            continue
        row = {"step": policy["step"], "exact": policy["kl"]}
        for name in ESTIMATORS:
            estimate, stderr = logged.get(f"kl/{name}"), logged.get(f"kl/{name}_stderr")
            if estimate is not None and stderr:
                true = policy[f"{name}_std"] / num_rollouts**0.5
                row |= {name: estimate, f"{name}_stderr": stderr, f"{name}_exact_stderr": true}
                row[f"{name}_z"] = (estimate - policy["kl"]) / true
        if len(row) > 2:
            found.append(row)
    return found
