"""Kills random processes of a running comparison at random points of its progress, and starts it again when it ends.

    python tests/chaos.py CONFIG.yaml --kills 50 --seed 1      a longer one, on a comparison of your own

Points are shares of all training steps, so a slow machine is disturbed as often as a fast one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.plan import make_plan
from prefarena.config import Comparison, load_config
from prefarena.stages import is_finished

#: Kind of victim to the start of its process's name. "node" is the raylet, without which all that it runs ends.
VICTIMS = {
    "training worker": "ray::RayTrainWorker",
    "generation actor": "ray::GenerationActor",
    "controller": "ray::TrainController",
    "node": "raylet",
    "driver": "",
}
_LIMIT_S = 300.0
_POLL_S = 0.05


@dataclass
class Kill:
    """One of the run's kills: what, at which share of the steps, and how long until the run was past that again."""

    kind: str
    point: float
    seconds: float = 0.0


@dataclass
class Disturbed:
    """A comparison that is run as a command, disturbed, and run again until it ends well."""

    config: Path
    kills: list[Kill]
    num_starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _unrecovered: list[tuple[Kill, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._comparison = load_config(str(self.config), [])
        self._folders = training_folders(self._comparison)

    def run(self) -> None:
        """To the end, with all kills on the way. Raises what is wrong: no progress, an ending that nobody caused."""
        best, killed_at, todo = 0.0, time.monotonic(), sorted(self.kills, key=lambda kill: kill.point)
        moved_at = time.monotonic()
        while True:
            reached = progress(self._folders)
            if reached > best:
                best, moved_at = reached, time.monotonic()
                self._recovered()
            if todo and best >= todo[0].point and self._kill(todo[0]):
                self._unrecovered.append((todo.pop(0), time.monotonic()))
                killed_at = time.monotonic()
            status = self._process.poll() if self._process is not None else -1
            if status == 0:
                break
            if status is not None:
                expected = self._process is None or time.monotonic() - killed_at < _LIMIT_S / 2
                assert expected, f"ended with status {status}:\n{self.log()[-3000:]}"
                self._start()
            assert time.monotonic() - max(moved_at, killed_at) < _LIMIT_S, f"stuck at {best}:\n{self.log()[-3000:]}"
            time.sleep(_POLL_S)
        self._recovered()
        assert not todo, f"ended before it was disturbed by {todo}"

    def log(self) -> str:
        return (self.config.parent / "log.txt").read_text(encoding="utf-8", errors="replace")

    def _start(self) -> None:
        self.num_starts += 1
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
        with (self.config.parent / "log.txt").open("a") as log:
            log.write(f"\n==== start {self.num_starts}\n")
            log.flush()
            command = [sys.executable, "-m", "pipelines.cli", "compare", str(self.config)]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _kill(self, kill: Kill) -> bool:
        """Whether there was a process of that kind, and it was killed."""
        if self._process is None or self._process.poll() is not None:
            return False
        run = psutil.Process(self._process.pid)
        name = VICTIMS[kill.kind]
        try:
            found = [child for child in run.children(recursive=True) if child.name().startswith(name[:15])]
            victims = found if name else [run]
            if victims:
                victims[0].send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        return bool(victims)

    def _recovered(self) -> None:
        for kill, since in self._unrecovered:
            kill.seconds = time.monotonic() - since
        self._unrecovered = []


def training_folders(config: Comparison) -> list[Path]:
    """Of all training stages, in order."""
    stages = []
    for plan in make_plan(config):
        stages += [plan.reference] if config.reference.train else []
        stages += [stage for trained in plan.trained for stage in (trained.reward_model, trained.training) if stage]
    return list(dict.fromkeys(stage.folder for stage in stages))


def progress(folders: list[Path]) -> float:
    """Share of the training steps that are done: between 0 and 1, every job weighing alike."""
    return sum(_share(folder) for folder in folders) / len(folders)


def _share(folder: Path) -> float:
    if is_finished(folder):
        return 1.0
    row = last_row(folder)
    return row["step"] / row["num_steps"] if row else 0.0


def last_row(folder: Path) -> dict[str, Any] | None:
    """The newest whole metric row of a training stage."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None


def plan_kills(num_kills: int, seed: int, generating: Callable[[random.Random], float]) -> list[Kill]:
    """Kinds in turn, at random points; those of generation actors where `generating` says that there are some."""
    source = random.Random(seed)
    kinds = [list(VICTIMS)[number % len(VICTIMS)] for number in range(num_kills)]
    return [
        Kill(kind, generating(source) if kind == "generation actor" else source.uniform(0.01, 0.99)) for kind in kinds
    ]


def steps_lost(folders: list[Path]) -> int:
    """Steps that were done again, of all jobs, as their manifests tell."""
    manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in folders]
    return sum(fault.get("steps_lost", 0) for manifest in manifests for fault in manifest["faults"])


def summary(run: Disturbed) -> str:
    """What was killed, when, how long it took to be past that point again, and how many steps were done again."""
    lines = [f"  {kill.kind} at {kill.point:.0%} of the steps: {kill.seconds:.1f} s" for kill in run.kills]
    folders = training_folders(load_config(str(run.config), []))
    return "\n".join(
        [
            f"{len(run.kills)} kills, the command was started {run.num_starts} times, {steps_lost(folders)} steps were "
            "done again; from the kill until the run was further than before it:",
            *lines,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generating", type=float, nargs=2, default=(0.8, 0.95), help="shares in which actors run")
    arguments = parser.parse_args()
    kills = plan_kills(arguments.kills, arguments.seed, lambda source: source.uniform(*arguments.generating))
    run = Disturbed(arguments.config, kills)
    run.run()
    print(summary(run))


if __name__ == "__main__":
    main()
