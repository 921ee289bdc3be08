"""The typed rows that pass between stages, and their Arrow schemas.

Token columns are list<int32>. `response`, `chosen` and `rejected` ids hold the token that ends an answer when
the response ended by itself; a response cut off at the limit has none. An `id` is a content hash, stable over reruns.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_IDS = pa.list_(pa.int32())
#: What each response was worth to whoever ordered the pair, in its own units; null where that is not known.
PAIR_SCORES = ("score_chosen", "score_rejected")

TEXT_PAIRS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("label", pa.float32()),  # P(chosen > rejected); 1 where the data gives no other
        ("source", pa.string()),
    ]
)
PAIRS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("label", pa.float32()),
        ("source", pa.string()),
        *((name, pa.float64()) for name in PAIR_SCORES),
    ]
)
#: What lm-eval says of each item of a task, by its metrics.
ABILITIES = pa.schema(
    [
        ("task", pa.string()),
        ("metric", pa.string()),
        ("item", pa.int64()),
        ("value", pa.float64()),
        ("higher_is_better", pa.bool_()),
    ]
)
#: PAIRS with the reference policy's log-probs, written by the reference stage.
REFERENCED_PAIRS = pa.schema([*PAIRS, ("ref_chosen_logp", pa.float32()), ("ref_rejected_logp", pa.float32())])
#: REFERENCED_PAIRS with those of as many first tokens as the shorter response of the pair has.
SHARED_PAIRS = pa.schema(
    [*REFERENCED_PAIRS, ("ref_chosen_shared_logp", pa.float32()), ("ref_rejected_shared_logp", pa.float32())]
)
#: SHARED_PAIRS that a training drew from its own policy, in the order of `place`, which counts all pairs that it is
#: trained on. `drawn_at`: the step of the policy; 0: the pair is one of the data's, which stayed, with its own scores.
#: `num_judged`, `num_tokens`: responses that were scored, and tokens that were sampled, until there was a pair.
ONLINE_PAIRS = pa.schema(
    [
        *SHARED_PAIRS,
        ("place", pa.int64()),
        ("drawn_at", pa.int64()),
        ("num_judged", pa.int64()),
        ("num_tokens", pa.int64()),
    ]
)
#: Single responses; `label` is P(desirable).
RESPONSES = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", _IDS),
        ("response_ids", _IDS),
        ("label", pa.float32()),
        ("source", pa.string()),
    ]
)
#: RESPONSES with a response to another prompt beside each, and the reference policy's log-probs of both.
REFERENCED_RESPONSES = pa.schema(
    [*RESPONSES, ("mismatched_ids", _IDS), ("ref_logp", pa.float32()), ("ref_mismatched_logp", pa.float32())]
)
DEMONSTRATIONS = pa.schema([("id", pa.string()), ("prompt_ids", _IDS), ("response_ids", _IDS)])
#: What a policy answered to prompts of which pairs are made; `place`: of the response among those to its prompt.
DRAWN = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_id", pa.string()),
        ("place", pa.int32()),
        ("prompt_ids", _IDS),
        ("response_ids", _IDS),
    ]
)
#: `covered`: the prompt has training pairs. `split`: train or test.
PROMPTS = pa.schema([("id", pa.string()), ("prompt_ids", _IDS), ("covered", pa.bool_()), ("split", pa.string())])
PRETRAINING = pa.schema([("id", pa.string()), ("ids", _IDS)])
#: What a policy answered in its evaluation. `place`: the same place is the same prompt for every policy. `score`: the
#: judge's; null where it was silent, or where policies are compared pair by pair. `num_tokens`: of the response.
SAMPLES = pa.schema(
    [
        ("place", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("score", pa.float64()),
        ("num_tokens", pa.int32()),
    ]
)
#: SAMPLES of all policies and seeds of a comparison.
ALL_SAMPLES = pa.schema([("policy", pa.string()), ("seed", pa.int64()), *SAMPLES])


@dataclass(frozen=True)
class Rollout:
    """One sampled response. `token_logps` are the generator's log-probs (nats, at the sampling temperature)."""

    prompt_ids: list[int]
    response_ids: list[int]
    token_logps: list[float]
    finished: bool  # by a token that ends an answer, not cut off at the limit
    weight_version: str


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly `schema`. Pairs of stages from before scores were kept get null scores."""
    for name in PAIR_SCORES:
        if name in schema.names and name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.float64()))
    return table.select(schema.names).cast(schema)


def content_id(*parts: Any) -> str:
    """A stable 16-hex-digit id of JSON-able parts."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
