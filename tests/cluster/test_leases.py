"""Leases in shared storage: one holder, dead ones are found out, and nobody's lease is taken by mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from waiting import wait_until

from pipelines.claims import lease_of, only_once, settle
from prefarena.errors import UserError
from prefarena.leases import Leases
from prefarena.stages import write_failure, write_manifest

TAKE_AND_DIE = """
import os, sys
from pathlib import Path
from prefarena.leases import Leases
with Leases() as leases:
    assert leases.take(Path(sys.argv[1])) is None
    os._exit(9)
"""


def dead_holder(path: Path) -> None:
    """A lease whose process ended without giving it back."""
    process = subprocess.run([sys.executable, "-c", TAKE_AND_DIE, str(path)], timeout=120)
    assert process.returncode == 9 and path.exists()


def of_another_machine(path: Path) -> None:
    """Make a lease that of a machine whose processes cannot be seen."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "elsewhere", "host": "node-7"}))


def test_a_lease_has_one_holder_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "stage.json"
    with Leases() as first, Leases() as second:
        assert first.take(path) is None and first.take(path) is None
        holder = second.take(path)
        assert holder is not None and holder.pid == os.getpid() and not holder.is_dead()
        first.release(path)
        assert second.take(path) is None
        first.release(path)  # not its own any more
        assert path.exists()
    assert not path.exists()


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    dead_holder(path)
    with Leases(stale_s=1e9) as leases:
        assert leases.take(path) is None


def test_a_lease_of_another_machine_is_taken_when_it_is_renewed_no_more(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    dead_holder(path)
    of_another_machine(path)
    with Leases(stale_s=0.5) as leases:
        holder = leases.take(path)
        assert holder is not None and str(holder).endswith(holder.since) and "node-7" in str(holder)
        wait_until(lambda: leases.take(path) is None, "the lease to grow old")


def test_a_lease_that_is_renewed_is_never_taken(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    with Leases(renew_s=0.05) as first, Leases(stale_s=1.5) as second:
        first.take(path)
        beats, started = set(), time.monotonic()
        while time.monotonic() - started < 3:
            assert second.take(path) is not None
            beats.add(json.loads(path.read_text())["beat"])
            time.sleep(0.02)
    assert len(beats) > 5


def test_of_many_that_find_a_dead_holder_one_gets_the_lease(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    for _ in range(10):
        dead_holder(path)
        takers, start = [Leases() for _ in range(8)], threading.Barrier(8)
        taken: list[Leases] = []

        def race(leases: Leases, start: threading.Barrier, taken: list[Leases]) -> None:
            start.wait(60)
            if leases.take(path) is None:
                taken.append(leases)

        for _ in range(20):
            if taken:
                break
            threads = [threading.Thread(target=race, args=(leases, start, taken)) for leases in takers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert len(taken) == 1
        taken[0].release(path)


def test_the_same_comparison_twice_says_that_it_is_running(tmp_path: Path) -> None:
    folder = tmp_path / "mini-0123abcd"
    with only_once("mini", folder):
        again, message = only_once("mini", folder), rf"'mini' is already running: process {os.getpid()} on .*, since 20"
        with pytest.raises(UserError, match=message):
            again.__enter__()
        with only_once("other", tmp_path / "other-0123abcd"):
            pass
    with only_once("mini", folder):
        pass


def test_stages_of_others_are_waited_for_or_taken_over(tmp_path: Path) -> None:
    stages = {tmp_path / "stages" / name: name for name in ("ours", "theirs", "orphan", "failing", "done")}
    folders = {name: folder for folder, name in stages.items()}
    write_manifest(folders["done"], {})
    dead_holder(lease_of(folders["orphan"]))
    done: list[list[str]] = []
    console = Console(record=True, width=200)

    def work(names: list[str]) -> None:
        done.append(names)
        for name in names:
            if name == "failing":
                write_failure(folders[name], "not a number")
            else:
                write_manifest(folders[name], {})

    with Leases() as other:
        assert other.take(lease_of(folders["theirs"])) is None
        thread = threading.Thread(target=settle, args=(console, stages, work))
        thread.start()
        wait_until(lambda: len(done) == 1, "the first batch")
        wait_until(lambda: "waiting for theirs" in console.export_text(clear=False), "the line that tells of the wait")
        write_manifest(folders["theirs"], {})
    thread.join(60)
    assert done == [["ours", "orphan", "failing"]]
    assert not list((tmp_path / "leases").iterdir())


def test_a_stage_that_another_ends_in_the_meantime_is_not_waited_for(tmp_path: Path) -> None:
    """Who holds a stage is told when nothing else is to be done: what was read before the work may be long past."""
    stages = {tmp_path / "stages" / name: name for name in ("ours", "theirs")}
    console = Console(record=True, width=200)

    def work(names: list[str]) -> None:
        assert names == ["ours"]
        for folder in stages:  # the other comparison finishes its own beside it
            write_manifest(folder, {})

    with Leases() as other:
        assert other.take(lease_of(tmp_path / "stages" / "theirs")) is None
        settle(console, stages, work)
    assert console.export_text() == ""
