"""Peak memory of preparing a text task, for two sizes of data: it must not grow with the data.

    python benchmarks/prepare_memory.py --rows 10000 200000 --repeats 3

Every run is a fresh process with its own Ray. Memory is the sum of the proportional set sizes (PSS) of that process
and all its descendants (Ray's daemons, the object store and the workers), sampled every 0.2 s; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def write_pairs(path: Path, num_rows: int) -> None:
    words = [f"word{i}" for i in range(3000)]
    source = random.Random(0)

    def text(size: int) -> str:
        return " ".join(source.choices(words, k=size))

    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            row = {"prompt": f"{i} {text(60)}?", "chosen": f" {text(60)}", "rejected": f" {text(60)}"}
            file.write(json.dumps(row) + "\n")


def tree_pss_mib(root: int) -> float:
    """Summed PSS of a process and its descendants, MiB."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, todo = 0, [root]
    while todo:
        process = todo.pop()
        todo += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def child(data: str, output: str, tokenizer: str | None) -> None:
    import ray

    from pipelines.preferences import prepare_text
    from prefarena.config import ScratchModel, TextTask

    peak, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.2):
            peak = max(peak, tree_pss_mib(os.getpid()))

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    task = TextTask(data=data, max_prompt_tokens=512, max_response_tokens=512)
    summary = prepare_text(task, tokenizer, ScratchModel(), output)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    print(json.dumps({"peak_mib": peak, "seconds": seconds, "rows": summary["num_rows"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("DATA", "OUTPUT", "TOKENIZER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], arguments.child[1], arguments.child[2] or None)
    from pipelines.preferences import prepare_tokenizer
    from prefarena.config import ScratchModel, TextTask

    medians: list[float] = []
    print(f"{'rows':>9} {'input MiB':>10} {'peak MiB (median)':>18} {'ratio':>6} {'rows/s':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.rows:
            data = Path(folder) / f"{size}.jsonl"
            write_pairs(data, size)
            tokenizer = Path(folder) / "tokenizer"
            if not tokenizer.exists():
                prepare_tokenizer(TextTask(data=str(data), max_rows=2000), ScratchModel(), tokenizer)
            results = []
            for i in range(arguments.repeats):
                command = [sys.executable, __file__, "--child", str(data), f"{folder}/out-{size}-{i}", str(tokenizer)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
                results.append(json.loads(done.stdout.splitlines()[-1]))
            medians.append(statistics.median(result["peak_mib"] for result in results))
            rate = size / statistics.median(result["seconds"] for result in results)
            mib = data.stat().st_size / 2**20
            print(f"{size:9} {mib:10.1f} {medians[-1]:18.0f} {medians[-1] / medians[0]:6.2f} {rate:8.0f}", flush=True)


if __name__ == "__main__":
    main()
