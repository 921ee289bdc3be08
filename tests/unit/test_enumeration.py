"""What the walk through the responses costs, how many may be listed, and how they are found again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    PreTrainedModel,
)

from prefarena.errors import UserError
from prefarena.evaluation import enumeration
from prefarena.evaluation.enumeration import Enumeration, Responses, enumerate_responses, enumerate_scores

VOCAB_SIZE, LIMIT, EOS = 6, 3, 2
PROMPTS = [[1, 3, 4], [1, 5, 3], [1, 4, 4]]
RESPONSES = Responses.listed(VOCAB_SIZE, LIMIT, EOS)
#: Prefixes of one prompt that can go on, by length; the longest are the most that one prompt asks of a pass.
PREFIXES = [1, 5, 25]
WINDOW = 3


def tiny(kind: type[PreTrainedModel], window: int | None = WINDOW) -> PreTrainedModel:
    """Its attention window is shorter than the sequences, where it has one."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, sliding_window=window, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = 1
    return kind(config).eval()


def test_each_prefix_goes_through_the_model_once() -> None:
    model, rows = tiny(MistralForCausalLM), []
    model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    enumerate_responses(model, PROMPTS, LIMIT, EOS, max_rows=60)  # two prompts fit, and three do not
    assert rows == [2 * number for number in PREFIXES] + PREFIXES


@pytest.mark.parametrize("max_rows", [1, 12, 8192])
def test_each_response_is_scored_once_and_no_more_than_allowed_at_a_time(max_rows: int) -> None:
    model, rows = tiny(MistralForSequenceClassification), []
    model.get_submodule("score").register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    enumerate_scores(model, PROMPTS, LIMIT, EOS, max_rows)
    assert sum(rows) == len(PROMPTS) * len(RESPONSES.lengths)
    assert max(rows) <= max(max_rows, VOCAB_SIZE - 1)  # the last tokens behind one prefix stay together
    assert min(rows) == (1 if max_rows < 25 else len(PROMPTS))


@pytest.mark.parametrize(
    ("walk", "kind"),
    [(enumerate_responses, MistralForCausalLM), (enumerate_scores, MistralForSequenceClassification)],
)
def test_the_cache_holds_no_more_than_the_widest_pass_and_the_window(
    walk: Any, kind: type[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []

    class Kept(DynamicCache):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr(enumeration, "DynamicCache", Kept)
    walk(tiny(kind), PROMPTS, LIMIT, EOS)
    (cache,) = caches
    layer: Any = cache.layers[0]
    rows, _, num_positions, _ = layer.keys.shape
    assert rows == len(PROMPTS) * PREFIXES[-1] and num_positions <= WINDOW


def test_a_walk_stays_on_the_devices_of_its_model() -> None:
    """Where new tensors go elsewhere by default, as they do beside a model on a GPU."""
    tokens = torch.tensor(PROMPTS)
    policy, judge = tiny(MistralForCausalLM, None), tiny(MistralForSequenceClassification, None)
    with torch.no_grad(), torch.device("meta"):
        logps = enumeration._tree_logps(policy, tokens, RESPONSES, EOS)
        values = enumeration._tree_scores(judge, tokens, RESPONSES, EOS, max_rows=8192)
    np.testing.assert_array_equal(logps, enumerate_responses(policy, PROMPTS, LIMIT, EOS).logps)
    np.testing.assert_array_equal(values, enumerate_scores(judge, PROMPTS, LIMIT, EOS))


def test_exactly_as_many_responses_as_allowed_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 5 + 25 that eos ends and 125 that the limit does."""
    monkeypatch.setattr(enumeration, "_MOST_RESPONSES", 156)
    assert len(Responses.listed(VOCAB_SIZE, LIMIT, EOS).lengths) == 156
    monkeypatch.setattr(enumeration, "_MOST_RESPONSES", 155)
    with pytest.raises(UserError, match=r"make 156 responses, too many to list \(the limit is 155\)"):
        Responses.listed(VOCAB_SIZE, LIMIT, EOS)


def test_no_responses_have_no_log_probs() -> None:
    policy = Enumeration(RESPONSES, np.zeros((1, len(RESPONSES.lengths))))
    assert policy.response_logps(np.zeros(0, dtype=np.int64), []).shape == (0,)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[5, 5, 6\] is neither"):
        RESPONSES.index([[5, 5, 5], [5, 5, 6]])
