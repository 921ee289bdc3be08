"""Peak memory, speed and CPU use of preparing a text task, by the size of the data: memory must not grow with it.

    python benchmarks/prepare_memory.py --rows 10000 200000 --repeats 3

Every run is a fresh process with its own Ray. Memory is the sum of the proportional set sizes (PSS) of that process
and all its descendants (Ray's daemons, the object store and the workers), sampled every 0.5 s. `cores` is the CPU time
of all of them, in user and kernel mode, per second between the first and the last table row; start-up is left out, as
it is in `rows/s, flowing`. `idle` is the share of all cores' time in which nothing ran, whoever's. Linux only.
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

import pyarrow as pa


def write_pairs(path: Path, num_rows: int) -> None:
    """Different pairs of about 180 words, 1.5 kB a row."""
    source = random.Random(0)
    pool = [f"word{source.randrange(3000)}" for _ in range(100_000)]

    def text(size: int) -> str:
        start = source.randrange(len(pool) - size)
        return " ".join(pool[start : start + size])

    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            row = {"prompt": f"{i} {text(60)}?", "chosen": f" {text(60)}", "rejected": f" {text(60)}"}
            file.write(json.dumps(row) + "\n")


def idle_seconds() -> float:
    """Idle time of all cores since the machine's start."""
    return int(Path("/proc/stat").read_text().split(maxsplit=5)[4]) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Samples a process and its descendants until it is stopped: peak of their summed PSS, and their CPU time."""

    def __init__(self, root: int) -> None:
        self.peak_mib = 0.0
        self._root = root
        self._cpu: dict[int, float] = {}  # seconds by process, those that have ended included
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cpu_seconds(self) -> float:
        return sum(list(self._cpu.values()))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self.peak_mib = max(self.peak_mib, self._sample())

    def _sample(self) -> float:
        """Summed PSS, MiB."""
        children: dict[int, list[int]] = {}
        cpu: dict[int, float] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it has ended
                    continue
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                cpu[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        total, todo = 0, [self._root]
        while todo:
            process = todo.pop()
            todo += children.get(process, [])
            self._cpu[process] = cpu.get(process, 0.0)
            try:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


def child(data: str, output: str, tokenizer: str | None) -> None:
    """One run; its measurements are the last line of what it prints."""
    import ray

    from pipelines.preferences import prepare_text
    from prefarena.config import ScratchModel, TextTask
    from prefarena.data.token_tables import TokenTables

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    watch = Watch(os.getpid())
    marks: list[tuple[float, float, float, int]] = []  # time, CPU and idle seconds, rows, at each batch of rows
    add = TokenTables.add

    def marked(tables: TokenTables, rows: pa.Table) -> None:
        add(tables, rows)
        marks.append((time.perf_counter(), watch.cpu_seconds(), idle_seconds(), tables.num_rows))

    TokenTables.add = marked  # type: ignore[method-assign, assignment]
    start = time.perf_counter()
    task = TextTask(data=data, max_prompt_tokens=512, max_response_tokens=512)
    summary = prepare_text(task, tokenizer, ScratchModel(), output)
    seconds = time.perf_counter() - start
    watch.close()
    first, last = marks[0], marks[-1]
    flowing = max(last[0] - first[0], 1e-9)
    results = {
        "peak_mib": watch.peak_mib,
        "seconds": seconds,
        "rows": summary["num_rows"],
        "flowing": (last[3] - first[3]) / flowing,
        "cores": (last[1] - first[1]) / flowing,
        "idle": (last[2] - first[2]) / flowing / (os.cpu_count() or 1),
    }
    print(json.dumps(results))


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
    from prefarena.data.splits import Shares

    medians: list[float] = []
    heads = f"{'peak MiB (median)':>18} {'ratio':>6} {'seconds':>8} {'rows/s':>8}"
    heads += f" {'rows/s, flowing':>16} {'cores':>6} {'idle':>5}"
    print(f"{'rows':>9} {'input MiB':>10} {heads}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.rows:
            data = Path(folder) / f"{size}.jsonl"
            write_pairs(data, size)
            tokenizer = Path(folder) / "tokenizer"
            if not tokenizer.exists():
                task = TextTask(data=str(data), max_rows=2000)
                prepare_tokenizer(task, ScratchModel(), tokenizer, Shares(test=0.2, judge=0.2, seed=0))
            results = []
            for i in range(arguments.repeats):
                command = [sys.executable, __file__, "--child", str(data), f"{folder}/out-{size}-{i}", str(tokenizer)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
                results.append(json.loads(done.stdout.splitlines()[-1]))
            medians.append(statistics.median(result["peak_mib"] for result in results))
            seconds, flowing, cores, idle = (
                statistics.median(result[name] for result in results)
                for name in ("seconds", "flowing", "cores", "idle")
            )
            mib = data.stat().st_size / 2**20
            shown = f"{medians[-1]:18.0f} {medians[-1] / medians[0]:6.2f} {seconds:8.1f} {size / seconds:8.0f}"
            print(f"{size:9} {mib:10.1f} {shown} {flowing:16.0f} {cores:6.2f} {idle:5.0%}", flush=True)
            data.unlink()


if __name__ == "__main__":
    main()
