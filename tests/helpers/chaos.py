"""Kills random processes of a running comparison at random points of its progress, and starts it again when it ends.

    python tests/helpers/chaos.py [CONFIG.yaml] [--kills 50] [--seed 1] [--out FILE]

runs a comparison, the embedded default where none is named, undisturbed and then disturbed, each from nothing, and
compares what they left: the numbers of the table, weights and metric rows. It ends with status 1 where they differ.

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
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.plan import make_plan
from prefarena import stage_files
from prefarena.config import Comparison, OnPolicyMethod, load_config
from prefarena.report.results import load_results
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
    seconds: float = 0.0
    _process: subprocess.Popen[bytes] | None = None
    _unrecovered: list[tuple[Kill, float, set[int]]] = field(default_factory=list)  # since when; the old witnesses

    def __post_init__(self) -> None:
        self._comparison = load_config(str(self.config), [])
        self._folders = training_folders(self._comparison)

    def run(self) -> None:
        """To the end, with all kills on the way. Raises what is wrong: no progress, an ending that nobody caused."""
        began = moved_at = killed_at = time.monotonic()
        best, todo = 0.0, sorted(self.kills, key=lambda kill: kill.point)
        while True:
            reached = progress(self._folders)
            if reached > best:
                best, moved_at = reached, time.monotonic()
                self._recovered()
            if todo and best >= todo[0].point and (killed := self._kill(todo[0])) is not None:
                killed_at = time.monotonic()
                self._unrecovered.append((todo.pop(0), killed_at, killed))
            status = self._process.poll() if self._process is not None else -1
            if status == 0:
                break
            if status is not None:
                expected = self._process is None or time.monotonic() - killed_at < _LIMIT_S / 2
                assert expected, f"ended with status {status}:\n{self.log()[-3000:]}"
                self._start()
            assert time.monotonic() - max(moved_at, killed_at) < _LIMIT_S, f"stuck at {best}:\n{self.log()[-3000:]}"
            time.sleep(_POLL_S)
        self.seconds = time.monotonic() - began
        for kill, since, _ in self._unrecovered:
            kill.seconds = time.monotonic() - since
        assert not todo, f"ended before it was disturbed by {todo}"

    def stop(self) -> None:
        """End the command, where it still runs."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log(self) -> str:
        return (self.config.parent / "log.txt").read_text(encoding="utf-8", errors="replace")

    def _start(self) -> None:
        self.num_starts += 1
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
        with (self.config.parent / "log.txt").open("a") as log:
            log.write(f"\n==== start {self.num_starts}\n")
            log.flush()
            command = [sys.executable, "-m", "pipelines", "compare", str(self.config)]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _kill(self, kill: Kill) -> set[int] | None:
        """Kill the first process of that kind: the ids of those that will have to be new; None: there was none."""
        found, witnesses = self._running(kill.kind), self._running(_witness(kill))
        try:
            if found:
                found[0].send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return None
        return {process.pid for process in witnesses} if found else None

    def _running(self, kind: str) -> list[psutil.Process]:
        """The processes of that kind."""
        if self._process is None or self._process.poll() is not None:
            return []
        name = VICTIMS[kind]
        try:
            run = psutil.Process(self._process.pid)
            if not name:
                return [run]
            return [child for child in run.children(recursive=True) if child.name().startswith(name[:15])]
        except psutil.NoSuchProcess:
            return []

    def _recovered(self) -> None:
        """Of kills that the run is past, take the time: a new process works, and there was progress since.

        Workers may go on for a while without controller, node or driver: that is not yet recovery.
        """
        left = []
        for kill, since, then in self._unrecovered:
            if any(process.pid not in then for process in self._running(_witness(kill))):
                kill.seconds = time.monotonic() - since
            else:
                left.append((kill, since, then))
        self._unrecovered = left


def _witness(kill: Kill) -> str:
    """The kind of process that must be a new one when a kill is recovered from; without any other no worker goes on."""
    return kill.kind if kill.kind == "generation actor" else "training worker"


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
    return stage_files.last_row(folder / stage_files.METRICS)


def generating_span(config: Comparison) -> tuple[float, float]:
    """Between which shares of the steps generation actors surely run: on-policy jobs are the last ones."""
    on_policy = {
        trained.training.folder
        for plan in make_plan(config)
        for trained in plan.trained
        if trained.training is not None and isinstance(trained.entry.method, OnPolicyMethod)
    }
    share = len(on_policy) / len(training_folders(config))
    return 1 - 0.9 * share, 1 - 0.15 * share


def plan_kills(num_kills: int, seed: int, generating: tuple[float, float]) -> list[Kill]:
    """Kinds in turn, at random points; those of generation actors between the shares `generating`."""
    source = random.Random(seed)
    kinds = [list(VICTIMS)[number % len(VICTIMS)] for number in range(num_kills)]
    return [Kill(kind, source.uniform(*(generating if kind == "generation actor" else (0.01, 0.99)))) for kind in kinds]


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


def write_config(tree: dict[str, Any], folder: Path) -> Path:
    """A comparison that keeps everything in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "output": str(folder / "runs")}), encoding="utf-8")
    return path


def differences(whole: Path, broken: Path) -> list[str]:
    """What the stages and tables of two configurations' runs differ in, times apart; empty: nothing."""
    found = []
    for pattern, of_file in (("*.safetensors", bytes), ("metrics.jsonl", _timeless)):
        ours, theirs = (_stage_files(config, pattern) for config in (broken, whole))
        found += [f"{name} is not in both" for name in sorted(ours.keys() ^ theirs.keys())]
        both = sorted(ours.keys() & theirs.keys())
        found += [f"{name} differs" for name in both if of_file(ours[name]) != of_file(theirs[name])]
    tables = [_table(config) for config in (whole, broken)]
    return found + (["the tables differ"] if tables[0] != tables[1] else [])


def _stage_files(config: Path, pattern: str) -> dict[str, bytes]:
    stages = config.parent / "runs" / "stages"
    return {str(path.relative_to(stages)): path.read_bytes() for path in sorted(stages.rglob(pattern))}


def _timeless(content: bytes) -> list[dict[str, Any]]:
    clocks = ("time/", "tokens_per_second", "steps_per_second")
    rows = [json.loads(line) for line in content.splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(clocks)} for row in rows]


def _table(config: Path) -> list[Any]:
    return [entry.seeds for entry in load_results(run_folder(config)).entries]


def run_folder(config: Path) -> Path:
    """Of the one comparison in this configuration's output."""
    return next((config.parent / "runs").glob("*/results.json")).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a comparison; the embedded default where it is left out")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result there")
    arguments = parser.parse_args()
    config = load_config(arguments.config, [f"resources.max_failures={arguments.kills}"])
    with tempfile.TemporaryDirectory() as folder:
        tree = config.model_dump(mode="json")
        whole, broken = (write_config(tree, Path(folder) / name) for name in ("whole", "broken"))
        undisturbed = Disturbed(whole, [])
        undisturbed.run()
        run = Disturbed(broken, plan_kills(arguments.kills, arguments.seed, generating_span(config)))
        run.run()
        found = differences(whole, broken)
        lines = [
            f"{config.name}: undisturbed {undisturbed.seconds:.0f} s, disturbed {run.seconds:.0f} s, both from nothing",
            summary(run),
            *(found or ["tables, weights and metric rows are equal, bit for bit"]),
        ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
