"""The batch plan: a pure function that uses every row, whatever the number of workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefarena.data.plan import BatchPlan, within_budget
from prefarena.errors import UserError


def make(num_rows: int, batch: int, micro: int, world: int, seed: int = 0) -> BatchPlan:
    lengths = np.random.default_rng(seed).integers(5, 200, num_rows)
    return BatchPlan(lengths, lengths, batch, micro, world, seed)


@given(
    num_rows=st.integers(1, 70),
    per_worker=st.integers(1, 6),
    world=st.integers(1, 3),
    micro=st.integers(1, 500),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_uses_every_row_once(num_rows: int, per_worker: int, world: int, micro: int, seed: int) -> None:
    plan = make(num_rows, per_worker * world, micro, world, seed)
    steps = num_rows  # enough steps for batch_size whole epochs
    stream = np.concatenate([plan.rows(step) for step in range(steps)])
    counts = np.bincount(stream, minlength=num_rows)
    assert (counts == plan.batch_size).all()


def test_workers_share_a_step_and_have_as_many_micro_batches() -> None:
    plan = make(100, 12, 450, 3)
    for step in range(5):
        shares = [plan.micro_batches(step, rank) for rank in range(3)]
        assert len({len(share) for share in shares}) == 1
        together = np.concatenate([np.concatenate(share) for share in shares])
        np.testing.assert_array_equal(np.sort(together), np.sort(plan.rows(step)))
        one = BatchPlan(plan.lengths, plan.sizes, 12, 9999, 1, plan.seed)
        np.testing.assert_array_equal(np.sort(one.rows(step)), np.sort(together))


def test_neighbours_in_length_share_a_batch() -> None:
    plan = make(2000, 8, 8, 1)
    bucketed = [plan.lengths[plan.rows(step)] for step in range(250)]
    padding = sum(int((batch.max() - batch).sum()) for batch in bucketed) / sum(int(b.max()) * 8 for b in bucketed)
    shuffled = plan.lengths[np.random.default_rng(1).permutation(2000)].reshape(250, 8)
    naive = (shuffled.max(1, keepdims=True) - shuffled).sum() / (shuffled.max(1) * 8).sum()
    assert padding < naive / 4


def test_seeds_and_epochs_change_the_order() -> None:
    first, second = make(64, 8, 8, 1), replace(make(64, 8, 8, 1), seed=1)
    assert any((first.rows(step) != second.rows(step)).any() for step in range(8))
    assert any((first.rows(step) != first.rows(step + 8)).any() for step in range(8))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be shared evenly by 2 workers"):
        make(10, 3, 1, 2)
    with pytest.raises(UserError, match="no rows"):
        BatchPlan(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 2, 1, 1, 0)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), budget=st.integers(1, 120))
def test_a_forward_pass_stays_within_its_tokens_unless_one_row_is_longer(sizes: list[int], budget: int) -> None:
    rows = np.arange(len(sizes))[::-1]
    parts = within_budget(rows, np.array(sizes), budget)
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    totals = [sum(sizes[row] for row in part) for part in parts]
    assert all(total <= budget or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    for total, following in zip(totals, parts[1:], strict=False):
        assert total + sizes[following[0]] > budget  # no pass could have taken one more row
