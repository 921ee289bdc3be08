"""No second copy of a model, and passes of bounded size."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import save_tiny_policy
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefarena.data.tables import write_rows
from prefarena.modeling import load
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_policy, new_reward_model
from prefarena.records import PAIRS
from prefarena.training.reward_model import held_out_scores, over_workers
from prefarena.training.worker import Worker


@pytest.mark.parametrize("seed", [0, 7])
def test_a_new_reward_model_is_bit_for_bit_the_copied_one(tmp_path: Path, seed: int) -> None:
    save_tiny_policy(tmp_path / "policy")
    config = AutoConfig.from_pretrained(tmp_path / "policy", num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copied = AutoModelForSequenceClassification.from_config(config).float()
        torch.nn.init.normal_(copied.score.weight, std=1 / math.sqrt(copied.score.in_features + 1))
    copied.base_model.load_state_dict(load_policy(tmp_path / "policy").base_model.state_dict())
    made = new_reward_model(tmp_path / "policy", seed)
    assert {name for name, _ in made.named_buffers()} == {name for name, _ in copied.named_buffers()}
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        found = dict([*made.named_parameters(), *made.named_buffers()])[name]
        assert found.requires_grad == tensor.requires_grad and torch.equal(found, tensor), name
    assert not made.training


def test_no_random_body_is_left_while_the_policy_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_policy(tmp_path / "policy")
    dropped: list[bool] = []

    def note(module: torch.nn.Module) -> None:
        _drop(module)
        dropped.append(all(parameter.is_meta for parameter in module.parameters()))

    _drop = load._drop_weights
    monkeypatch.setattr(load, "_drop_weights", note)
    made = new_reward_model(tmp_path / "policy", 0)
    assert dropped == [True] and not any(parameter.is_meta for parameter in made.parameters())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most_tokens", [1, 40, 8192])
def test_held_out_pairs_are_scored_in_bounded_passes(tmp_path: Path, most_tokens: int, packed: bool) -> None:
    save_tiny_policy(tmp_path / "policy")
    random = np.random.default_rng(0)
    sides = {side: [random.integers(3, 10, random.integers(1, 9)).tolist() for _ in range(30)] for side in "pcr"}
    columns = {"prompt_ids": sides["p"], "chosen_ids": sides["c"], "rejected_ids": sides["r"]}
    others = {name: _filler(PAIRS.field(name).type) for name in PAIRS.names if name not in columns}
    table = pa.table({name: columns.get(name, [others.get(name)] * 30) for name in PAIRS.names}, schema=PAIRS)
    write_rows(table, tmp_path / "pairs" / "part-0.parquet", PAIRS)
    head = ScalarHead(new_reward_model(tmp_path / "policy", 0), 16)
    head.packed = packed and head.packed
    sizes: list[int] = []
    head.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].input_ids.numel()))
    worker = Worker(str(tmp_path / "stage"))
    whole = np.stack(held_out_scores(head, str(tmp_path / "pairs"), 0, worker))
    sizes.clear()
    found = np.stack(held_out_scores(head, str(tmp_path / "pairs"), 0, worker, most_tokens))
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert len(sizes) > (most_tokens < 8192) and max(sizes) <= max(most_tokens, 48)


class OneOfThree(Worker):
    """A worker in a thread beside two others."""

    def __init__(self, stage_dir: str, rank: int, given: list[Any], meet: threading.Barrier) -> None:
        super().__init__(stage_dir)
        self.rank, self.world_size, self._given, self._meet = rank, 3, given, meet

    def gathered(self, value: Any) -> list[Any]:
        self._given[self.rank] = value
        self._meet.wait(10)
        return list(self._given)


@pytest.mark.parametrize("number", [1, 3, 5, 9])
def test_passes_are_dealt_to_workers_which_all_make_as_many_and_have_all_values(tmp_path: Path, number: int) -> None:
    """As many: the passes of a model that is spread need every worker."""
    random = np.random.default_rng(0)
    passes = np.array_split(random.permutation(4 * number), number)
    made: list[list[int]] = [[], [], []]
    meet, given = threading.Barrier(3), [None] * 3

    def run(rank: int) -> np.ndarray:
        def compute(rows: np.ndarray) -> np.ndarray:
            made[rank].append(int(rows[0]))
            return np.stack([rows * 2.0, rows + 0.5], 1)

        return over_workers(passes, compute, OneOfThree(str(tmp_path), rank, given, meet))

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(run, range(3)))
    rows = np.arange(4 * number)
    for one in found:
        np.testing.assert_array_equal(one, np.stack([rows * 2.0, rows + 0.5], 1))
    assert {len(one) for one in made} == {-(-number // 3)}
    assert {first for one in made for first in one} == {int(rows[0]) for rows in passes}


def _filler(kind: pa.DataType) -> object:
    return "x" if pa.types.is_string(kind) else 1 if pa.types.is_integer(kind) else 1.0
