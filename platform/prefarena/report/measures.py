"""On text: how far policies are from the reference, by every estimate that there is."""

from __future__ import annotations

from prefarena.report.results import Results, aggregate, kl_key
from prefarena.report.tables import Table, plus_minus

#: Heading and key of a row.
_COLUMNS = {
    "KL": "kl_vocabulary",
    "k1": "kl",
    "k3": "kl_k3",
    "forward KL": "forward_kl",
    "log π of demonstrations": "demonstration_logp",
    "less the reference's": "demonstration_gain",
}


def divergence_table(results: Results) -> Table | None:
    """A row for every policy that was sampled; None where what is exact is known, or nothing was measured like this."""
    if results.exact or kl_key(results) == "kl":
        return None
    measured = [entry for entry in results.entries if aggregate(entry, "kl_vocabulary")]
    rows = tuple(
        (entry.shown_name, *(plus_minus(aggregate(entry, key), 3) for key in _COLUMNS.values())) for entry in measured
    )
    caption = (
        "Nats a response. KL and k1 estimate KL(π ‖ ref) from the same samples of the policy without bias: KL adds up "
        "the exact divergences over the vocabulary along each sample, k1 the log-ratios of the tokens that were drawn, "
        "which spread more; k3 is heavy-tailed far from the reference. Forward KL, KL(ref ‖ π), is like KL, along "
        "samples of the reference. Demonstrations: the chosen answers of held-out pairs, which the policy should still "
        "find likely; the last column is paired, so that its error does not hold how likely one answer is beside "
        "another."
    )
    return Table(f"{results.name}: distance from the reference", ("policy", *_COLUMNS), rows, caption)
