"""Single labelled responses: pairs taken apart, and each prompt's mismatched response."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefarena.data.tables import TokenColumn
from prefarena.errors import UserError
from prefarena.records import RESPONSES, content_id

_SIDES = ("chosen", "rejected")


def taken_apart(pairs: pa.Table) -> pa.Table:
    """Both responses of each pair, as RESPONSES: with a label p the chosen one is desirable by p, the other by 1 - p.

    pairs: a table with the columns of records.PAIRS.
    """
    sides = []
    for side, labels in zip(_SIDES, (pairs["label"], pc.subtract(1.0, pairs["label"])), strict=True):
        columns = {
            "id": pa.array([_id(side, name) for name in pairs["id"].to_pylist()], pa.string()),
            "prompt_ids": pairs["prompt_ids"],
            "response_ids": pairs[f"{side}_ids"],
            "label": labels,
            "source": pairs["source"],
        }
        sides.append(pa.table(columns).cast(RESPONSES))
    return pa.concat_tables(sides).sort_by("id").combine_chunks()


def of_pairs(responses: pa.Table, ids: list[str]) -> pa.Table:
    """Select, from the responses that `taken_apart` made, those of the pairs with these ids.

    Their mismatched responses may be of other pairs: those serve as they are, without a label.
    """
    wanted = pa.array([_id(side, name) for side in _SIDES for name in ids], pa.string())
    return responses.filter(pc.is_in(responses["id"], wanted)).combine_chunks()


def _id(side: str, pair: str) -> str:
    return content_id("response", side, pair)


def mismatch(responses: pa.Table) -> NDArray[np.int64]:
    """For each row of RESPONSES, find the number of a row with another prompt; every row is used exactly once.

    Decided by content alone: rows of one prompt stand together, in an order that depends on no other prompt, and each
    row has the response of the row that stands as many places on as the most frequent prompt has rows. Raises UserError
    where that prompt has more than half of them.
    """
    prompts = [ids.tobytes() for ids in TokenColumn.of(responses, "prompt_ids").take(np.arange(responses.num_rows))]
    names = responses["id"].to_pylist()
    places = {prompt: content_id("prompt", list(prompt)) for prompt in set(prompts)}
    order = sorted(range(len(prompts)), key=lambda row: (places[prompts[row]], names[row]))
    most = max(Counter(prompts).values(), default=0)
    if 2 * most > len(order):
        raise UserError(
            f"{most} of {len(order)} labelled responses answer the same prompt, so there are not enough responses to "
            f"other prompts to pair with it, which methods such as kto need; add rows with other prompts"
        )
    found = np.empty(len(order), np.int64)
    found[order] = np.roll(np.array(order, np.int64), -most)
    return found
