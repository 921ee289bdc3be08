"""Runs a comparison on a local cluster of three nodes, takes one away while its worker trains, and brings it back."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray
from chaos import last_row, training_folders
from ray.cluster_utils import Cluster
from rich.console import Console

from pipelines.compare import compare
from prefarena.config import Comparison, load_config

_LIMIT_S = 240.0
_AT_STEP = 100


def main(config: Comparison) -> None:
    # The head has no CPUs, so workers are on the other two: one each, and none too many.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2, include_dashboard=False) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            compare(config, Console(width=170))
        except BaseException as error:
            errors.append(error)

    running = threading.Thread(target=run)
    running.start()
    (folder,) = training_folders(config)

    def reached(step: int) -> bool:
        row = last_row(folder)
        return row is not None and row["step"] >= step

    wait(lambda: reached(_AT_STEP), running, "the first steps")
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.wait_for_nodes()
    print("a node was taken away", flush=True)
    cluster.add_node(num_cpus=2, include_dashboard=False)
    print("a node was brought back", flush=True)
    running.join(_LIMIT_S)
    assert not running.is_alive(), f"not done {_LIMIT_S:g} s after the node came back"
    if errors:
        raise errors[0]
    faults = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["faults"]
    print(json.dumps([fault for fault in faults if fault["kind"] == "resumed"]))
    ray.shutdown()
    cluster.shutdown()


def wait(holds: Callable[[], bool], running: threading.Thread, what: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not holds():
        assert running.is_alive(), f"ended before {what}"
        assert time.monotonic() < deadline, f"waited {_LIMIT_S:g} s for {what}"
        time.sleep(0.05)


if __name__ == "__main__":
    main(load_config(str(Path(sys.argv[1])), []))
