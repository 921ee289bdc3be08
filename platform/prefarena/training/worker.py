"""One training worker's view of the job it runs. The same loops run under Ray Train and, alone, in one process."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefarena.mirror import mirror_of, pull, push
from prefarena.modeling import room
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.awaited import fill, is_awaited
from prefarena.modeling.memory import Spread
from prefarena.modeling.parts import like, own_part
from prefarena.modeling.shapes_first import raise_if_unusable
from prefarena.settings.optimisation import LearnerSettings
from prefarena.stage_files import CHECKPOINTS
from prefarena.stages import costs_of
from prefarena.training import process_memory
from prefarena.training.checkpoints import Checkpoint, CheckpointFolder, DamagedCheckpointError
from prefarena.training.remote_checkpoints import RemoteCheckpointFolder
from prefarena.training.sharding import shard
from prefarena.training.stage_log import StageLog

_STORAGE_RETRY_S = 120.0


class Worker:
    """A worker without Ray: one process. Checkpoints are under the job's own folder, whatever runs the worker."""

    rank = 0
    world_size = 1
    sharding: Literal["none", "fsdp"] = "none"
    #: Whether what is sharded lies in the host's memory.
    offloads = False
    #: Workers on this machine at the same time, other groups' included; and the share of its GPU that a worker has.
    num_side_by_side = 1
    share_of_device = 1.0

    def __init__(
        self, stage_dir: str, device: torch.device | str = "cpu", storage_retry_s: float = _STORAGE_RETRY_S
    ) -> None:
        self.stage_dir = Path(stage_dir)
        self.device = torch.device(device)
        self.storage_retry_s = storage_retry_s
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        self._started = time.perf_counter()
        self._measure_from_here()
        self.first_memory_mib = self.memory_in_use_mib()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this worker's device, averaging gradients over workers where there are several."""
        module = module.to(self.device)
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if self.world_size > 1 else module

    def distribute(self, module: nn.Module, precision: Arithmetic) -> nn.Module:
        """Wrap the module, or spread it over workers if `sharding` says so; it then casts to `precision` itself."""
        if self.shards:
            return self._read_awaited(self._spread(module, precision))
        return self.wrap(module)

    def place(self, module: nn.Module, precision: Arithmetic, head: Arithmetic | None = None) -> None:
        """Put a frozen module on this worker's device, or spread it as `shard` does; it is changed in place."""
        if self.shards:
            self._read_awaited(self._spread(module, precision, head))
        else:
            module.to(self.device)

    def _spread(self, module: nn.Module, precision: Arithmetic, head: Arithmetic | None = None) -> nn.Module:
        return shard(module, self.world_size, self.device, precision, head, offload=self.offloads)

    def _read_awaited(self, module: nn.Module) -> nn.Module:
        """Return the module, after reading this worker's rows of weights that are not loaded yet.

        Raises UserError on all workers where one of them finds invalid numbers.
        """
        if is_awaited(module):
            where = torch.device("cpu") if self.offloads else self.device
            raise_if_unusable(self.gathered(fill(module, self.rank, self.world_size, where)))
        return module

    @property
    def shards(self) -> bool:
        """Whether models are spread over the workers; a single worker has nothing to spread, except to the host."""
        return self.sharding == "fsdp" and (self.world_size > 1 or self.offloads)

    @property
    def num_parts(self) -> int:
        """How many workers a model is spread over; 1 where each holds all of it, on its device or on its host."""
        return self.world_size if self.shards else 1

    @property
    def spread(self) -> Spread:
        return Spread(self.num_parts, self.offloads)

    def no_sync(self, module: nn.Module, enabled: bool = True) -> Any:
        """A context in which backward passes leave the reduction over workers to a later one.

        Spread weights are reduced in every pass all the same: whole gradients would take what spreading spares.
        """
        return module.no_sync() if enabled and isinstance(module, DistributedDataParallel) else nullcontext()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the workers, as DDP does for a module that it wraps."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.world_size == 1 or not gradients:
            return
        together = self.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.world_size
        for gradient, part in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers, the same on all of them."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """Return rank 0's value on all workers."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return every worker's value, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_any(self, flag: bool) -> bool:
        """Whether the condition holds on any worker; the same on all of them."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    # ------------------------------------------------------------------------------------------- what it says

    @cached_property
    def stage_log(self) -> StageLog:
        """The log of the job's stage."""
        return StageLog(self.stage_dir, self.rank, lambda: self._attempt, self.storage_retry_s)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row of metrics."""
        self.stage_log.row(row)

    def note_padding(self, notes: list[str]) -> None:
        """Keep a record of why a model's rows are padded on a GPU: whoever prepared the model may not have had one."""
        if notes and self.device.type == "cuda":
            self.stage_log.fault("padded", "; ".join(notes))

    # ------------------------------------------------------------------------------------------- checkpoints

    @cached_property
    def _attempt(self) -> str:
        """A word that this attempt's workers share, and no other attempt's."""
        return self.share(secrets.token_hex(4))

    @cached_property
    def _checkpoints(self) -> CheckpointFolder:
        if mirror_of(self.stage_dir) is not None:
            sent: dict[str, tuple[int, int]] = {}
            return RemoteCheckpointFolder(
                self.stage_dir / CHECKPOINTS,
                rank=self.rank,
                world_size=self.world_size,
                attempt=self._attempt,
                retry_s=self.storage_retry_s,
                sharded=self.shards,
                publish_rows=lambda: push(self.stage_dir, sent),
            )
        return CheckpointFolder(
            self.stage_dir / CHECKPOINTS,
            rank=self.rank,
            world_size=self.world_size,
            attempt=self._attempt,
            retry_s=self.storage_retry_s,
            sharded=self.shards,
        )

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Checkpoint, in the background; every worker calls it. Raises what the one before could not do.

        Rank 0's tensors are kept; where models are spread every worker's, each its own part.
        """
        if self.rank == 0:
            self.stage_log.check_current()
        self._checkpoints.save(step, tensors, state)

    def flush(self) -> None:
        """Wait until the last checkpoint is written. Raises what it could not do."""
        self._checkpoints.wait()

    def restore(self) -> Checkpoint | None:
        """The last whole checkpoint of this job, or None; damaged ones are removed. Every worker calls it first of all.

        Of tensors that are spread it has this worker's part, however many workers wrote it.
        """
        folder = self._checkpoints
        if self.rank == 0:
            pull(self.stage_dir)
            self.stage_log.begin_attempt()
            folder.remove_unfinished()
        for step in self.share(folder.steps()):
            checkpoint, problem = None, ""
            try:
                checkpoint = folder.read(step)
            except DamagedCheckpointError as error:
                problem = str(error)
            if not self.on_any(checkpoint is None):
                return checkpoint
            message = f"the checkpoint of step {step} is damaged, so the one before it is used: {problem}"
            self.stage_log.fault("damaged_checkpoint", message, step=step)
            if self.rank == 0:
                folder.remove(step)
        return None

    def drop_checkpoints(self) -> None:
        """Remove them: the job's stage is finished."""
        if self.rank == 0:
            self._checkpoints.remove_all()

    # ------------------------------------------------------------------------------------------- costs

    def costs(self, *, num_beside: float = 0, **counts: Any) -> dict[str, Any]:
        """The job's cost so far: seconds, device-seconds, this worker's peak memory, and `counts`.

        num_beside: devices that it held in addition to those of its workers.
        """
        wall = time.perf_counter() - self._started
        held = wall * (self.world_size + num_beside)
        return costs_of(wall, held, peak_memory_mib=self._peak_memory_mib(), **counts)

    def _measure_from_here(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        process_memory.keep_few_kernels()
        process_memory.return_tensors(at_once=False)
        process_memory.give_back_freed()
        process_memory.forget_peak()

    def spares(self, settings: LearnerSettings) -> bool:
        """Whether memory counts for more than speed in such a training; gathered layers are temporary tensors, too."""
        return settings.spares_memory or self.shards

    def spare_memory(self) -> None:
        """Prefer low memory use to speed until the next job begins, where the two conflict."""
        if self.device.type == "cpu":
            process_memory.return_tensors(at_once=True)

    def give_back_freed(self, settings: LearnerSettings) -> None:
        """Return the freed memory that the process keeps, in a training where memory counts for more than speed.

        Tensors below the limit of `process_memory.return_tensors`, such as the activations of a short pass in bfloat16,
        stay in pieces that passes of other lengths fit badly: 400 to 550 MiB with SmolLM2-135M's adapters.
        """
        if self.device.type == "cpu" and self.spares(settings):
            process_memory.give_back_freed()

    def drop_garbage(self) -> None:
        """Free what a job held and no longer needs: the next one of the group needs the room.

        A model that ends in a reference cycle (FSDP's hooks and recomputed layers' forward methods refer to their
        modules, which refer to them) is freed by a garbage collection alone, which Python runs when many small objects
        were made, however large a few tensors are. The memory that the GPU's allocator keeps is lost to other
        processes, such as an engine on the same GPU.
        """
        gc.collect()
        self.give_back_cache()

    def give_back_cache(self) -> None:
        """Return the freed memory that the GPU's allocator keeps, for other processes on that GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory_share_mib(self) -> float:
        """This worker's share of the memory that its machine, container or GPU has in all, whatever is free now."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory / 2**20
            return total * room.USABLE * self.share_of_device
        return room.share_mib(room.total_mib(), self.num_side_by_side)

    def memory_in_use_mib(self) -> float:
        """Memory in use: of the process on a CPU, once freed memory is given back; of the device on a GPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 2**20
        process_memory.give_back_freed()
        return process_memory.resident_mib()

    def _peak_memory_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return process_memory.peak_mib()


class RayTrainWorker(Worker):
    """A Ray Train worker."""

    def __init__(
        self,
        stage_dir: str,
        storage_retry_s: float = _STORAGE_RETRY_S,
        sharding: Literal["none", "fsdp"] = "none",
        num_groups: int = 1,
        share_of_device: float = 1.0,
        offloads: bool = False,
    ) -> None:
        """num_groups: groups of workers like this one that run at the same time."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.sharding, self.offloads = sharding, offloads
        self.num_side_by_side = context.get_local_world_size() * max(1, num_groups)
        self.share_of_device = share_of_device
        super().__init__(stage_dir, ray.train.torch.get_device(), storage_retry_s)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, in the order of its parameters; of spread ones this worker's part."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{key}": own_part(value) for index, values in state.items() for key, value in values.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            index, key = name[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[key] = like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
