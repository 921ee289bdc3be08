"""What a preference step costs as its parts grow, and on one worker and several: Prefarena's step, on this machine.

    python benchmarks/scaling.py [--only workers] [--out FILE]

Every point is a run of its own: fresh processes, a model with random weights, random tokens, a first pass over the
pairs that is not counted and then `PASSES` more. Seconds are the median pass; memory is the most that a worker
ever held, less what it held before the model was loaded; states are weights, gradients and AdamW's two moments in
float32. Exponents are least-squares fits of log cost to log size. Needs no Ray: workers talk by gloo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from preference_setting import Setting, num_parameters, write_spec
from random_pairs import random_pairs, word_tokenizer
from sides import Report, Side, machine, memory_mib, serve, versions
from step_ours import PRODUCTION, Step

from prefarena.config import ScratchModel
from prefarena.data.tables import read_rows, write_rows
from prefarena.records import REFERENCED_PAIRS
from prefarena.training.worker import Worker

PASSES = 3
#: Largest difference of a step's loss between numbers of workers.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Point:
    """One run. prompt, response: tokens of each prompt and of each response; pairs: of one pass, 8 a step."""

    width: int = 128
    layers: int = 4
    vocabulary: int = 4096
    prompt: int = 64
    response: int = 32
    pairs: int = 32
    mode: str = "alone"
    workers: int = 1
    threads: int = 2

    @property
    def model(self) -> ScratchModel:
        return ScratchModel(
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.width // 32,
            intermediate_size=self.width * 11 // 4,
            vocab_size=self.vocabulary,
        )


@dataclass(frozen=True)
class Series:
    """Points that differ in one thing; `size` is what the fitted cost is a power of, None: nothing is fitted."""

    name: str
    title: str
    points: tuple[Point, ...]
    label: Callable[[Point], str]
    size: Callable[[Point], float] | None = None


_POINT = Point()
SERIES = (
    Series(
        "workers",
        "workers",
        (
            replace(_POINT, width=256, layers=6, threads=2),
            replace(_POINT, width=256, layers=6, threads=1),
            replace(_POINT, width=256, layers=6, threads=1, mode="ddp", workers=2),
            replace(_POINT, width=256, layers=6, threads=1, mode="fsdp2", workers=2),
        ),
        lambda point: f"{point.workers} ({point.mode}), {point.threads} threads each",
    ),
    Series(
        "model",
        "width and layers",
        tuple(replace(_POINT, width=w, layers=n) for w, n in ((64, 2), (128, 4), (256, 6), (512, 8))),
        lambda point: f"{point.width} x {point.layers}",
    ),
    Series(
        "length",
        "tokens of a prompt (a response has half)",
        tuple(replace(_POINT, prompt=n, response=n // 2) for n in (32, 64, 128, 256, 512)),
        lambda point: str(point.prompt),
        lambda point: point.prompt,
    ),
    Series(
        "vocabulary",
        "vocabulary",
        tuple(replace(_POINT, vocabulary=n) for n in (8192, 32768, 131072)),
        lambda point: str(point.vocabulary),
        lambda point: point.vocabulary,
    ),
    Series(
        "pairs",
        "pairs of a pass",
        tuple(replace(_POINT, pairs=n) for n in (32, 64, 128, 256)),
        lambda point: str(point.pairs),
        lambda point: point.pairs,
    ),
)


# --------------------------------------------------------------------------------------------------- a worker


class GlooWorker(Worker):
    """One of several workers that meet at a file."""

    def __init__(self, folder: str, rank: int, world_size: int, sharding: Literal["none", "fsdp"]) -> None:
        super().__init__(f"{folder}/rank-{rank}")
        self.rank, self.world_size, self.sharding = rank, world_size, sharding
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)


#: How workers share a step.
MODES: dict[str, Callable[[str, int, int], Worker]] = {
    "alone": lambda folder, rank, world_size: Worker(folder),
    "ddp": partial(GlooWorker, sharding="none"),
    "fsdp2": partial(GlooWorker, sharding="fsdp"),
}


def work(path: str, rank: int) -> None:
    """A worker's process: a pass over the pairs for each line on stdin."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    point = Point(**spec["point"])
    torch.set_num_threads(point.threads)
    before = memory_mib("VmRSS")
    Path(spec["output"]).mkdir(exist_ok=True)
    worker = MODES[point.mode](spec["output"], rank, point.workers)
    step = Step(spec, PRODUCTION | {"method": "mpo"}, worker)

    def one_pass() -> dict[str, Any]:
        began, losses = time.perf_counter(), []
        for i in range(spec["num_steps"]):
            step(i)
            losses.append(step.loss())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "losses": losses, "mib": memory_mib("VmHWM") - before}

    serve(one_pass)


# ---------------------------------------------------------------------------------------------------- a point


@dataclass(frozen=True)
class Cost:
    """Of one point: seconds per pass, the largest worker's memory, what of it the states are, and losses by step."""

    seconds: float
    mib: float
    states_mib: float
    losses: list[float]


def measure(point: Point) -> Cost:
    """Run `point`. Raises RuntimeError with the end of a worker's log where one died."""
    setting = Setting("scaling", "", num_steps=point.pairs // 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = np.tile((point.prompt, point.response, point.response), (point.pairs, 1))
        pairs = random_pairs(lengths, point.vocabulary, setting.seed)
        path = write_spec(setting, point.model, pairs, word_tokenizer(point.vocabulary), folder)
        spec = json.loads(path.read_text(encoding="utf-8")) | {"point": asdict(point)}
        path.write_text(json.dumps(spec), encoding="utf-8")
        _write_unreferenced(spec)
        command = [sys.executable, __file__, "--worker", str(path)]
        sides = [Side([*command, str(rank)], folder / f"{rank}.log", point.threads) for rank in range(point.workers)]
        try:
            passes = [_together(sides) for _ in range(1 + PASSES)]
        finally:
            for side in sides:
                side.end()
        parameters = num_parameters(folder / "policy")
    return Cost(
        seconds=statistics.median(max(one["seconds"] for one in of_all) for of_all in passes[1:]),
        mib=max(one["mib"] for one in passes[-1]),
        states_mib=parameters * 16 / 2**20,
        losses=[loss for of_all in passes for loss in of_all[0]["losses"]],
    )


def _together(sides: list[Side]) -> list[dict[str, Any]]:
    for side in sides:
        side.ask()
    return [side.result() for side in sides]


def _write_unreferenced(spec: dict[str, Any]) -> None:
    """MPO without a reference learns nothing from these columns."""
    table = read_rows(spec["pairs_table"])
    for name in ("ref_chosen_logp", "ref_rejected_logp"):
        table = table.append_column(name, pa.array(np.zeros(len(table), dtype=np.float32)))
    write_rows(table, spec["referenced_table"], REFERENCED_PAIRS)


# ---------------------------------------------------------------------------------------------------- report


def exponent(sizes: list[float], costs: list[float]) -> float:
    """b of the least-squares fit log cost = a + b log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def lines_of(series: Series, costs: list[Cost]) -> list[str]:
    lines = [f"{series.title:42}{'s a pass':>10}{'pairs/s':>9}{'MiB':>8}{'states':>8}{'beyond':>8}{'loss diff.':>12}"]
    for point, cost in zip(series.points, costs, strict=True):
        drift = f"{_drift(costs[0], cost):.1e}" if series.name == "workers" else "–"
        lines.append(
            f"  {series.label(point):40}{cost.seconds:10.3f}{point.pairs / cost.seconds:9.1f}{cost.mib:8.0f}"
            f"{cost.states_mib:8.0f}{cost.mib - cost.states_mib:8.0f}{drift:>12}"
        )
    if series.size is not None:
        sizes = [series.size(point) for point in series.points]
        seconds, memory = ([getattr(cost, name) for cost in costs] for name in ("seconds", "mib"))
        lines.append(f"  exponents: seconds {exponent(sizes, seconds):.2f}, memory {exponent(sizes, memory):.2f}")
    return [*lines, ""]


def _drift(one: Cost, other: Cost) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[series.name for series in SERIES], help="one series")
    parser.add_argument("--out", type=Path, help="also write the result there")
    parser.add_argument("--worker", nargs=2, metavar=("SPEC", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], int(arguments.worker[1]))
        return
    report = Report(arguments.out)
    report.say(
        [f"The preference step (MPO, 8 pairs per step, float32): {versions('torch', 'transformers')}", machine(), ""]
    )
    for series in SERIES:
        if arguments.only not in (None, series.name):
            continue
        costs = [measure(point) for point in series.points]
        report.say(lines_of(series, costs))
        if series.name == "workers" and max(_drift(costs[0], cost) for cost in costs) > TOLERANCE:
            sys.exit(f"losses differ by more than {TOLERANCE:g} between numbers of workers")
    report.save()


if __name__ == "__main__":
    main()
