"""Do the KL estimates that on-policy training logged agree with the exact KL of the policies that were sampled?

The rollouts of iteration i + 1 are drawn from the policy after i updates. So the exact KL of the snapshot of step i
belongs to the estimates in the metric row of step i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

ESTIMATORS = ("k1", "k3")


def kl_agreement(
    trajectory: Iterable[Mapping[str, float]], metrics: Iterable[Mapping[str, float]]
) -> list[dict[str, float]]:
    """One row for each policy that was both enumerated and sampled from; nats a sequence.

    `trajectory` rows hold `step` (updates done) and `kl`, the exact mean KL over the prompts that are sampled on;
    `metrics` rows are those of the training. Rows returned: `step`, `exact`, and for k1 and k3 the estimate `k1`, its
    standard error `k1_stderr` over sequences, and `k1_z` = (estimate - exact) / standard error.

    An iteration whose rollouts are older than its weights (`staleness` above 0) samples another policy than the
    snapshot and is left out, and so is an estimate without an error (the start, where every ratio is 1).

    The error treats the rollouts as independent draws of prompt and response. Where an iteration uses every prompt
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
                row |= {name: estimate, f"{name}_stderr": stderr, f"{name}_z": (estimate - policy["kl"]) / stderr}
        if len(row) > 2:
            found.append(row)
    return found
