"""Tables for text tasks: how far policies are from the reference, by every available estimate."""

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
    "minus the reference's": "demonstration_gain",
}


#: Heading and measure of a group of prompts.
_BY_COVERAGE = {"judge score": "judge_score", "KL": "kl_vocabulary", "forward KL": "forward_kl"}


def coverage_table(results: Results) -> Table | None:
    """Measures of policies on training prompts with pairs and without; None where every prompt has pairs.

    It is also None on the language, whose own columns say it.
    """
    shown = {
        f"{heading}, {where}": f"{measure}/{group}"
        for heading, measure in _BY_COVERAGE.items()
        for where, group in (("pairs", "covered"), ("no pairs", "uncovered"))
        if any(f"{measure}/{group}" in row for entry in results.entries for row in entry.seeds.values())
    }
    if results.exact or not shown:
        return None
    rows = tuple(
        (entry.shown_name, *(plus_minus(aggregate(entry, key), 3) for key in shown.values()))
        for entry in results.entries
    )
    caption = (
        "On training prompts that have preference pairs, and on as many that have none, which no method has seen. "
        "KL(π ‖ ref) and forward KL, KL(ref ‖ π), in nats per response, as above. Leakage is how far a policy moves "
        "on prompts without pairs."
    )
    return Table(f"{results.name}: with pairs and without", ("policy", *shown), rows, caption)


def divergence_table(results: Results) -> Table | None:
    """A row for every policy that was sampled; None where what is exact is known, or nothing was measured like this."""
    if results.exact or kl_key(results) == "kl":
        return None
    measured = [entry for entry in results.entries if aggregate(entry, "kl_vocabulary")]
    rows = tuple(
        (entry.shown_name, *(plus_minus(aggregate(entry, key), 3) for key in _COLUMNS.values())) for entry in measured
    )
    caption = (
        "Nats per response. KL and k1 estimate KL(π ‖ ref) from the same samples of the policy without bias: KL adds "
        "up the exact divergences over the vocabulary along each sample, k1 the log-ratios of the tokens that were "
        "drawn, which spread more; k3 is heavy-tailed far from the reference. Forward KL, KL(ref ‖ π), is like KL, "
        "along samples of the reference. Demonstrations: the chosen answers of held-out pairs, which the policy "
        "should still find likely. The last column is paired, so its error does not include how much some answers are "
        "likelier than others."
    )
    return Table(f"{results.name}: distance from the reference", ("policy", *_COLUMNS), rows, caption)
