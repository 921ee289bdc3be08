"""Where the pairs of a training came from, where some of them were drawn on the way."""

from __future__ import annotations

from prefarena.report.results import EntryResult, Results, aggregate
from prefarena.report.tables import Table, plus_minus

#: Heading and key of a row.
_COLUMNS = {
    "pairs trained on": "pairs_trained",
    "labels of the data": "data_labels",
    "labels of its judge": "own_labels",
    "responses judged": "responses_judged",
}


def online_table(results: Results) -> Table | None:
    """A row for every method on pairs, as far as its stage tells it; None where nobody draws any."""
    if not any(entry.settings.get("online") for entry in results.entries):
        return None
    told = [entry for entry in results.entries if aggregate(entry, "pairs_trained")]
    rows = tuple(
        (
            entry.shown_name,
            _every(entry),
            *(plus_minus(aggregate(entry, key), 0) for key in _COLUMNS.values()),
            plus_minus(aggregate(entry, "pair_age"), 1),
        )
        for entry in told
    )
    caption = (
        "For one seed. Steps between: from one drawing of pairs from the policy to the next. Labels of the data: its "
        "pairs that were trained on, each counted once; labels of its judge: pairs of the policy's own. Responses "
        "judged: what was asked of the judge for them. Age: steps between the policy that said a pair and the one that "
        "learned from it; pairs of the data count as the reference's."
    )
    return Table(f"{results.name}: pairs", ("policy", "steps between", *_COLUMNS, "mean age, steps"), rows, caption, 2)


def _every(entry: EntryResult) -> str:
    online, replay = entry.settings.get("online"), entry.settings.get("replay")
    if replay:
        return f"{replay}'s, shuffled"
    return str(online["every"]) if online else "offline"
