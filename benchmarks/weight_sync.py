"""Seconds until generation actors have new weights of a real model: with all read back, with a sample, with none.

    python -m benchmarks.weight_sync [--devices N] [--updates N] [--model FOLDER]

SmolLM2-135M-Instruct in float32 by default, on this machine's CPUs, through Ray's object store. The first update of an
actor is compared whole, later ones by a sample of each matrix's columns (`generation/checksums.py`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable

import ray
import torch

from prefarena.config import Generation
from prefarena.generation.checksums import ColumnSample, checksums
from prefarena.generation.fleet import Generators
from prefarena.modeling.load import load_policy
from tests.helpers.real_model import smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    path = args.model or smollm2()
    weights = load_policy(path).state_dict()
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    settings = Generation(tensor_parallel=args.devices)
    fleet = Generators.start(path, settings, 64, use_gpu=False, names=("timed",), seed=0)
    try:
        mib = sum(tensor.numel() for tensor in weights.values()) * fleet.dtype.itemsize / 2**20
        print(f"{path}: {mib:.0f} MiB an update, {args.devices} device(s), {args.updates} updates")
        print(f"checksums alone, whole: {_seconds(weights, fleet.dtype, None):.2f} s")
        print(f"checksums alone, sample: {_seconds(weights, fleet.dtype, ColumnSample(1)):.2f} s")
        plain = Generators.connect(fleet.names, settings.model_copy(update={"verify_weights": False}))
        print(_line("without reading back", _updates(plain, weights, args.updates)))
        print(_line("first, all read back", _updates(fleet, weights, 1)))
        print(_line("later, a sample read back", _updates(fleet, weights, args.updates)))
        print(fleet.verified)
    finally:
        fleet.stop()
        ray.shutdown()


def _seconds(weights: dict[str, torch.Tensor], dtype: torch.dtype, sample: ColumnSample | None) -> float:
    began = time.perf_counter()
    checksums(weights, dtype, sample=sample)
    return time.perf_counter() - began


def _updates(fleet: Generators, weights: dict[str, torch.Tensor], number: int) -> list[float]:
    found = []
    for update in range(number):
        began = time.perf_counter()
        fleet.sync(weights.items(), f"timed@{update}")
        found.append(time.perf_counter() - began)
    return found


def _line(what: str, seconds: Iterable[float]) -> str:
    ordered = sorted(seconds)
    each = ", ".join(f"{one:.2f}" for one in ordered)
    return f"{what}: median {ordered[len(ordered) // 2]:.2f} s ({each})"


if __name__ == "__main__":
    main()
