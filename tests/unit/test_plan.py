"""The batch plan: a pure function that uses every row, whatever the number of workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefarena.data.plan import BatchPlan, largest_scored, scored_at_once, within_budget
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
    with pytest.raises(UserError, match="cannot be divided evenly among 2 workers"):
        make(10, 3, 1, 2)
    with pytest.raises(UserError, match="no rows"):
        BatchPlan(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 2, 1, 1, 0)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), budget=st.integers(1, 120))
def test_a_forward_pass_stays_within_its_tokens_unless_one_row_is_longer(sizes: list[int], budget: int) -> None:
    rows = np.arange(len(sizes))[::-1]
    parts = within_budget(rows, np.array(sizes), budget)
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    totals = [sum(sizes[row] for row in part) for part in parts]
    assert all(total <= budget or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    for total, following in zip(totals, parts[1:], strict=False):
        assert total + sizes[following[0]] > budget  # no pass could have taken one more row
    assert within_budget(rows[:0], np.array(sizes), budget) == []


def test_rows_that_fill_a_pass_to_its_last_token_share_it() -> None:
    parts = within_budget(np.arange(6), np.array([40, 60, 70, 30, 100, 1]), 100)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4], [5]]


def test_a_pass_without_gradients_is_smaller_on_a_cpu() -> None:
    # Memory for larger ones is taken anew in every layer there; on a GPU larger passes keep it busy.
    assert (largest_scored("cpu"), largest_scored("cuda")) == (4096, 8192)
    assert scored_at_once(16, longest=10, device="cpu") == 64  # four times the rows of a pass with gradients
    assert scored_at_once(16, longest=128, device="cpu") == 32  # 4,096 tokens
    assert scored_at_once(16, longest=400, device="cpu") == 16  # what fits with gradients is never split
    assert scored_at_once(16, longest=400, device="cuda") == 64


@pytest.mark.parametrize(
    ("num_rows", "batch", "epochs", "steps"),
    [(100, 10, 1, 10), (100, 10, 2.5, 25), (104, 10, 1, 10), (106, 10, 1, 11), (3, 10, 1, 1), (100, 10, 0.01, 1)],
)
def test_epochs_are_counted_in_steps_of_a_batch(num_rows: int, batch: int, epochs: float, steps: int) -> None:
    assert make(num_rows, batch, 500, 1).num_steps(epochs) == steps


@pytest.mark.parametrize(("num_rows", "world"), [(96, 1), (96, 2), (90, 3), (7, 1)])
def test_the_largest_micro_batch_is_that_of_the_first_epoch(num_rows: int, world: int) -> None:
    """Against all micro-batches of all workers, in the order of the plan itself; `sizes` unlike `lengths`."""
    lengths = np.random.default_rng(3).integers(5, 200, num_rows)
    sizes = np.random.default_rng(4).integers(5, 200, num_rows)
    plan = BatchPlan(lengths, sizes, 6, 300, world, 5)
    parts = []
    for step in range(max(1, num_rows // 6)):
        rows = plan.rows(step)
        for rank in range(world):
            parts += within_budget(rows[rank::world], sizes, 300)
    found = plan.largest_micro_batch()
    assert sizes[found].sum() == max(sizes[part].sum() for part in parts)
    assert any(np.array_equal(found, part) for part in parts)


def test_a_step_that_crosses_into_the_next_epoch_takes_rows_of_both() -> None:
    plan = make(10, 6, 100, 1)
    first, second = plan.rows(0), plan.rows(1)
    assert len(first) == len(second) == 6
    assert len(set(first)) == 6 and set(range(10)) - set(first) <= set(second)


def test_a_worker_with_fewer_passes_halves_its_longest() -> None:
    """One worker could take its rows in one pass, the other needs two; both make two."""
    sizes = np.array([50, 60, 50, 60])
    plan = BatchPlan(np.arange(4), sizes, 4, 100, 2, 0)  # one worker has 50 + 50, the other 60, 60
    shares = [plan.micro_batches(0, rank) for rank in range(2)]
    assert [[part.tolist() for part in share] for share in shares] == [[[0], [2]], [[1], [3]]]


def test_the_longest_of_several_passes_is_halved_and_the_others_stay() -> None:
    sizes = np.array([40, 90, 40, 90, 90, 90])
    plan = BatchPlan(np.arange(6), sizes, 6, 100, 2, 0)  # one worker has 40 + 40, 90, the other 90, 90, 90
    shares = [plan.micro_batches(0, rank) for rank in range(2)]
    assert [[part.tolist() for part in share] for share in shares] == [[[0], [2], [4]], [[1], [3], [5]]]


def test_rows_of_equal_length_keep_the_order_of_the_epochs_permutation() -> None:
    """So the plan is the same wherever numpy's quicker sort, which is not stable, would order them otherwise."""
    lengths = np.arange(512) % 2
    plan = BatchPlan(lengths, lengths, 32, 99, 1, 7)  # sixteen batches are sorted together: the whole of the epoch
    permutation = np.random.default_rng([7, 0]).permutation(512).tolist()
    batches = [sorted(permutation, key=lambda row: row % 2)[start : start + 32] for start in range(0, 512, 32)]
    assert sorted(plan.rows(step).tolist() for step in range(16)) == sorted(batches)


def test_a_step_over_two_epochs_is_sorted_without_moving_rows_of_equal_length() -> None:
    lengths = np.arange(300) % 3
    plan = BatchPlan(lengths, lengths, 200, 99, 1, 7)
    stream = np.concatenate([plan._epoch(0), plan._epoch(1)])[200:400].tolist()
    assert plan.rows(1).tolist() == sorted(stream, key=lambda row: row % 3)


@pytest.mark.parametrize(("seed", "budget"), [(0, 1500), (1, 1500), *((seed, 99999) for seed in range(6))])
def test_the_largest_micro_batch_is_looked_for_in_every_one_of_many_steps(seed: int, budget: int) -> None:
    """Rows of few lengths, whose order decides who shares a pass; only one step has the largest, and many steps take
    rows of two batches, since one of the epoch's is not full.
    """
    lengths = np.random.default_rng(seed).integers(1, 4, 6030)
    sizes = np.random.default_rng(seed + 10).integers(5, 200, 6030)
    plan = BatchPlan(lengths, sizes, 60, budget, 2, seed)
    parts = [part for step in range(100) for rank in range(2) for part in plan.micro_batches(step, rank)]
    assert plan.largest_micro_batch().tolist() == max(parts, key=lambda part: int(sizes[part].sum())).tolist()


@dataclass(frozen=True)
class Counted(BatchPlan):
    """A plan that notes which epochs it orders."""

    ordered: list[int] = field(default_factory=list)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        self.ordered.append(epoch)
        return super()._epoch(epoch)


@pytest.mark.parametrize(("step", "epochs"), [(0, [0]), (2, [1]), (1, [0, 1]), (999, [599]), (1000, [600])])
def test_a_late_step_costs_no_more_than_an_early_one(step: int, epochs: list[int]) -> None:
    """Ten rows in batches of six: only the epochs that a step takes rows of are put in order for it."""
    plan = Counted(np.arange(10), np.arange(10), 6, 100, 1, 0)
    plan.rows(step)
    assert plan.ordered == epochs
