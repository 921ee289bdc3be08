"""Checkpoints are whole or not there; what is damaged is found and passed over; storage may fail for a while."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_training import QUICK, inputs, metric_rows, off_policy_job, weights
from workers import DyingWorker, KilledError

from prefarena.config import MPO, Resources
from prefarena.errors import StorageError, StorageFullError, UserError
from prefarena.stages import read_manifest
from prefarena.training import checkpoints
from prefarena.training.checkpoints import CheckpointFolder, DamagedCheckpointError
from prefarena.training.launch import run_jobs
from prefarena.training.run_job import run_job
from prefarena.training.stage_log import SupersededError
from prefarena.training.storage import retried
from prefarena.training.worker import Worker

__all__ = ["inputs"]  # a fixture
TENSORS = {"weights.a": torch.arange(6.0).view(2, 3), "optimizer.0.step": torch.tensor(3.0)}


def folder_of(
    path: Path, rank: int = 0, world_size: int = 1, retry_s: float = 0, *, sharded: bool = False
) -> CheckpointFolder:
    return CheckpointFolder(path, rank=rank, world_size=world_size, attempt="attempt", retry_s=retry_s, sharded=sharded)


def saved(path: Path, *steps: int) -> CheckpointFolder:
    folder = folder_of(path)
    for step in steps:
        folder.save(step, {name: tensor + step for name, tensor in TENSORS.items()}, {"coef": 0.1})
    folder.wait()
    return folder


def cut_short(checkpoint: Path) -> None:
    os.truncate(checkpoint / "rank-0.safetensors", 40)


def change_a_bit(checkpoint: Path, file: str = "rank-0.safetensors") -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[-1] ^= 1
    (checkpoint / file).write_bytes(content)


def lose_the_tensors(checkpoint: Path) -> None:
    (checkpoint / "rank-0.safetensors").unlink()


def cut_the_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 30)


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def take_another(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(content | {"step": 4}))


DAMAGES = [cut_short, change_a_bit, lose_the_tensors, cut_the_manifest, lose_the_manifest, take_another]


def test_the_last_two_are_kept_in_standard_formats(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3, 6, 9)
    assert folder.steps() == [9, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000009"]
    names = {path.name for path in (tmp_path / "step-00000009").iterdir()}
    assert names == {"manifest.json", "rank-0.safetensors", "rank-0.json"}
    read = folder.read(9)
    assert read.step == 9 and read.state == {"coef": 0.1}
    assert all(torch.equal(read.tensors[name], tensor + 9) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = saved(tmp_path, 3, 6)
    damage(tmp_path / "step-00000006")
    with pytest.raises(DamagedCheckpointError, match="step-00000006"):
        folder.read(6)
    assert folder.read(3).step == 3


@pytest.mark.parametrize("num_rows", [1, 3, 7, 8])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_any_number_of_workers_goes_on_from_the_parts_of_any_other(
    tmp_path: Path, before: int, after: int, num_rows: int
) -> None:
    """The parts are those that FSDP2 cuts: it uses torch.chunk."""
    weight, step = torch.arange(num_rows * 2.0).view(num_rows, 2), torch.tensor(7.0)

    def chunk(number: int, rank: int) -> torch.Tensor:
        return [*weight.chunk(number), *[weight[:0]] * number][rank]

    parts = [folder_of(tmp_path, rank, world_size=before, sharded=before > 1) for rank in range(before)]
    for rank, part in enumerate(parts):
        part.save(5, {"model.a": chunk(before, rank), "optimizer.0.step": step}, {})
    for part in parts:
        part.wait()
    for rank in range(after):
        found = folder_of(tmp_path, rank, world_size=after, sharded=after > 1).read(5).tensors
        assert torch.equal(found["model.a"], chunk(after, rank)) and torch.equal(found["optimizer.0.step"], step)
        whole = folder_of(tmp_path, rank, world_size=after).read(5).tensors
        assert torch.equal(whole["model.a"], weight)  # workers that hold everything read everything


def test_a_damaged_part_of_another_worker_is_found_by_who_reads_it(tmp_path: Path) -> None:
    parts = [folder_of(tmp_path, rank, world_size=2, sharded=True) for rank in range(2)]
    for part in parts:
        part.save(5, TENSORS, {})
    for part in parts:
        part.wait()
    change_a_bit(tmp_path / "step-00000005", "rank-1.safetensors")
    assert parts[0].read(5).step == 5
    with pytest.raises(DamagedCheckpointError, match="rank-1"):
        folder_of(tmp_path).read(5)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow_disk(tensors: dict[str, torch.Tensor], path: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", slow_disk)
    folder, weight = folder_of(tmp_path), torch.ones(3)
    folder.save(1, {"weights.a": weight}, {})
    assert begun.wait(60) and folder.steps() == []
    weight.add_(1)  # the next step
    go_on.set()
    folder.wait()
    assert torch.equal(folder.read(1).tensors["weights.a"], torch.ones(3))


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dpo-s0" / "checkpoints", 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a full disk, as near as one can come to it
    try:
        folder.save(6, {"weights.a": torch.zeros(4096)}, {})
        with pytest.raises(StorageFullError) as caught:
            folder.save(9, TENSORS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith("dpo-s0: checkpoint of step 6: no space is left under /")
    assert "run the same command again, which continues from the last checkpoint" in str(caught.value)
    assert [path.name for path in (tmp_path / "dpo-s0" / "checkpoints").iterdir()] == ["step-00000003"]
    assert folder.read(3).step == 3


def test_what_a_user_must_mend_comes_out_of_ray_train_as_it_was_said(
    ray_session: None, inputs: Path, tmp_path: Path
) -> None:
    job = off_policy_job(inputs, tmp_path / "dpo", MPO(training=QUICK.model_copy(update={"batch_size": 15})))
    with pytest.raises(UserError, match="batch_size 15 cannot be divided evenly among 2 workers"):
        run_jobs([job], Resources(num_workers=2, max_failures=0), str(tmp_path / "ray"))
    assert not list((tmp_path / "ray").iterdir())  # Ray Train's own notes are gone


def test_storage_that_fails_for_a_while_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EIO, "not now"), SafetensorError("I/O error: Stale file handle (os error 116)")]

    def shaky(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if failures:
            raise failures.pop()
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", shaky)
    folder = folder_of(tmp_path, retry_s=60)
    folder.save(3, TENSORS, {})
    folder.wait()
    assert folder.read(3).step == 3 and not failures


def test_storage_is_not_asked_for_ever() -> None:
    pauses: list[float] = []

    def failing(number: int) -> Callable[[], None]:
        def call() -> None:
            raise OSError(number, os.strerror(number))

        return call

    with pytest.raises(StorageError, match=r"rows: storage has failed for 0.5 s .*resources.storage_retry_s"):
        retried(failing(errno.EIO), 0.5, "rows", lambda seconds: pauses.append(seconds))
    assert pauses == [0.1, 0.2]
    with pytest.raises(PermissionError):  # this does not pass
        retried(failing(errno.EACCES), 60, "rows")


def test_what_is_left_of_an_earlier_attempt_writes_no_more(tmp_path: Path) -> None:
    left, current = Worker(str(tmp_path)), Worker(str(tmp_path))
    left.restore()
    left.log({"step": 1})
    current.restore()
    with pytest.raises(SupersededError, match="another attempt"):
        left.log({"step": 2})
    with pytest.raises(SupersededError):
        left.save(2, TENSORS, {})
    current.log({"step": 1})
    current.save(1, TENSORS, {})
    current.flush()
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 1]


@pytest.mark.parametrize("damage", [change_a_bit, lose_the_manifest])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    inputs: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    method = MPO(demonstration_weight=0.1, training=QUICK.model_copy(update={"checkpoint_every": 3}))
    straight = off_policy_job(inputs, tmp_path / "straight", method)
    run_job(straight, Worker(straight.stage_dir))
    broken = off_policy_job(inputs, tmp_path / "broken", method)
    with pytest.raises(KilledError):
        run_job(broken, DyingWorker(broken.stage_dir))
    stage = tmp_path / "broken"
    damage(stage / "checkpoints" / "step-00000006")
    (stage / "checkpoints" / ".step-00000007-killed").mkdir()
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a row that was being written
    run_job(broken, Worker(broken.stage_dir))
    expected, resumed = weights(tmp_path / "straight"), weights(stage)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert [row["loss"] for row in metric_rows(stage)] == [row["loss"] for row in metric_rows(tmp_path / "straight")]
    faults = read_manifest(stage)["faults"]
    assert [fault["kind"] for fault in faults] == ["damaged_checkpoint", "resumed"]
    assert faults[0]["step"] == 6 and faults[1]["step"] == 3 and faults[1]["steps_lost"] == 4
    assert not (stage / "checkpoints").exists()  # a finished stage needs none
