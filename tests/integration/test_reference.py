"""Reference log-probs: computed once, by content, whoever asks; and the same bits however they are computed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import BOS, EOS, FIRST_LETTER, VOCABULARY, save_tiny_policy

from pipelines.reference import (
    SPLITS,
    Part,
    ReferenceLogps,
    add_reference_logps,
    find_parts,
    read_scores,
    weights_digest,
)
from prefarena.config import Resources
from prefarena.data.plan import largest_scored
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.evaluation.sampled import response_logps
from prefarena.modeling.load import load_policy
from prefarena.records import PAIRS, REFERENCED_PAIRS, content_id
from prefarena.stages import read_manifest

PART_ROWS = 16


def write_pairs(folder: Path, sizes: dict[str, int]) -> Path:
    """Random pairs of different lengths."""
    source = np.random.default_rng(0)

    def letters(most: int) -> list[int]:
        return source.integers(FIRST_LETTER, len(VOCABULARY), source.integers(1, most)).tolist()

    for split, size in sizes.items():
        rows = []
        for i in range(size):
            prompt, chosen, rejected = [BOS, *letters(30)], [*letters(20), EOS], [*letters(40), EOS]
            row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "label": 1.0, "source": "x"}
            rows.append({"id": content_id(split, i), **row})
        write_rows(pa.Table.from_pylist(rows, PAIRS), folder / split / "part-0.parquet", PAIRS)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train_pairs": 70, "test_pairs": 20})


@pytest.fixture(scope="module")
def computed(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, pairs: Path, tiny_policy: str
) -> tuple[Path, Path]:
    """Folder and cache of an undisturbed run of two actors."""
    root = tmp_path_factory.mktemp("computed")
    manifest = run(pairs, tiny_policy, root / "out", root / "cache", num_actors=2)
    assert (manifest["num_parts"], manifest["num_parts_computed"]) == (7, 7)
    return root / "out", root / "cache"


def run(pairs: Path, policy: str, folder: Path, cache: Path, num_actors: int = 1) -> dict[str, Any]:
    """Compute what is missing in `cache`, and return the manifest."""
    add_reference_logps(
        pairs, policy, folder, cache=cache, resources=Resources(num_workers=num_actors), part_rows=PART_ROWS
    )
    return read_manifest(folder)


def parts_of(pairs: Path, policy: str, cache: Path) -> list[Part]:
    """The parts of both tables as `run` finds them."""
    model = [2, weights_digest(policy), "cpu", 1, largest_scored("cpu")]
    return [
        part for split in ("train_pairs", "test_pairs") for part in find_parts(pairs / split, cache, model, PART_ROWS)
    ]


def tables(folder: Path) -> list[pa.Table]:
    return [read_rows(folder / split) for split in SPLITS]


def same(first: Path, second: Path) -> bool:
    return all(a.equals(b) for a, b in zip(tables(first), tables(second), strict=True))


def test_a_killed_run_goes_on_with_the_missing_parts_and_no_bit_differs(
    computed: tuple[Path, Path], tmp_path: Path, pairs: Path, tiny_policy: str
) -> None:
    whole, cache = computed
    killed = tmp_path / "cache"
    killed.mkdir()
    parts = parts_of(pairs, tiny_policy, killed)
    assert {Path(part.scores).name for part in parts} == {path.name for path in cache.iterdir()}
    fields = [vars(part) for part in parts[:3]]
    num_threads = torch.get_num_threads()
    ReferenceLogps(tiny_policy, None, "cpu", 1)(pa.Table.from_pylist(fields))  # what a killed run leaves
    torch.set_num_threads(num_threads)
    (killed / ".half.npz").write_bytes(b"half of a part")
    before = {part.scores: Path(part.scores).stat().st_mtime_ns for part in parts[:3]}

    resumed = run(pairs, tiny_policy, tmp_path / "resumed", killed)
    assert (resumed["num_parts"], resumed["num_parts_computed"]) == (7, 4)
    assert {path: Path(path).stat().st_mtime_ns for path in before} == before
    assert same(whole, tmp_path / "resumed")
    assert all(table.schema.equals(REFERENCED_PAIRS) for table in tables(tmp_path / "resumed"))
    assert resumed["costs"]["num_tokens_scored"] == read_manifest(whole)["costs"]["num_tokens_scored"] > 0


def test_scores_are_those_of_the_policy(computed: tuple[Path, Path], pairs: Path, tiny_policy: str) -> None:
    model = load_policy(tiny_policy)
    for split, table in zip(SPLITS, tables(computed[0]), strict=True):
        assert table.select(PAIRS.names).equals(read_rows(pairs / split))
        for side in ("chosen", "rejected"):
            prompts, responses = (table[name].to_pylist() for name in ("prompt_ids", f"{side}_ids"))
            expected = response_logps(model, prompts, responses, 0, batch_size=1)
            np.testing.assert_allclose(table[f"ref_{side}_logp"].to_numpy(), expected, rtol=1e-5, atol=1e-5)


def test_scores_are_found_by_content(
    computed: tuple[Path, Path], tmp_path: Path, pairs: Path, tiny_policy: str
) -> None:
    first, cache = computed[0], shutil.copytree(computed[1], tmp_path / "cache")
    renamed = shutil.copytree(tiny_policy, tmp_path / "renamed")
    moved = shutil.copytree(pairs, tmp_path / "moved")
    assert run(moved, str(renamed), tmp_path / "again", cache)["num_parts_computed"] == 0
    assert same(first, tmp_path / "again")

    other = save_tiny_policy(tmp_path / "other", seed=1)
    assert run(pairs, other, tmp_path / "of-other", cache)["num_parts_computed"] == 7
    fewer = write_pairs(tmp_path / "fewer", {"train_pairs": 70, "test_pairs": 4})  # the same training pairs
    assert run(fewer, tiny_policy, tmp_path / "of-fewer", cache)["num_parts_computed"] == 1


def test_a_damaged_part_is_computed_again(
    computed: tuple[Path, Path],
    tmp_path: Path,
    pairs: Path,
    tiny_policy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, cache = computed[0], shutil.copytree(computed[1], tmp_path / "cache")
    damaged, emptied = (Path(part.scores) for part in parts_of(pairs, tiny_policy, cache)[:2])
    damaged.write_bytes(damaged.read_bytes()[:-200])
    emptied.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        again = run(pairs, tiny_policy, tmp_path / "again", cache)
    assert again["num_parts_computed"] == 2
    assert f"{damaged} is damaged and is computed again" in caplog.text
    assert same(first, tmp_path / "again")
    assert all(read_scores(part) is not None for part in parts_of(pairs, tiny_policy, cache))


def test_one_changed_weight_is_another_entry(tmp_path: Path, pairs: Path, tiny_policy: str) -> None:
    model = load_policy(tiny_policy)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    names = [
        {part.scores for part in parts_of(pairs, path, tmp_path)} for path in (tiny_policy, str(tmp_path / "changed"))
    ]
    assert len(names[0]) == len(names[1]) == 7 and not names[0] & names[1]


def test_a_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: there are no safetensors weights in it; save the model"):
        weights_digest(tmp_path / "model")
