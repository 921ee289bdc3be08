"""One training worker's view of the job it runs. The same loops run under Ray Train and, alone, in one process."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: named tensors, and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Worker:
    """A worker without Ray: one process, checkpoints under the job's own folder."""

    rank = 0
    world_size = 1

    def __init__(self, stage_dir: str, device: torch.device | str = "cpu") -> None:
        self.stage_dir = Path(stage_dir)
        self.device = torch.device(device)
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        self._started = time.perf_counter()
        self._reset_peak_memory()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this worker's device, averaging gradients over workers where there are several."""
        module = module.to(self.device)
        return DistributedDataParallel(module) if self.world_size > 1 else module

    def no_sync(self, module: nn.Module, enabled: bool = True) -> Any:
        """A context in which backward passes leave the reduction over workers to a later one."""
        return module.no_sync() if enabled and isinstance(module, DistributedDataParallel) else nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, the same on all of them."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def log(self, row: dict[str, Any]) -> None:
        """Append a row of metrics. Rank 0 alone writes."""
        if self.rank == 0:
            with (self.stage_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def forget_rows_after(self, step: int) -> None:
        """Drop metric rows that an interrupted attempt logged beyond the checkpoint."""
        path = self.stage_dir / "metrics.jsonl"
        if self.rank == 0 and path.exists():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in rows), encoding="utf-8")

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Checkpoint; every worker calls it, rank 0's values are kept."""
        with self._temporary_checkpoint(step, tensors, state) as folder:
            target = self.stage_dir / "checkpoint"
            if target.exists():
                shutil.rmtree(target)
            os.replace(folder, target)

    def restore(self) -> Checkpoint | None:
        """The last checkpoint of this job, or None."""
        folder = self.stage_dir / "checkpoint"
        return _read_checkpoint(folder) if folder.exists() else None

    def costs(self, **counts: int) -> dict[str, Any]:
        """What the job has cost so far: seconds, device-seconds, this worker's peak memory, and `counts`."""
        wall = time.perf_counter() - self._started
        return {
            "wall_seconds": wall,
            "device_seconds": wall * self.world_size,
            "peak_memory_mib": self._peak_memory_mib(),
            **counts,
        }

    @contextmanager
    def _temporary_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Iterator[Path]:
        folder = self.stage_dir / f".checkpoint-{step}-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            folder / "tensors.safetensors",
        )
        contents = {"job": str(self.stage_dir), "step": step, "state": state}
        (folder / "state.json").write_text(json.dumps(contents), encoding="utf-8")
        yield folder

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # not Linux, or not allowed: the peak is then that of the process, not of the job
            return

    def _peak_memory_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class RayTrainWorker(Worker):
    """A Ray Train worker: checkpoints go through `ray.train.report`, and come back after any restart."""

    def __init__(self, stage_dir: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        super().__init__(stage_dir, ray.train.torch.get_device())

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        import ray.train

        if self.rank != 0:
            ray.train.report({"step": step, "job": self.stage_dir.name})
            return
        with self._temporary_checkpoint(step, tensors, state) as folder:
            ray.train.report(
                {"step": step, "job": self.stage_dir.name},
                checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=f"{self.stage_dir.name}-step{step}-{time.time_ns()}",
                delete_local_checkpoint_after_upload=True,
            )

    def restore(self) -> Checkpoint | None:
        import ray.train

        latest = ray.train.get_checkpoint()
        if latest is None:
            return None
        with latest.as_directory() as folder:
            contents = json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))
            return _read_checkpoint(Path(folder)) if contents["job"] == str(self.stage_dir) else None


def _read_checkpoint(folder: Path) -> Checkpoint:
    contents = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(contents["step"], load_file(folder / "tensors.safetensors"), contents["state"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{key}": value for index, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            index, key = name[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
