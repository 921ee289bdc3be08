"""`output` on S3, from a real server on loopback: stages, leases, checkpoints, and whole comparisons with kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from s3 import BUCKET, fs, server
from test_end_to_end import LANGUAGE, QUICK

from pipelines.compare import compare
from pipelines.tracking import final_rows
from prefarena import leases, mirror, stores
from prefarena.config import parse_config
from prefarena.errors import UserError
from prefarena.leases import Leases
from prefarena.stages import Stage
from prefarena.training.checkpoints import newest_step
from prefarena.training.worker import Worker

__all__ = ["fs", "server"]  # fixtures

LIMIT_S = 200.0


def node(tmp_path: Path, name: str, prefix: str) -> Path:
    """Where a node of that name has its stages."""
    return mirror.root_of(f"s3://{BUCKET}/{prefix}", str(tmp_path / name))


def test_a_stage_is_finished_when_its_manifest_is_there_and_other_nodes_bring_what_they_read(
    fs: Any, tmp_path: Path
) -> None:
    here, there = (Stage.at(node(tmp_path, name, "stage") / "stages", "data", "text", 1) for name in ("a", "b"))
    (here.begin() / "model").mkdir()
    (here.folder / "model" / "weights").write_text("1")
    mirror.push(here.folder / "model")
    assert not here.finished and not there.finished
    here.finish(number=1)
    assert there.finished and there.manifest()["number"] == 1 and not there.folder.exists()
    mirror.bring(there.folder / "model")
    assert (there.folder / "model" / "weights").read_text() == "1"
    (there.folder / "model" / "weights").write_text("of an attempt that was lost")
    mirror.bring_anew(there.folder / "model")
    assert (there.folder / "model" / "weights").read_text() == "1"
    time.sleep(0.01)
    (there.begin() / "model").mkdir()  # done again elsewhere: what the first node has is no longer the stage's
    (there.folder / "model" / "weights").write_text("2")
    there.finish(number=2)
    mirror.bring(here.folder / "model")
    assert (here.folder / "model" / "weights").read_text() == "2"


def test_one_of_several_takes_a_lease_and_a_dead_holder_loses_it(
    fs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [node(tmp_path, name, "leases") / "leases" / "one.json" for name in "ab"]
    with Leases(renew_s=0.2, stale_s=1.0) as first, Leases(renew_s=0.2, stale_s=1.0) as second:
        assert first.take(paths[0]) is None
        for _ in range(8):  # as long as it is renewed it is kept
            assert second.take(paths[1]) is not None
            time.sleep(0.2)
    with Leases(renew_s=100.0, stale_s=1.0) as silent, Leases(renew_s=0.2, stale_s=1.0) as second:
        assert silent.take(paths[0]) is None
        deadline = time.monotonic() + 20
        while second.take(paths[1]) is not None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert second.take(paths[1]) is None
        silent.release(paths[0])  # no longer its own to give back
        assert fs.exists(f"{BUCKET}/leases/leases/one.json")
    assert leases.Leases is Leases and not fs.exists(f"{BUCKET}/leases/leases/one.json")


def test_a_stale_mark_replaces_nothing(fs: Any) -> None:
    url = f"s3://{BUCKET}/marks/x"
    assert stores.create(url, b"1") and not stores.create(url, b"2")
    found = stores.read_tagged(url)
    assert found is not None and stores.replace(url, b"3", found[1]) and not stores.replace(url, b"4", found[1])
    assert stores.read(url) == b"3"
    stores.remove(url)
    assert not stores.replace(url, b"5", found[1]) and stores.read(url) is None


def test_a_checkpoint_is_found_from_a_node_that_has_nothing(fs: Any, tmp_path: Path) -> None:
    folders = [str(node(tmp_path, name, "job") / "stages" / "dpo-a-1") for name in "ab"]
    first = Worker(folders[0])
    assert first.restore() is None
    for step in (1, 2, 3):
        first.log({"step": step})
        first.save(step, {"w": torch.full((3,), float(step))}, {"n": step})
    first.log({"step": 4})
    first.flush()
    assert newest_step(Path(folders[1])) == 3  # for whoever follows the training from elsewhere
    assert [row["step"] for row in final_rows(Path(folders[1]), 3)] == [1, 2, 3]
    second = Worker(folders[1])
    found = second.restore()
    assert (
        found is not None and found.step == 3 and found.state == {"n": 3} and found.tensors["w"].tolist() == [3.0] * 3
    )
    second.stage_log.forget_rows_after(3)
    rows = (second.stage_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="another attempt"):
        first.log({"step": 5})
    fs.pipe_file(f"{BUCKET}/job/stages/dpo-a-1/checkpoints/step-00000003/rank-0.safetensors", b"cut")
    third = Worker(str(node(tmp_path, "c", "job") / "stages" / "dpo-a-1")).restore()
    assert third is not None and third.step == 2
    second.drop_checkpoints()
    assert not [name for name in fs.find(f"{BUCKET}/job") if "checkpoints" in name]


@pytest.mark.parametrize(("output", "told"), [("s3://no-such-bucket/x", "bucket does not exist")])
def test_an_output_that_cannot_be_used_is_one_sentence(fs: Any, output: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        compare(parse_config({**LANGUAGE, "output": output}), None)  # type: ignore[arg-type]  # before it is used
    assert stores.check_output(f"s3://{BUCKET}/fine") is None


# --------------------------------------------------------------------------------------- whole comparisons

LONG = {**QUICK, "num_steps": 400, "log_every": 20, "checkpoint_every": 40}


class Run:
    """A comparison as a command, on a machine whose cache is its own."""

    def __init__(self, server: dict[str, str], folder: Path, tree: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "resources": {"cache_dir": str(folder / "cache")}}))
        self.log = folder / "log.txt"
        root = Path(__file__).parents[2]
        environment = {**os.environ, **server, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        command = [sys.executable, "-m", "pipelines", "compare", str(folder / "config.yaml")]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> str:
        assert self.process.wait(LIMIT_S) == 0, self.log.read_text()[-3000:]
        return self.log.read_text()

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("ray::RayTrainWorker"[:15])]

    def end(self) -> None:
        """The machine goes, with all that runs on it."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def until(found: Any, run: Run) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (value := found()):
        assert run.process.poll() is None and time.monotonic() < deadline, run.log.read_text()[-3000:]
        time.sleep(0.1)
    return value


@pytest.mark.long
def test_two_machines_share_stages_and_a_killed_one_goes_on_from_its_checkpoint_with_an_empty_cache(
    fs: Any, server: dict[str, str], tmp_path: Path
) -> None:
    """Two machines at once; on one the training worker is killed, then the machine; another goes on in its place."""
    entries = [{"name": "sft", "method": {"kind": "sft", "training": LONG}}]
    tree = {**LANGUAGE, "entries": entries, "output": f"s3://{BUCKET}/two"}
    first = Run(server, tmp_path / "a", {**tree, "name": "first"})
    whole = f"{BUCKET}/two/stages/sft-*/checkpoints/*/manifest.json"
    until(lambda: fs.glob(whole), first)
    until(first.workers, first)[0].send_signal(signal.SIGKILL)
    until(lambda: any("faults.jsonl" in name for name in fs.find(f"{BUCKET}/two/stages")), first)
    first.end()
    shutil.rmtree(tmp_path / "a" / "cache")
    (before,) = {name.split("/")[3] for name in fs.glob(whole)}
    second = Run(server, tmp_path / "b", {**tree, "name": "second"})
    third = Run(server, tmp_path / "c", {**tree, "name": "third"})
    texts = [second.wait(), third.wait()]
    done = [text.count("✓ training sft-s0") for text in texts]
    assert sorted(done) == [0, 1], texts
    assert not any("training reference …" in text for text in texts)  # the first machine did it
    manifest = json.loads(fs.cat_file(f"{BUCKET}/two/stages/{before}/manifest.json"))
    resumed = [fault for fault in manifest["faults"] if fault["kind"] == "resumed"]
    assert len(resumed) == 2 and all(fault["step"] >= 40 for fault in resumed), manifest["faults"]
    left = fs.find(f"{BUCKET}/two")
    assert sum(name.endswith("report.md") for name in left) == 2 and any(
        name.endswith("/results.json") for name in left
    )
    assert not any("/checkpoints/step" in name or "/leases/" in name for name in left if "first" not in name)
    results = [json.loads(fs.cat_file(name)) for name in left if name.endswith("/results.json")]
    rows = [{e["name"]: e["seeds"] for e in result["entries"]} for result in results]
    assert rows[0] == rows[1]
