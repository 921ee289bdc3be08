"""Peak memory of each training, by the prediction that trainings and the doctor make (cluster/needs.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from prefarena.cluster.capacity import share_beside_engine
from prefarena.cluster.needs import Lengths, Training, chosen_size, trainings
from prefarena.config import Comparison
from prefarena.modeling.memory import MemoryNeed
from prefarena.modeling.room import USABLE, share_mib, total_mib
from prefarena.training.prediction import required_mib

_MIB = 2**20
#: Of a training worker's process on a CPU before its job: 550 to 600 MiB on Linux, with torch's build for CPUs.
_PROCESS_MIB = 590.0
#: Of kernels that such a worker keeps in the end (`training/process_memory.py`), where products are in bfloat16.
_KERNELS_MIB = 80.0


@dataclass(frozen=True)
class Held:
    """The memory of a worker. mib: its peak, None if unknown before the model runs. room_mib: what it may take.

    size: of a pass, in tokens or rollouts, as it will be chosen.
    """

    mib: float | None
    room_mib: float
    size: int

    @property
    def fits(self) -> bool:
        return self.mib is None or self.mib <= self.room_mib


def held_by_trainings(
    config: Comparison,
    settings: PretrainedConfig,
    longest: Lengths,
    in_passes: Callable[[Training, int], Lengths],
    in_one_pass: Callable[[Training, int], int],
    known: dict[Any, MemoryNeed | None],
    *,
    card_gib: float | None = None,
) -> dict[str, Held]:
    """The memory that each training holds, by the key of its settings.

    longest: tokens that a row may have, by which sizes of passes are chosen. in_passes: mean tokens of the rows in the
    largest pass of a training, by its size. in_one_pass: what there is for it of that size. known: the needs that
    earlier calls for the same model have found, to which this one adds its own: each takes seconds, and most of them
    are needed again with other lengths of responses. card_gib: memory of a card; None means that the workers share this
    machine's.
    """
    on_cpu, found = not config.resources.use_gpu, dict[str, Held]()
    for training in trainings(config):

        def need(size: int, training: Training = training, lengths: Lengths = longest) -> MemoryNeed | None:
            same = (training.need, size, lengths)
            if same not in known:
                known[same] = training.need(settings, lengths, size)
            return known[same]

        room = _room_mib(config, card_gib, training.on_policy)
        size = chosen_size(training, need, int(room * _MIB), config)
        held = need(in_one_pass(training, size), training, in_passes(training, size))
        mib = None
        if held is not None:
            mib = held.total / _MIB
            spares = training.settings.spares_memory or config.resources.sharding == "fsdp"
            if on_cpu:  # a process as it is, in place of what stands for one where room must not run out
                nothing = required_mib(MemoryNeed(0, 0, 0, 0), on_cpu=True, spares=spares)
                mib = required_mib(held, on_cpu=True, spares=spares) - nothing + _PROCESS_MIB
                mib += _KERNELS_MIB if training.settings.precision == "bfloat16" else 0.0
        found[training.where] = Held(mib, room, size)
    return found


def _room_mib(config: Comparison, card_gib: float | None, on_policy: bool) -> float:
    if card_gib is None:
        groups = max(1, config.resources.num_groups)
        return share_mib(total_mib(), config.resources.num_workers * groups)
    share = share_beside_engine(config) if on_policy else config.resources.gpus_per_worker
    return card_gib * 1024 * USABLE * share
